"""Numbers and pictures: perplexity, tables, figures, and the record of every run."""
