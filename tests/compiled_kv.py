"""Compile the kernels of packed KV attention for a GPU that is not there; `tests/test_kv_attention.py` starts this.

usage: python compiled_kv.py CAPABILITY     such as 90; prints the shared memory of every kernel in bytes
"""

import torch
from absent_gpu import compiled
from test_kv_attention import exact, per_block, per_token, queries

from quantization.kernels.kv_attention import attend
from quantization.kernels.kv_codes import Side

SIZE = 128

for dtype, bits, levels in ((torch.bfloat16, 4, True), (torch.float16, 3, False), (torch.float32, 2, True)):
    query, prefix = queries(1, 8, SIZE, dtype), exact(1, 2, 4, SIZE, 0, dtype)
    if levels:
        keys = values = Side(prefix, per_token("turned", bits, 1, 2, 70, SIZE).codes)
    else:
        keys = Side(prefix, per_block(bits, 1, 2, 2, SIZE, 32).codes, exact(1, 2, 6, SIZE, 0, dtype))
        coded = per_token("minimum", bits, 1, 2, 60, SIZE, groups=4).codes
        values = Side(prefix, coded, exact(1, 2, 10, SIZE, 0, dtype))
    attend(query, keys, values, 1.0, torch.zeros(1, 1, 1, 74) if levels else None, kernel=True)
for kernel in compiled:
    if "split" in kernel.metadata.name:
        print(kernel.metadata.shared)
