"""The published latency table of LUT-GEMM: one row of x times packed weights, beside cuBLAS over half precision.

Every shape is checked first, against the dequantized matrix in float64. Times are medians of replayed CUDA graphs in
which every call reads another copy of the weights, so that no cache holds them. With --json the figures are a run
record, read back if there is one.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import CACHE, bandwidth, eager_time, graph_time, in_turn, report
from corpora import values
from corpora.errors import Parser, UserError, run_program
from eval.tables.papers.latency import SPEEDUP
from quantization.grids.binary_coding import BinaryCoded, BinaryGrid, pack_planes
from quantization.grids.uniform import QuantizedTensor, UniformGrid
from quantization.kernels.lut import Lut
from quantization.kernels.products import choose
from quantization.kernels.protocols import Stored

GROUP = 128
SLACK = 2e-3  # of the norm: half precision of x and y, four times
CALLS = 10  # of a graph, at least


def binary(out: int, channels: int, bits: int, generator: torch.Generator) -> Stored:
    """Random planes, α between 1/2 and 1 times a half of the one before; half precision, as published."""
    device = generator.device
    shape = (channels // 32, bits, out)
    planes = torch.randint(-(2**31), 2**31, shape, generator=generator, device=device, dtype=torch.int32)
    halves = 0.5 ** torch.arange(bits, device=device)[:, None]
    alpha = (torch.rand(channels // GROUP, bits, out, generator=generator, device=device) / 2 + 0.5) * halves
    header = BinaryCoded(planes, alpha, None, BinaryGrid(bits, GROUP, scale_dtype="float16"), channels).header()
    return Stored("bcq", {"planes": planes, "alpha": alpha.half()}, header)


def uniform(out: int, channels: int, bits: int, generator: torch.Generator) -> Stored:
    """Random codes, scales and zero points."""
    device, groups = generator.device, channels // GROUP
    codes = torch.randint(2**bits, (out, channels), generator=generator, device=device, dtype=torch.uint8)
    scale = (torch.rand(out, groups, generator=generator, device=device) + 0.5).half()
    zero = torch.randint(2**bits, (out, groups), generator=generator, device=device).float()
    weight = QuantizedTensor(codes, scale, zero, UniformGrid(bits, GROUP, "gptq-asym", scale_dtype="float16"))
    return Stored(weight.kind, weight.tensors(), weight.header())


def copied(tensors: dict[str, Tensor], copies: int) -> list[dict[str, Tensor]]:
    """The same tensors so many times."""
    return [tensors, *({name: t.clone() for name, t in tensors.items()} for _ in range(copies - 1))]


def error(y: Tensor, x: Tensor, dense: Tensor) -> float:
    """How far y is from the product in float64, as a share of its norm."""
    truth = torch.cat([x.double() @ part.double().T for part in dense.split(1024)], dim=-1)
    return float((y.double() - truth).norm() / truth.norm())


def timed(call: Callable[[int], Tensor], copies: int, size: int, limit: float) -> tuple[float, dict[str, Any]]:
    """Microseconds of a call that reads so many bytes of one of the copies, and the figures of it."""
    calls = in_turn(call, copies, CALLS)
    found = graph_time(calls)
    return found, {
        "us": round(found, 2),
        "eager_us": round(eager_time(calls), 2),
        "share_of_copy": round(size / (found * 1e-6) / limit, 3),
    }


def packed(name: str, stored: Stored, x: Tensor, limit: float, dense_us: float) -> dict[str, Any] | None:
    """Figures of one product, after its check; None where no product but `unpack` takes the weight."""
    product = choose(stored, "auto", x.device)
    if product.name == "unpack":
        return None
    prepared = product.prepare(stored)
    tensors = dict(prepared.tensors)
    size = sum(t.nbytes for t in tensors.values())
    off = error(prepared.multiply(x, tensors, None), x, stored.weight.dequantize())
    assert off < SLACK, f"{name}: the product is {off:.1e} of its norm away from float64"
    copies = copied(tensors, -(-int(CACHE) // size))
    found, figures = timed(lambda i: prepared.multiply(x, copies[i], None), len(copies), size, limit)
    return {"kernel": product.name, **figures, "speedup": round(dense_us / found, 2), "error": float(f"{off:.1e}")}


def half(out: int, channels: int, x: Tensor, generator: torch.Generator, limit: float) -> tuple[float, dict[str, Any]]:
    """Microseconds and figures of cuBLAS over a matrix in half precision."""
    dense = torch.randn(out, channels, generator=generator, device=x.device, dtype=x.dtype)
    weights = [dense, *(dense.clone() for _ in range(int(CACHE) // dense.nbytes))]
    found, figures = timed(lambda i: torch.nn.functional.linear(x, weights[i]), len(weights), dense.nbytes, limit)
    return found, figures | {"speedup": 1.0}


def measure(out: int, channels: int, device: torch.device, limit: float) -> dict[str, Any]:
    """All products of one shape by name: times, and what they are beside cuBLAS and the bandwidth."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, channels, generator=generator, device=device, dtype=torch.float16)
    figures: dict[str, Any] = {}
    found, figures["cuBLAS"] = half(out, channels, x, generator, limit)
    for name, make, bits in (("W3", uniform, 3), ("W4", uniform, 4), ("LUT4", binary, 4), ("LUT3", binary, 3)):
        result = packed(f"{name} {out} × {channels}", make(out, channels, bits, generator), x, limit, found)
        if result is not None:
            figures[name] = result
    return figures


