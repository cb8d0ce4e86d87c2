"""Products with packed uniform weights beside torch's dense one, on a GPU: correct first, then how long they take.

Times are medians of replayed CUDA graphs and of plain calls, in microseconds. A small matrix is one of several that
take turns, so that the GPU's cache does not hold it. What a product reads is told as a share of what the GPU copies.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.measure import report
from quantization.grids.uniform import QuantizedTensor, UniformGrid, quantize
from quantization.kernels.products import PRODUCTS
from quantization.kernels.protocols import Stored

GROUP = 128
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (12288, 49152), (49152, 12288))  # outputs, inputs
BITS = (2, 3, 4, 8)
ROWS = (1, 4, 16, 64, 2048)
CACHE = 300e6  # bytes that matrices which take turns have together, at least
BOUNDS = {
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}  # of an error, to the largest sum there could be
VARIANTS = tuple((outputs, tiles, warps) for outputs in (8, 16, 32) for tiles in (1, 2, 4) for warps in (4, 8, 16))


def stored(weight: QuantizedTensor) -> Stored:
    """A matrix as a checkpoint keeps it."""
    return Stored(weight.kind, weight.tensors(), weight.header())


def random_tensors(bits: int, outputs: int, channels: int, device: str) -> dict[str, Tensor]:
    """What `Uniform.prepare` makes of a matrix, of random bits: zero points in the middle, outputs of size one."""
    groups = channels // GROUP
    return {
        "words": torch.randint(-(2**31), 2**31, (channels // 32, bits, outputs), dtype=torch.int32, device=device),
        "scale": (torch.rand(groups, outputs, device=device) + 0.5) / (2**bits * channels**0.5),
        "zero_point": torch.full((groups, outputs), 2 ** (bits - 1), dtype=torch.uint8, device=device),
    }


def check(device: str) -> bool:
    """Whether the product is right: every number of bits, dtype and kind of grid, few and many rows, odd sizes."""
    good, generator = True, torch.Generator(device).manual_seed(0)
    for bits in BITS:
        for convention, permuted in (("gptq-asym", False), ("gptq-sym", False), ("spqr-asym", True)):
            matrix = torch.randn(331, 1280, generator=generator, device=device)
            weight = quantize(matrix, UniformGrid(bits, GROUP, convention))
            if permuted:
                index = torch.arange(1280, device=device) // GROUP
                weight = replace(weight, group_index=index[torch.randperm(1280, device=device)].int())
            dense = weight.dequantize(torch.float64)
            made = PRODUCTS["uniform"].prepare(stored(weight))
            worst = dict.fromkeys(BOUNDS, 0.0)
            for dtype in BOUNDS:
                for rows in (1, 2, 4, 5, 16, 33, 64, 200):
                    x = torch.randn(rows, 1280, generator=generator, device=device).to(dtype)
                    bias = torch.randn(331, generator=generator, device=device).to(dtype)
                    y = made.multiply(x, made.tensors, bias)
                    again = made.multiply(x, made.tensors, bias)
                    expected = x.double() @ dense.T + bias.double()
                    size = x.double().norm(dim=1).max() * dense.norm(dim=1).max()
                    error = float((y.double() - expected).abs().max() / size)
                    worst[dtype] = max(worst[dtype], error)
                    if not (error < BOUNDS[dtype] and torch.equal(y, again)):
                        good = False
                        print(f"WRONG: {bits} bits {convention} {rows} rows {dtype}: error {error:.1e}, "
                              f"the same again: {torch.equal(y, again)}", flush=True)  # fmt: skip
            errors = ", ".join(f"{str(dtype).removeprefix('torch.')} {error:.1e}" for dtype, error in worst.items())
            print(f"checked: {bits} bits {convention}{' permuted' * permuted}, largest errors {errors}", flush=True)
    return good


def graph_time(calls: list[Callable[[], Any]], replays: int = 7) -> float:
    """Median microseconds of a call within a CUDA graph of all of them, one after the other."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return statistics.median(_elapsed(graph.replay) for _ in range(replays)) / len(calls)


def eager_time(calls: list[Callable[[], Any]], rounds: int = 7) -> float:
    """Median microseconds of a plain call."""

    def run() -> None:
        for call in calls:
            call()

    return statistics.median(_elapsed(run) for _ in range(rounds)) / len(calls)


