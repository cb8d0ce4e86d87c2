"""What quantization does inside a model: errors, keys and values, pivot tokens."""
