"""One file per subcommand of `python -m eval`: `add` declares its options, `run` does the work.

Only the standard library and the shared options are imported at the top, so that `--help` answers at once.
"""
