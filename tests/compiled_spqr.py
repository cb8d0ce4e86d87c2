"""Compile the kernels of SpQR's product for a GPU that is not there; `tests/test_spqr_kernel.py` starts this.

usage: python compiled_spqr.py CAPABILITY     such as 90; prints the shared memory of every kernel in bytes
"""

import torch
from absent_gpu import compiled
from test_spqr_kernel import spqr_weight

from quantization.kernels.protocols import Stored
from quantization.kernels.spqr import Spqr

for bits, size, order, dtype in ((3, 16, True, torch.bfloat16), (4, 32, False, torch.float16)):
    weight = spqr_weight(64, 128, size, bits, order=order)
    prepared = Spqr().prepare(Stored(weight.kind, weight.tensors(), weight.header()))
    for rows in (1, 9):
        bias = torch.zeros(64, dtype=dtype) if order else None
        prepared.multiply(torch.zeros(rows, 128, dtype=dtype), prepared.tensors, bias)
for kernel in compiled:
    print(kernel.metadata.shared)
