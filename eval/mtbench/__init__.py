"""MT-bench: answers, judgements and their tables."""
