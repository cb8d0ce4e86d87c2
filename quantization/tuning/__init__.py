"""Block-wise training with the quantizers at work: one method a file, one training loop for all."""