def table(results: dict[tuple[int, int], dict[str, Any]]) -> None:
    """Microseconds, and in brackets the speed-up over cuBLAS and the share of a copy's bandwidth."""
    names = ["cuBLAS", "W3", "W4", "LUT4", "LUT3"]
    print(f"{'out':>6} {'in':>6} " + "".join(f"{name:>22}" for name in names) + "   published GPTQ3 LUT4 LUT3")
    for (out, channels), figures in results.items():
        cells = []
        for name in names:
            f = figures.get(name)
            cells.append("–" if f is None else f"{f['us']:.1f} ({f['speedup']:.2f}, {f['share_of_copy']:.0%})")
        shape = min(out, channels), max(out, channels)
        published = " ".join(f"{speedup:.2f}" for speedup in SPEEDUP[shape])
        print(f"{out:>6} {channels:>6} " + "".join(f"{cell:>22}" for cell in cells) + "   " + published)


# variants -------------------------------------------------------------------------------------------------------------


def check(device: torch.device) -> None:
    """Odd sizes, offsets, groups that fill no word, rows of x by tables and by the matrix: how far from float64."""
    generator = torch.Generator(device).manual_seed(1)
    worst: dict[str, float] = {}
    for out, channels, size, bits in ((331, 1280, 128, 3), (64, 320, -1, 4), (1001, 96, 48, 8), (5000, 4096, 32, 1)):
        grid, groups = BinaryGrid(bits, size, offset=True), 1 if size == -1 else channels // size
        codes = torch.randint(2**bits, (out, channels), generator=generator, device=device, dtype=torch.uint8)
        alpha = torch.rand(groups, bits, out, generator=generator, device=device) + 0.1
        offset = torch.randn(groups, out, generator=generator, device=device)
        weight = BinaryCoded(pack_planes(codes, bits, size), alpha, offset, grid, channels)
        prepared, dense = Lut().prepare(Stored(weight.kind, weight.tensors(), weight.header())), weight.dequantize()
        for dtype, slack in ((torch.float32, 2e-6), (torch.float16, SLACK), (torch.bfloat16, 8 * SLACK)):
            for rows in (1, 3, 50):
                x = torch.randn(rows, channels, generator=generator, device=device).to(dtype)
                y, again = (prepared.multiply(x, prepared.tensors, None) for _ in range(2))
                off = error(y, x, dense)
                worst[str(dtype)] = max(worst.get(str(dtype), 0.0), off)
                if off > slack or not torch.equal(y, again):
                    print(f"WRONG: {out} × {channels}, groups {size}, {bits} bits, {rows} rows, {dtype}: {off:.1e}")
    print("checked, largest errors: " + ", ".join(f"{dtype} {off:.1e}" for dtype, off in worst.items()), flush=True)


