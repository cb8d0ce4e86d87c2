"""Products with SpQR's weights, 3 bits, groups of 16, 1 % outliers, beside cuBLAS, on a GPU: checked, then timed."""

import argparse
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.lutgemm import error
from benchmarks.measure import CACHE, bandwidth, eager_time, graph_time, in_turn, report
from quantization.grids.sparse import SecondLevel, SparseRows, SpQRWeight
from quantization.kernels.protocols import Prepared, Stored
from quantization.kernels.spqr import Spqr

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # outputs, inputs
ROWS = (1, 4, 16, 2048)
BITS, SIZE, TILE, SHARE = 3, 16, 16, 0.01
# outputs of a program, groups that it reads at a time, warps
VARIANTS = ((16, 32, 4), (32, 16, 4), (32, 32, 4), (32, 32, 8), (16, 64, 8), (32, 64, 8), (64, 16, 8), (8, 64, 4))
SLACK = {torch.bfloat16: 8e-3, torch.float32: 1e-5}  # of the norm


def random_weight(out: int, channels: int, generator: torch.Generator) -> SpQRWeight:
    """Random codes on random grids, and so large a share of outliers."""
    device, groups = generator.device, channels // SIZE

    def level(low: float) -> SecondLevel:
        codes = torch.randint(8, (groups, out), generator=generator, device=device, dtype=torch.uint8)
        scale = (torch.rand(groups, out // TILE, generator=generator, device=device) + 0.5) / 8
        return SecondLevel(codes, scale.half(), torch.full_like(scale, low).half())

    kept = torch.rand(out, channels, generator=generator, device=device) < SHARE
    corrections = SparseRows.from_dense(10 * kept.half())
    codes = torch.randint(2**BITS, (out, channels), generator=generator, device=device, dtype=torch.uint8)
    order = torch.randperm(channels, generator=generator, device=device).to(torch.uint16)
    return SpQRWeight(codes, level(-3.0), level(0.5), corrections, order, BITS, 3, 3)


def main() -> None:
    """A line for every shape and number of rows of x."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variants", action="store_true", help="time other tiles with one row, too")
    options = parser.parse_args()
    if options.device == "cpu" or not torch.cuda.is_available() or find_spec("triton") is None:
        print("skipped: SpQR's kernel needs a CUDA device and Triton; one of them is not here")
        return
    with torch.inference_mode():
        limit = bandwidth(options.device)
        for out, channels in SHAPES:
            measure(out, channels, limit, options.device, VARIANTS if options.variants else ())


def measure(out: int, channels: int, limit: float, device: str, tiles: tuple[tuple[int, int, int], ...] = ()) -> None:
    """Times of one shape, and with one row those of other tiles."""
    generator = torch.Generator(device).manual_seed(0)
    weight = random_weight(out, channels, generator)
    stored = Stored(weight.kind, weight.tensors(), weight.header())
    prepared, truth = Spqr().prepare(stored), weight.dequantize()
    size = sum(t.nbytes for t in prepared.tensors.values())
    copies = [{name: t.clone() for name, t in prepared.tensors.items()} for _ in range(-(-int(CACHE) // size))]
    dense = [truth.bfloat16() for _ in range(-(-int(CACHE) // (2 * truth.numel())))]
    if tiles:
        variants(tiles, torch.randn(1, channels, device=device, dtype=torch.bfloat16), prepared, copies)
    for rows in ROWS:
        for dtype, slack in SLACK.items():
            x = torch.randn(rows, channels, generator=generator, device=device, dtype=torch.float32).to(dtype)
            off = error(prepared.multiply(x, prepared.tensors, None), x, truth)
            assert off < slack, f"{out} × {channels}, {rows} rows of {dtype}: {off:.1e} of the norm away from float64"
        x = x.bfloat16()

        def packed(i: int, x: Tensor = x) -> Tensor:
            return prepared.multiply(x, copies[i], None)

        def half(i: int, x: Tensor = x) -> Tensor:
            return torch.nn.functional.linear(x, dense[i])

        mine, cublas = (in_turn(call, len(of), 10) for call, of in ((packed, copies), (half, dense)))
        took, base = graph_time(mine), graph_time(cublas)
        report(
            benchmark="spqr", out=out, channels=channels, rows=rows, us=round(took, 2),
            eager_us=round(eager_time(mine), 2), dense_us=round(base, 2), dense_eager_us=round(eager_time(cublas), 2),
            speedup=round(base / took, 2), share_of_copy=round(size / (took * 1e-6) / limit, 3),
            bits_per_weight=round(8 * size / truth.numel(), 2),
        )  # fmt: skip


def variants(
    tiles: tuple[tuple[int, int, int], ...], x: Tensor, prepared: Prepared, copies: list[dict[str, Tensor]]
) -> None:
    """Microseconds of one row by other tiles, the fastest first."""
    from quantization.kernels import spqr_triton

    found, usual = [], (spqr_triton.TILE, spqr_triton.GROUPS, spqr_triton.WARPS)
    for tile in tiles:
        spqr_triton.TILE, spqr_triton.GROUPS, spqr_triton.WARPS = tile
        found.append((graph_time(in_turn(lambda i: prepared.multiply(x, copies[i], None), len(copies), 10)), tile))
    spqr_triton.TILE, spqr_triton.GROUPS, spqr_triton.WARPS = usual
    print("outputs/groups/warps: " + ", ".join(f"{tile} {took:.1f}" for took, tile in sorted(found)), flush=True)


if __name__ == "__main__":
    main()
