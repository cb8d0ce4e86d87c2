"""MMLU, question answering and every other task of lm-eval."""
