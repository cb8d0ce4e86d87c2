"""What is needed and lacks, before anything runs or is submitted: this machine, and the files of a table."""
