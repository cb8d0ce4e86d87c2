"""Products with packed uniform weights beside torch's dense one, on a GPU: correct first, then how long they take.

Times are medians of replayed CUDA graphs and of plain calls, in microseconds. A small matrix is one of several that
take turns, so that the GPU's cache does not hold it. What a product reads is told as a share of what the GPU copies.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.measure import CACHE, bandwidth, eager_time, graph_time, in_turn, report
from quantization.grids.uniform import QuantizedTensor, UniformGrid, quantize
from quantization.kernels.products import PRODUCTS
from quantization.kernels.protocols import Stored

GROUP = 128
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (12288, 49152), (49152, 12288))  # outputs, inputs
BITS = (2, 3, 4, 8)
ROWS = (1, 2, 4, 8, 16, 64, 2048)
BOUNDS = {
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}  # of an error, to the largest sum there could be
CHECKS = (("gptq-asym", torch.bfloat16), ("gptq-sym", torch.float16), ("spqr-asym", torch.float32))
FEW_TILES = ((8, 2, 8, 1, 0, 0), (16, 2, 16, 1, 0, 0), (16, 2, 16, 1, 0, 1), *(
    (*tile, *how) for how in ((1, 0, 1), (3, 0, 0), (1, 1, 0), (1, 1, 1), (3, 1, 0))
    for tile in ((16, 2, 4), (16, 2, 8), (16, 4, 4), (16, 4, 8), (32, 2, 4), (32, 2, 8), (32, 4, 4), (32, 4, 8))
))  # fmt: skip
MORE_TILES = ((16, 1, 8, 1, 1, 0), (16, 2, 4, 1, 1, 0), (16, 2, 8, 1, 1, 0), (32, 1, 8, 1, 1, 0))
DOT_TILES = tuple(
    (*tile, programs, aligned) for programs in (264, 792) for aligned in (0, 1)
    for tile in ((64, 16, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1), (128, 32, 8, 1), (64, 32, 4, 2), (32, 32, 4, 1))
)  # fmt: skip


def stored(weight: QuantizedTensor) -> Stored:
    """A matrix as a checkpoint keeps it."""
    return Stored(weight.kind, weight.tensors(), weight.header())


def random_tensors(bits: int, outputs: int, channels: int, device: str) -> dict[str, Tensor]:
    """What `Uniform.prepare` makes of a matrix, of random bits: zero points in the middle, outputs of size one."""
    groups = channels // GROUP
    return {
        "words": torch.randint(-(2**31), 2**31, (channels // 32, bits, outputs), dtype=torch.int32, device=device),
        "scale": (torch.rand(groups, outputs, device=device) + 0.5) / (2**bits * channels**0.5),
        "zero_point": torch.full((groups, outputs), 2 ** (bits - 1), dtype=torch.half, device=device),
    }


def check(bits: int, convention: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the product is right and the same in every call: a few and many rows, odd sizes, a bias; and the errors,
    relative to the largest sum there could be. Real zero points come with channels in any groups."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    weight = quantize(random(331, 1280), UniformGrid(bits, GROUP, convention))
    if convention == "spqr-asym":
        index = torch.arange(1280, device="cuda") // GROUP
        weight = replace(weight, group_index=index[torch.randperm(1280, device="cuda")].int())
    dense, made = weight.dequantize(torch.float64), PRODUCTS["uniform"].prepare(stored(weight))
    good, errors = True, []
    for rows in (1, 4, 16, 17):
        x, bias = random(rows, 1280).to(dtype), random(331).to(dtype)
        y, again = made.multiply(x, made.tensors, bias), made.multiply(x, made.tensors, bias)
        expected = x.double() @ dense.T + bias.double()
        size = x.double().norm(dim=1).max() * dense.norm(dim=1).max()
        errors.append(float((y.double() - expected).abs().max() / size))
        good = good and errors[-1] < BOUNDS[dtype] and torch.equal(y, again)
    told = ", ".join(f"{error:.1e}" for error in errors)
    return good, f"{'right' if good else 'WRONG'}: {bits} bits {convention} {dtype}, 1, 4, 16, 17 rows: errors {told}"


def measure(bits: int, outputs: int, channels: int, rows: tuple[int, ...], speed: float, device: str,
            dense_times: dict[Any, tuple[float, float]]) -> None:  # fmt: skip
    """Times of one shape, for all numbers of rows; a line each."""
    from quantization.kernels.uniform_triton import UniformCodes, dequantized, multiply

    codes = UniformCodes(bits, channels, outputs, GROUP // 32, None)
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


def variants(bits: int, rows: int, outputs: int, channels: int, speed: float, device: str) -> None:
    """A few rows by every tile: microseconds, the fastest first."""
    from quantization.kernels.uniform_triton import UniformCodes

    codes = UniformCodes(bits, channels, outputs, GROUP // 32, None)
    first = random_tensors(bits, outputs, channels, device)
    size = sum(tensor.nbytes for tensor in first.values())
    copies = max(1, -(-int(CACHE) // size))
    weights = [first, *({name: t.clone() for name, t in first.items()} for _ in range(copies - 1))]
    x = torch.randn(rows, channels, device=device, dtype=torch.bfloat16)
    y = torch.empty(rows, outputs, device=device, dtype=torch.bfloat16)
    found = []
    for tile in tiles_for(rows):
        calls = in_turn(lambda i, t=tile: start(x, weights[i], y, codes, t), copies, 20 if size < 1e8 else 5)
        try:
            found.append((graph_time(calls, 5), "/".join(map(str, tile))))
        except Exception as error:  # of a tile that takes too much of the GPU
            print(f"tile {tile}: {str(error).splitlines()[0][:100]}", flush=True)
    print(f"tiles {bits} bits, {rows} rows, {outputs} x {channels}:",
          ", ".join(f"{name} {time:.1f}" for time, name in sorted(found)[:24]),
          f"best share {size / (min(found)[0] * 1e-6) / speed:.2f}", flush=True)  # fmt: skip


def tiles_for(rows: int) -> tuple[tuple[int, ...], ...]:
    """The tiles that are tried with so many rows: outputs/tiles/warps/stages/scaled/ahead of `Tile`, six of `DotTile`,
    outputs/units/warps/stages/programs/aligned."""
    return FEW_TILES if rows == 1 else MORE_TILES + DOT_TILES if rows <= 4 else DOT_TILES


def start(x: Tensor, tensors: dict[str, Tensor], y: Tensor, codes: Any, tile: tuple[int, ...]) -> None:
    """The product by one tile."""
    from quantization.kernels.uniform_triton import DotTile, Tile, few_rows, some_rows

    if len(x) <= 4 and tile not in DOT_TILES:
        few_rows(x, tensors, None, y, codes, len(x), Tile(*tile[:4], *map(bool, tile[4:6]), *tile[6:]))
    else:
        some_rows(x, tensors, None, y, codes, len(x), DotTile(*tile))


def compile_one(job: tuple[int, int, int, int, tuple[int, ...] | None]) -> None:
    """Compile what a number of bits and of rows takes for a shape, or a tile, into Triton's own cache."""
    from quantization.kernels.uniform_triton import UniformCodes, dot_tile_of, multiply, tile_of

    bits, rows, outputs, channels, tile = job
    wanted = UniformCodes(bits, channels, outputs, GROUP // 32, None)
    codes = UniformCodes(bits, 1024, 256, GROUP // 32, None)
    tensors, x = random_tensors(bits, 256, 1024, "cuda"), torch.zeros(rows, 1024, device="cuda", dtype=torch.bfloat16)
    if rows > 16:
        multiply(x, tensors, None, codes)
    else:
        chosen = tile or astuple(tile_of(wanted, rows) if rows <= 4 else dot_tile_of(wanted, x.dtype))
        start(x, tensors, x.new_empty(rows, 256), codes, chosen)


def ahead(jobs: list[Any], checks: list[Any], workers: int) -> bool:
    """Compile and check in several processes; what is not compiled is left to the measurement. Whether all is right."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        checking, compiling = [pool.submit(check, *one) for one in checks], [pool.submit(compile_one, j) for j in jobs]
        good = True
        for future in checking:
            right, told = future.result() if future.exception() is None else (False, f"WRONG: {future.exception()!r}")
            print(told, flush=True)
            good = good and right
        for job, future in zip(jobs, compiling, strict=True):
            if future.exception() is not None:
                print(f"not compiled: {job}: {str(future.exception())[:200]}", flush=True)
    return good


def main() -> None:
    """The check, then a line for every shape, number of bits and of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda"])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, bits, rows and checks")
    parser.add_argument("--variants", action="store_true", help="time other tiles, too, with 1 to 16 rows")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile ahead")
    parser.add_argument("--bits", type=int, nargs="+", default=None)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no GPU is here, and products with packed weights are fast on one")
        return
    bits = options.bits or ((3, 4) if options.quick else BITS)
    shapes = (SHAPES[0], SHAPES[3], SHAPES[4]) if options.quick else SHAPES
    plan = [(b, *shape, (1, 4, 16, 64) if options.quick else ROWS) for b in bits for shape in shapes]
    plan += [(b, *SHAPES[3], (1,)) for b in (2, 8)] if options.quick and options.bits is None else []
    jobs = [(b, r, outputs, channels, None) for b, outputs, channels, rows in plan for r in rows]
    if options.variants:
        jobs += [(b, 1, 256, 1024, tile) for b in (3, 4) for tile in FEW_TILES]
        jobs += [(3, 4, 256, 1024, tile) for tile in MORE_TILES] + [(3, 16, 256, 1024, tile) for tile in DOT_TILES[:12]]
    with torch.inference_mode():
        checks = [(b, *kind) for b in bits for kind in (CHECKS[:1] if options.quick else CHECKS)]
        if not ahead(jobs, checks, options.workers):
            sys.exit("a product is wrong: nothing is timed")
        speed = bandwidth(options.device)
        print(f"copy bandwidth {speed / 1e12:.2f} TB/s, read and written", flush=True)
        dense_times: dict[Any, tuple[float, float]] = {}
        for b, outputs, channels, rows in plan:
            measure(b, outputs, channels, rows, speed, options.device, dense_times)
        if options.variants:
            for b, r in ((3, 1), (4, 1), (3, 4), (3, 16)):
                for outputs, channels in (SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[4]):
                    variants(b, r, outputs, channels, speed, options.device)


if __name__ == "__main__":
    main()