def _elapsed(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def bandwidth(device: str) -> float:
    """Bytes a second of a copy, read and written."""
    source, target = (torch.empty(2**30, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * 2**30 / (graph_time([lambda: target.copy_(source)] * 5) * 1e-6)


def in_turn(call: Callable[[int], Any], copies: int, enough: int) -> list[Callable[[], Any]]:
    """Calls with every copy in turn, so many that there are enough."""
    count = copies * -(-enough // copies)
    return [lambda i=i: call(i % copies) for i in range(count)]


def measure(bits: int, outputs: int, channels: int, rows: tuple[int, ...], speed: float, device: str,
            dense_times: dict[Any, tuple[float, float]]) -> None:  # fmt: skip
    """Times of one shape, for all numbers of rows; a line each."""
    from quantization.kernels.uniform_triton import Codes, dequantized, multiply

    codes = Codes(bits, channels, outputs, GROUP // 32, None)
    first = random_tensors(bits, outputs, channels, device)
    size = sum(tensor.nbytes for tensor in first.values())
    copies = max(1, -(-int(CACHE) // size))
    weights = [first, *({name: t.clone() for name, t in first.items()} for _ in range(copies - 1))]
    truth = dequantized(first, codes, torch.float64) if rows else None
    for count in rows:
        x = torch.randn(count, channels, device=device, dtype=torch.bfloat16)
        packed = in_turn(lambda i, x=x: multiply(x, weights[i], None, codes), copies, 20 if size < 1e8 else 5)
        times = graph_time(packed), eager_time(packed)
        key = (outputs, channels, count)
        if key not in dense_times:
            number = max(1, -(-int(CACHE) // (2 * outputs * channels)))
            dense = [torch.randn(outputs, channels, device=device, dtype=torch.bfloat16) for _ in range(number)]
            calls = in_turn(lambda i, x=x, dense=dense: linear(x, dense[i]), number, 20 if number > 1 else 5)
            dense_times[key] = graph_time(calls), eager_time(calls)
            del dense, calls
        base = dense_times[key]
        expected = x[:64].double() @ truth.T
        error = float((multiply(x, first, None, codes)[:64].double() - expected).norm() / expected.norm())
        report(
            benchmark="products", bits=bits, outputs=outputs, inputs=channels, rows=count, us=round(times[0], 2),
            dense_us=round(base[0], 2), speedup=round(base[0] / times[0], 2), eager_us=round(times[1], 2),
            dense_eager_us=round(base[1], 2), eager_speedup=round(base[1] / times[1], 2),
            share_of_copy=round(size / (times[0] * 1e-6) / speed, 3), error=float(f"{error:.2e}"),
        )  # fmt: skip


def variants(bits: int, outputs: int, channels: int, speed: float, device: str) -> None:
    """One row by every tile of `VARIANTS`: microseconds, the fastest first."""
    from quantization.kernels.uniform_triton import Codes, Tile, few_rows

    codes, first = Codes(bits, channels, outputs, GROUP // 32, None), random_tensors(bits, outputs, channels, device)
    size = sum(tensor.nbytes for tensor in first.values())
    copies = max(1, -(-int(CACHE) // size))
    weights = [first, *({name: t.clone() for name, t in first.items()} for _ in range(copies - 1))]
    x = torch.randn(1, channels, device=device, dtype=torch.bfloat16)
    y = torch.empty(1, outputs, device=device, dtype=torch.bfloat16)
    found = []
    for variant in VARIANTS:
        tile = Tile(*variant)
        calls = in_turn(lambda i, t=tile: few_rows(x, weights[i], None, y, codes, t), copies, 20 if size < 1e8 else 5)
        try:
            found.append((graph_time(calls, 5), "/".join(map(str, variant))))
        except Exception as error:  # of a tile that takes too much of the GPU
            print(f"variant {variant}: {str(error).splitlines()[0][:100]}", flush=True)
    print(f"variants {bits} bits {outputs} x {channels} (outputs/tiles/warps):",
          ", ".join(f"{name} {time:.1f}" for time, name in sorted(found)),
          f"share {size / (min(found)[0] * 1e-6) / speed:.2f}", flush=True)  # fmt: skip


def compile_one(job: tuple[int, int, tuple[int, int, int] | None]) -> None:
    """Compile what a number of bits, of rows, or a variant takes, into Triton's own cache."""
    from quantization.kernels.uniform_triton import Codes, Tile, few_rows, multiply

    bits, rows, variant = job
    codes, tensors = Codes(bits, 1024, 256, GROUP // 32, None), random_tensors(bits, 256, 1024, "cuda")
    x = torch.zeros(rows, 1024, device="cuda", dtype=torch.bfloat16)
    if variant is None:
        multiply(x, tensors, None, codes)
    else:
        few_rows(x, tensors, None, x.new_empty(rows, 256), codes, Tile(*variant))


def compile_all(jobs: list[tuple[int, int, tuple[int, int, int] | None]], workers: int) -> None:
    """Compile in several processes; what fails is left to the measurement."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(compile_one, job) for job in jobs]:
            job.exception()


def main() -> None:
    """The check, then a line for every shape, number of bits and of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda"])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, bits and rows; no check")
    parser.add_argument("--variants", action="store_true", help="time other tiles of the product with one row")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile ahead")
    parser.add_argument("--bits", type=int, nargs="+", default=None)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no GPU is here, and products with packed weights are fast on one")
        return
    bits = options.bits or ((3, 4) if options.quick else BITS)
    shapes = (SHAPES[0], SHAPES[3], SHAPES[4]) if options.quick else SHAPES
    rows = (1, 16) if options.quick else ROWS
    jobs: list[Any] = [(b, r, None) for b in bits for r in rows]
    if options.variants:
        jobs += [(b, 1, variant) for b in (3, 4) for variant in VARIANTS]
    with torch.inference_mode():
        compile_all(jobs, options.workers)
        if not options.quick and not check(options.device):
            sys.exit(1)
        speed = bandwidth(options.device)
        print(f"copy bandwidth {speed / 1e12:.2f} TB/s, read and written", flush=True)
        dense_times: dict[Any, tuple[float, float]] = {}
        for b in bits:
            for outputs, channels in shapes:
                measure(b, outputs, channels, rows, speed, options.device, dense_times)
        if options.variants:
            for b in (3, 4):
                for outputs, channels in (SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[4]):
                    variants(b, outputs, channels, speed, options.device)


if __name__ == "__main__":
    main()
