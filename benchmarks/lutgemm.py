"""The published latency table of LUT-GEMM: one row of x times packed weights, beside cuBLAS over half precision.

Every shape is checked first, against the dequantized matrix in float64. Times are medians of replayed CUDA graphs in
which every call reads another copy of the weights, so that no cache holds them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import report
from quantization.grids.binary_coding import BinaryCoded, BinaryGrid
from quantization.grids.uniform import QuantizedTensor, UniformGrid
from quantization.kernels.products import PRODUCTS, choose
from quantization.kernels.protocols import Stored

GROUP = 128
# n and k of the published table, and its speed-ups over cuBLAS: GPTQ's kernel at 3 bits, LUT-GEMM at 4 and 3.
PUBLISHED = {
    (512, 2048): (0.92, 0.96, 1.00),
    (1024, 4096): (1.06, 1.02, 1.09),
    (2048, 8192): (1.08, 0.92, 1.01),
    (4096, 16384): (1.78, 1.40, 1.73),
    (7168, 28672): (1.42, 1.86, 2.22),
    (8192, 32768): (1.64, 2.00, 2.43),
    (12288, 49152): (1.69, 2.10, 2.58),
}
CACHE = 192e6  # bytes that a graph reads at least: several times what a GPU's cache holds
SLACK = 2e-3  # of the norm: half precision of x and y, four times
Call = Callable[[Tensor, int], Tensor]  # of x and the number of the copy


def seconds(call: Call, x: Tensor, copies: int, replays: int = 7) -> float:
    """Of one call, the median over replays of a graph of `copies` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(x, 0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    calls = max(copies, 4)
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(x, i % copies)
    times = []
    graph.replay()
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def eager_seconds(call: Call, x: Tensor, copies: int, calls: int = 50) -> float:
    """Of one call among many that the host starts one by one."""
    call(x, 0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        call(x, i % copies)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, reading and writing."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda x, _: target.copy_(x), source, 1)


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


def packed(name: str, stored: Stored, x: Tensor, limit: float, dense_time: float) -> dict[str, Any] | None:
    """Figures of one product, after its check; None where no product but `unpack` takes the weight."""
    product = choose(stored, "auto", x.device)
    if product.name == "unpack":
        return None
    prepared = product.prepare(stored)
    tensors = dict(prepared.tensors)
    size = sum(t.nbytes for t in tensors.values())
    y = prepared.multiply(x, tensors, None)
    off = error(y, x, stored.weight.dequantize())
    assert off < SLACK, f"{name}: the product is {off:.1e} of its norm away from float64"
    copies = copied(tensors, max(1, round(CACHE / size)))

    def call(x: Tensor, i: int) -> Tensor:
        return prepared.multiply(x, copies[i], None)

    found = seconds(call, x, len(copies))
    return {
        "kernel": product.name,
        "milliseconds": round(1e3 * found, 5),
        "eager_milliseconds": round(1e3 * eager_seconds(call, x, len(copies)), 4),
        "speedup": round(dense_time / found, 3),
        "bandwidth_share": round((size + x.nbytes + y.nbytes) / found / limit, 3),
        "error": off,
    }


def half(out: int, channels: int, x: Tensor, generator: torch.Generator, limit: float) -> tuple[dict[str, Any], float]:
    """Figures and seconds of cuBLAS over a matrix in half precision."""
    dense = torch.randn(out, channels, generator=generator, device=x.device, dtype=x.dtype)
    weights = [dense, *(dense.clone() for _ in range(round(CACHE / dense.nbytes) - 1))]

    def call(x: Tensor, i: int) -> Tensor:
        return torch.nn.functional.linear(x, weights[i])

    found = seconds(call, x, len(weights))
    figures = {
        "milliseconds": round(1e3 * found, 5),
        "eager_milliseconds": round(1e3 * eager_seconds(call, x, len(weights)), 4),
        "bandwidth_share": round((dense.nbytes + x.nbytes + 2 * out) / found / limit, 3),
    }
    return figures, found


def measure(out: int, channels: int, device: torch.device, limit: float) -> dict[str, Any]:
    """All products of one shape by name: milliseconds, and what they are beside cuBLAS and the bandwidth."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, channels, generator=generator, device=device, dtype=torch.float16)
    figures = {}
    figures["cuBLAS"], found = half(out, channels, x, generator, limit)
    for name, make, bits in (("W3", uniform, 3), ("W4", uniform, 4), ("LUT4", binary, 4), ("LUT3", binary, 3)):
        result = packed(f"{name} {out} × {channels}", make(out, channels, bits, generator), x, limit, found)
        if result is not None:
            figures[name] = result
    return figures


def table(results: dict[tuple[int, int], dict[str, Any]]) -> None:
    """Milliseconds, and in brackets the speed-up over cuBLAS and the share of the copy's bandwidth."""
    names = ["cuBLAS", "W3", "W4", "LUT4", "LUT3"]
    print(f"{'out':>6} {'in':>6} " + "".join(f"{name:>24}" for name in names) + "   published GPTQ3 LUT4 LUT3")
    for (out, channels), figures in results.items():
        cells = []
        for name in names:
            f = figures.get(name)
            text = (
                "–" if f is None else f"{f['milliseconds']:.4f} ({f.get('speedup', 1):.2f}, {f['bandwidth_share']:.0%})"
            )
            cells.append(f"{text:>24}")
        shape = min(out, channels), max(out, channels)
        print(f"{out:>6} {channels:>6} " + "".join(cells) + "   " + " ".join(f"{s:.2f}" for s in PUBLISHED[shape]))


# variants -------------------------------------------------------------------------------------------------------------


def variants(out: int, channels: int, bits: int, device: torch.device, limit: float) -> None:
    """Time the table product in many plans, and batches by tables and by the dequantized matrix."""
    from quantization.kernels.lut_triton import Plan, dequantized, product

    generator = torch.Generator(device).manual_seed(0)
    stored = binary(out, channels, bits, generator)
    x = torch.randn(16, channels, generator=generator, device=device, dtype=torch.float16)
    tensors = dict(stored.parts)
    size = sum(t.nbytes for t in tensors.values())
    copies = copied(tensors, max(1, round(CACHE / size)))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    dense = stored.weight.dequantize()
    found: list[tuple[float, Plan]] = []

    def call(x: Tensor, i: int, plan: Plan | None) -> Tensor:
        return product(x, copies[i]["planes"], copies[i]["alpha"], None, None, plan)

    for rows, inputs, copied_tables, together, warps in PLANS:
        for waves in (1, 2, 4):
            splits = min(channels // GROUP, waves * processors // -(-bits * out // rows))
            plan = Plan(rows, inputs, copied_tables, together, warps, max(1, splits))
            if any(plan == other for _, other in found):
                continue
            off = error(call(x[:1], 0, plan), x[:1], dense)
            assert off < SLACK, f"{plan} is {off:.1e} away"
            found.append((seconds(partial(call, plan=plan), x[:1], len(copies), 5), plan))
    print(f"{out} × {channels}, {bits} bits, {size / 1e6:.0f} MB, at the copy's bandwidth {1e6 * size / limit:.1f} µs")
    for took, plan in sorted(found, key=lambda pair: pair[0]):
        print(f"  {1e6 * took:8.1f} µs  {size / took / limit:4.0%}  {plan}")
    usual = {b: 1e6 * seconds(partial(call, plan=None), x[:b], len(copies), 5) for b in (1, 2, 4, 8)}

    def made(x: Tensor, i: int) -> Tensor:
        weight = dequantized(copies[i]["planes"], copies[i]["alpha"], None, channels, GROUP, x.dtype)
        return torch.nn.functional.linear(x, weight)

    whole = {b: 1e6 * seconds(made, x[:b], len(copies), 5) for b in (1, 16)}
    print("  batch by tables, µs:", {b: round(t, 1) for b, t in usual.items()})
    print("  by the matrix, µs:", {b: round(t, 1) for b, t in whole.items()})


# rows of a tile, inputs of a table, copies of it, tables written together, warps
PLANS = [
    *((rows, 4, 32, 1, warps) for rows, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))),
    *((rows, 4, 32, 4, warps) for rows, warps in ((512, 4), (1024, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 32))),
    *((rows, 8, 1, 4, warps) for rows, warps in ((512, 4), (1024, 4), (2048, 8), (4096, 16), (4096, 8))),
    *((rows, 8, 32, 1, warps) for rows, warps in ((4096, 16), (8192, 16), (8192, 32))),
    (4096, 8, 4, 4, 16),
    (2048, 4, 1, 4, 8),
    (1024, 0, 1, 1, 4),
    (2048, 0, 1, 1, 8),
]


def main() -> None:
    """Seven shapes, n × k and k × n: a line each, and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variants", action="store_true", help="time the table product's plans instead")
    options = parser.parse_args()
    if options.device == "cpu" or not torch.cuda.is_available() or find_spec("triton") is None:
        print("skipped: LUT-GEMM's kernel needs a CUDA device and Triton; one of them is not here")
        return
    device = torch.device(options.device)
    with torch.inference_mode():
        limit = bandwidth(device)
        print(f"copy bandwidth {limit / 1e12:.2f} TB/s; products: {', '.join(PRODUCTS)}")
        if options.variants:
            for out, channels, bits in ((12288, 49152, 3), (49152, 12288, 3), (4096, 16384, 3), (4096, 4096, 4)):
                variants(out, channels, bits, device, limit)
            return
        results = {}
        for n, k in PUBLISHED:
            for out, channels in ((n, k), (k, n)):
                results[out, channels] = measure(out, channels, device, limit)
                for name, figures in results[out, channels].items():
                    report(benchmark="lutgemm", out=out, channels=channels, group=GROUP, product=name, **figures)
        table(results)


if __name__ == "__main__":
    main()
