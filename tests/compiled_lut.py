"""Compile the kernels of LUT-GEMM's product for a GPU that is not there; `tests/test_lut_kernel.py` starts this.

usage: python compiled_lut.py CAPABILITY     such as 90; prints the shared memory of every table product in bytes
"""

import torch
from absent_gpu import compiled

from quantization.kernels.lut_triton import Plan, Signs, dequantized, product

for bits, dtype, plan in (
    (3, torch.bfloat16, Plan(4096, splits=2)),
    (4, torch.float16, Plan(1024, 4, 4, 1)),
    (1, torch.float32, Signs()),
):
    planes, alpha = torch.zeros(8, bits, 2048, dtype=torch.int32), torch.zeros(2, bits, 2048, dtype=torch.float16)
    x, offset = torch.zeros(1, 256, dtype=dtype), alpha[:, 0].contiguous() if bits == 3 else None
    product(x, planes, alpha, offset, x.new_zeros(2048) if bits == 3 else None, plan)
    dequantized(planes, alpha, offset, 256, 128, dtype)
for kernel in compiled:
    if kernel.metadata.name in ("_rows_kernel", "_signs_kernel"):
        print(kernel.metadata.shared)
