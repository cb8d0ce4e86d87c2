"""Compile the kernels of uniform codes for a GPU that is not there; `tests/test_uniform_product.py` starts this.

usage: python compiled_uniform.py CAPABILITY     such as 90; prints the shared memory of every kernel in bytes
"""

import torch
from absent_gpu import compiled

from quantization.kernels.uniform_triton import UniformCodes, multiply

for bits, dtype in ((3, torch.bfloat16), (4, torch.float16)):
    codes = UniformCodes(bits, 256, 128, 4, 8.0 if bits == 4 else None)
    tensors = {
        "words": torch.zeros(8, bits, 128, dtype=torch.int32),
        "scale": torch.zeros(2, 128, dtype=torch.float16 if bits == 3 else torch.float32),
    } | ({"zero_point": torch.zeros(2, 128, dtype=torch.float16)} if bits == 3 else {})
    for rows in (1, 16, 17):
        x = torch.zeros(rows, 256, dtype=dtype)
        multiply(x, tensors, x.new_zeros(128) if rows == 1 else None, codes)
for kernel in compiled:
    print(kernel.metadata.shared)
