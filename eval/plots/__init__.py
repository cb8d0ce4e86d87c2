"""One file per figure. Each writes a PNG and, beside it, the drawn numbers as CSV."""
