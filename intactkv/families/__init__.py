"""Rows of the architecture table, a file for each way in which families depart from LLaMA."""
