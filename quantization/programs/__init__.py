"""What the command line reaches: options that programs share, and one file per program."""
