"""GPTQ and AWQ by gptqmodel, on given token ids. Runs inside .venv-peers/gptqmodel (see setup.sh).

The seconds are those of `quantize` alone, which also packs the weights; no import, no loading, no saving.
Its own defaults stay, apart from what the options say and what `peer.json` lists.

Four settings are about the machine, not the method. Two CPU workers: gptqmodel takes one by itself on two cores, and
then refuses to load ("virtual pool requests 2 workers"). The packing extension is compiled (once per machine, half a
minute) before the clock starts. The layout gptq_v2 stores zero points as they are; the older one stores them minus
one, which its own linears read wrongly before a round trip through a file. AWQ's linears refuse float32, though only
their forward pass needs half precision: the list of what they take is extended, so that it computes in float32 as
everyone else here.
"""

import os
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))

from common import DAMP, device_name, peak_memory_mb, read_segments, runner_options, write_result  # isort: skip

import torch
from gptqmodel import GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import AWQConfig, GPTQConfig
from gptqmodel.utils.cpp import load_pack_block_extension
from torch import Tensor


def dense_weight(linear: BaseQuantLinear) -> Tensor:
    """What a packed linear computes with, (out, in): the scales as stored (half precision), the product in float32."""
    linear.scales = linear.scales.float()
    if isinstance(linear, AwqTorchLinear):
        stored = (linear.qweight, linear.qzeros, linear.scales)
        return dequantize_gemm(*stored, bits=linear.bits, group_size=linear.group_size).T
    return linear.dequantize_weight().T


def main() -> None:
    """Load, quantize with a clock around it, write."""
    options = runner_options(__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)  # it writes its logs below the current directory
    own = {"bits": options.bits, "group_size": options.group_size, "sym": options.symmetric}
    common = {"device": device_name(), "offload_to_disk": False, "true_sequential": options.true_sequential}
    if options.method == "gptq":
        static = options.act_order == "static"
        own |= {"desc_act": static, "static_groups": static, "act_group_aware": False, "damp_percent": DAMP}
        config = GPTQConfig(**own, **common, format=FORMAT.GPTQ_V2)
        load_pack_block_extension()
    else:
        AwqTorchLinear.SUPPORTS_DTYPES = [*AwqTorchLinear.SUPPORTS_DTYPES, torch.float32]
        config = AWQConfig(**own, **common)
    model = GPTQModel.load(str(options.model), config, dtype=getattr(torch, options.dtype))
    segments = read_segments(options.segments)
    calibration = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in segments]

    start = time.perf_counter()
    model.quantize(calibration, batch_size=options.batch_size, calibration_sort=None)
    seconds, peak_mb = time.perf_counter() - start, peak_memory_mb()

    parameters = dict(model.model.state_dict())
    with torch.no_grad():
        for name, module in model.model.named_modules():
            if isinstance(module, BaseQuantLinear):
                parameters[f"{name}.weight"] = dense_weight(module)
    write_result(
        options,
        parameters,
        name="gptqmodel",
        packages=("gptqmodel",),
        seconds=seconds,
        peak_mb=peak_mb,
        settings={**own, **common, "batch_size": options.batch_size, "workers": os.environ["GPTQMODEL_CPU_WORKERS"]},
    )


if __name__ == "__main__":
    main()
