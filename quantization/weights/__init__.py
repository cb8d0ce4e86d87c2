"""Weight quantizers: how the points on a grid are chosen, one file per method."""
