"""The runs of tables as Slurm arrays: what is submitted lies in outputs/cluster/NAME/ as files to read.

    tasks.jsonl      the list: one call of a program per line, and the tasks whose artefacts it needs
    00.sbatch …      the arrays: tasks that need the same
    jobs.json        what was submitted when, and under which job id
    status/N.json    what task N says of itself
    logs/            what it printed

A task is done when the ledger has its runs, whoever ran them. So a table that is submitted twice is run once, and
`reproduce`, `table` and `report` see no difference.
"""
