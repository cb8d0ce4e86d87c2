"""Tables of finished runs, alone or beside the published ones."""
