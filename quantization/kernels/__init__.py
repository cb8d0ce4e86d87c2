"""Products with packed weights, one file per storage format: plain torch, the reference of what is written for GPUs."""
