"""Peak memory of quantizing one block of Mixtral's kind with GPTQ, beside the bound: two blocks and four Hessians.

The block's weights are random; the text is a few random samples, so the time is that of factors and column loops. The
peak is resident memory from before the block is made to after it is written; Hessians are those of the widest linear,
`down`, in float32.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import MixtralConfig

from benchmarks.measure import report
from corpora.machine import peak_memory_mb
from intactkv.architecture import architecture_of
from quantization.grids.uniform import UniformGrid
from quantization.model.blocks import DecoderBlock
from quantization.model.stream import CalibrationStream
from quantization.recipes.recipe import Recipe
from quantization.runs.dense import empty_model_of
from quantization.runs.one_block import process_block
from quantization.weights.gptq import GPTQ


def main() -> None:
    """Print one JSON line: the shape, the peak, the bound and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096, help="channels between blocks (default: 4096, Mixtral's)")
    parser.add_argument("--width", type=int, default=14336, help="channels within an expert (default: 14336)")
    parser.add_argument("--experts", type=int, default=8, help="of the block, two for every token (default: 8)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the weights")
    parser.add_argument("--samples", type=int, default=4, help="of the calibration text (default: 4)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample (default: 128)")
    options = parser.parse_args()
    heads = max(1, options.hidden // 128)
    config = MixtralConfig(
        vocab_size=64, hidden_size=options.hidden, intermediate_size=options.width, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), num_local_experts=options.experts,
        max_position_embeddings=options.length, dtype=getattr(torch, options.dtype),
    )  # fmt: skip
    torch.manual_seed(0)
    model = empty_model_of(config)
    architecture = architecture_of(config)
    before, started = peak_memory_mb("cpu"), time.perf_counter()
    for module in model.modules():  # one tensor at a time, of its own: as a checkpoint is read
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=config.dtype)
            values.fill_(1) if values.ndim == 1 else values.normal_(std=values.shape[1] ** -0.5)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    ids = torch.randint(64, (options.samples, options.length))
    (module,) = architecture.blocks_of(model)
    stream = CalibrationStream(model, architecture, ids)
    block = DecoderBlock(0, module, architecture, config, stream)
    size = sum(parameter.nbytes for parameter in module.parameters()) / 1e6
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        _, write = process_block(block, Recipe(weights=GPTQ(UniformGrid(4, 128))), Path(directory))
        write()
    peak, hessian = peak_memory_mb("cpu") - before, options.width**2 * 4 / 1e6
    bound = 2 * size + 4 * hessian
    report(
        shape=f"{options.experts} experts {options.hidden} × {options.width}", dtype=options.dtype,
        tokens=ids.numel(), experts_unseen=int(block.figures["experts_unseen"]), seconds=time.perf_counter() - started,
        block_mb=size, hessian_mb=hessian, peak_mb=peak, bound_mb=bound, ratio=peak / bound,
    )  # fmt: skip


if __name__ == "__main__":
    main()
