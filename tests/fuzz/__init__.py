"""A fuzzer of our own: every kind of file that the project reads is damaged, every option gets nonsense.

A call must end with exit code 2 and one line, having written nothing, or give exactly the figures of the intact
control.
`python -m tests.fuzz --help` runs it from the command line, test_fuzz.py a short part of it. damage.py: what can
happen to a file. kinds.py: what is read, and by which programs. options.py: nonsense for options. engine.py: one call
and its judgement.
"""