def variants(out: int, channels: int, bits: int, device: torch.device, limit: float) -> None:
    """Time the table product in many plans, and batches by tables and by the dequantized matrix."""
    from quantization.kernels.lut_triton import Plan, Signs, dequantized, product

    generator = torch.Generator(device).manual_seed(0)
    stored = binary(out, channels, bits, generator)
    x = torch.randn(16, channels, generator=generator, device=device, dtype=torch.float16)
    tensors = dict(stored.parts)
    size = sum(t.nbytes for t in tensors.values())
    copies = copied(tensors, -(-int(CACHE) // size))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    dense = stored.weight.dequantize()
    found: list[tuple[float, Plan | Signs]] = []

    def call(rows: int, i: int, plan: Plan | Signs | None) -> Tensor:
        return product(x[:rows], copies[i]["planes"], copies[i]["alpha"], None, None, plan)

    for variant in VARIANTS:
        plan = plan_of(variant, bits * out, channels, processors)
        if not any(plan == other for _, other in found):
            try:
                off = error(call(1, 0, plan), x[:1], dense)
                assert off < SLACK, f"wrong, {off:.1e} of the norm away from float64"
                calls = in_turn(lambda i, plan=plan: call(1, i, plan), len(copies), CALLS)
                found.append((graph_time(calls, 5), plan))
            except Exception as failed:  # of a plan that takes too much of the GPU, or is wrong
                print(f"{plan}: {str(failed).splitlines()[0][:100]}", flush=True)
    print(f"{out} × {channels}, {bits} bits, {size / 1e6:.0f} MB, at the copy's bandwidth {1e6 * size / limit:.1f} µs")
    for took, plan in sorted(found, key=lambda pair: pair[0])[:25]:
        print(f"  {took:8.1f} µs  {size / (took * 1e-6) / limit:4.0%}  {plan}", flush=True)

    def made(rows: int, i: int) -> Tensor:
        weight = dequantized(copies[i]["planes"], copies[i]["alpha"], None, channels, GROUP, x.dtype)
        return torch.nn.functional.linear(x[:rows], weight)

    def batches(name: str, sizes: tuple[int, ...], by: Callable[[int, int], Tensor]) -> None:
        times = {b: graph_time(in_turn(lambda i, b=b: by(b, i), len(copies), CALLS), 5) for b in sizes}
        print(f"  batch by {name}: " + ", ".join(f"{b}: {took:.1f} µs" for b, took in times.items()), flush=True)

    batches("tables", (1, 2, 4, 8), lambda rows, i: call(rows, i, None))
    batches("the matrix", (1, 16), made)


def plan_of(variant: tuple[int, ...], rows: int, channels: int, processors: int) -> Any:
    """The plan of a variant for a shape."""
    from quantization.kernels.lut_triton import Plan, Signs

    if len(variant) == 3:
        return Signs(*variant)
    splits = min(channels // GROUP, variant[3] * processors // -(-rows // variant[0]))
    return Plan(*variant[:3], max(1, splits))


def compile_one(variant: tuple[int, ...]) -> None:
    """Compile a variant into Triton's own cache."""
    from quantization.kernels.lut_triton import product

    stored = binary(256, 256, 3, torch.Generator("cuda").manual_seed(0))
    x = torch.zeros(1, 256, device="cuda", dtype=torch.float16)
    product(x, stored.parts["planes"], stored.parts["alpha"], None, None, plan_of(variant, 768, 256, 132))


# rows of a tile, inputs of a table, warps, programs for each multiprocessor
VARIANTS: list[tuple[int, ...]] = [
    *((rows, inputs, warps, waves) for inputs in (4, 5) for waves in (1, 2, 4, 8) for rows, warps in (
        (512, 4), (1024, 4), (2048, 4), (2048, 8), (4096, 8),
    )),
    (8, 64, 8), (16, 32, 8), (16, 64, 8),  # outputs and words of a program without tables, warps
]  # fmt: skip


def shape(word: str) -> tuple[int, int]:
    """A shape of the published table as NxK. Raises argparse.ArgumentTypeError for another one."""
    for n, k in SPEEDUP:
        if word == f"{n}x{k}":
            return n, k
    known = ", ".join(f"{n}x{k}" for n, k in SPEEDUP)
    raise argparse.ArgumentTypeError(f"{values.shown(word)} is not in the published table; give of {known}")


def record(shapes: tuple[tuple[int, int], ...], device: torch.device, force: bool) -> dict[str, Any]:
    """The run record of some shapes, n × k and k × n each."""
    from eval.runs import record_of

    settings = {
        "benchmark": "lutgemm",
        "shapes": [list(shape) for shape in shapes],
        "group": GROUP,
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": version("triton"),
    }

    def figures() -> dict[str, Any]:
        limit = bandwidth(str(device))
        return {
            "bandwidth": limit,
            "products": [
                {"out": out, "channels": channels, "products": measure(out, channels, device, limit)}
                for n, k in shapes
                for out, channels in ((n, k), (k, n))
            ],
        }

    name = "lutgemm-" + "-".join(f"{n}x{k}" for n, k in shapes[:2])
    return record_of("latency", name, settings, figures, force=force)


def main() -> None:
    """Seven shapes, n × k and k × n: a line each, and the table."""
    parser = Parser(prog="python -m benchmarks.lutgemm", description=__doc__)
    parser.add_argument("--device", type=values.device, default="auto", help="a GPU (default: the first)")
    parser.add_argument("--variants", action="store_true", help="time the table product's plans instead")
    parser.add_argument(
        "--shapes",
        type=values.several(shape),
        default=tuple(SPEEDUP),
        metavar="NxK,…",
        help="of the published table, such as 512x2048 (default: all seven)",
    )
    parser.add_argument("--json", action="store_true", help="keep a run record, and print it instead of the table")
    parser.add_argument("--force", action="store_true", help="with --json: measure again, even if there is a record")
    options = parser.parse_args()
    if options.device == "cpu" or not torch.cuda.is_available() or find_spec("triton") is None:
        said = "LUT-GEMM's kernel needs a CUDA device and Triton; one of them is not here"
        if options.json:
            raise UserError(f"{said}, so there is no latency to measure; run it where both are")
        print(f"skipped: {said}")
        return
    device = torch.device("cuda" if options.device == "auto" else options.device)
    with torch.inference_mode():
        if options.json:
            print(json.dumps(record(options.shapes, device, options.force), indent=2))
            return
        limit = bandwidth(str(device))
        print(f"copy bandwidth {limit / 1e12:.2f} TB/s, read and written", flush=True)
        if options.variants:
            with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
                for job in [pool.submit(compile_one, variant) for variant in {v[:3]: v for v in VARIANTS}.values()]:
                    job.exception()
            check(device)
            for out, channels, bits in ((12288, 49152, 3), (8192, 2048, 4), (4096, 16384, 3), (1024, 4096, 3)):
                variants(out, channels, bits, device, limit)
            return
        results = {}
        for n, k in options.shapes:
            for out, channels in ((n, k), (k, n)):
                results[out, channels] = measure(out, channels, device, limit)
                for name, figures in results[out, channels].items():
                    report(benchmark="lutgemm", out=out, channels=channels, group=GROUP, product=name, **figures)
        table(results)


if __name__ == "__main__":
    run_program(main)
