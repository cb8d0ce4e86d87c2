"""Numbers on grids: how codes, scales and levels become weights, and how a checkpoint keeps them."""
