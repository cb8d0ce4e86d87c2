"""One decoder block at a time: its parts, the text that flows through it, what stands in front of its linears."""
