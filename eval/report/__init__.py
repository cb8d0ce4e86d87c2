"""The report: published tables with ours beside them as one HTML file that needs nothing else."""
