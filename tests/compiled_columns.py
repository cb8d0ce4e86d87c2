"""Compile the kernel of `columns.round_columns` for a GPU that is not there; `tests/test_columns.py` starts this.

usage: python compiled_columns.py CAPABILITY     such as 90; prints the shared memory of every kernel in bytes
"""

import torch
from absent_gpu import compiled

from quantization.kernels.columns import Levels, round_columns

for n, bits, outliers in ((128, 4, False), (16, 3, True), (128, 8, True)):
    grid, w = torch.ones(2, 70), torch.ones(n, 70)
    levels = Levels(grid, grid, torch.zeros(n, dtype=torch.int32), 2**bits - 1, outliers, grid[0] if outliers else None)
    round_columns(w, torch.eye(n), levels, w.byte(), w.half() if outliers else None, kernel=True)
for kernel in compiled:
    print(kernel.metadata.shared)
