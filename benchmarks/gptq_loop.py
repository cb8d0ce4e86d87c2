"""The parts of GPTQ that only see a Hessian and a weight, at the shapes of an 8B model's block, on a GPU.

Seconds of the Hessian (with its error against float64), its factor, and the column loop by the kernel; for the smallest
shape also by torch, and how far the two differ. Weights are random, inputs random and correlated.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import quantization.weights.gptq as driver
from benchmarks.measure import report
from quantization.grids.uniform import UniformGrid
from quantization.weights.gptq import Hessian, gptq, inverse_factor

SHAPES = {"q+k+v": (6144, 4096), "o": (4096, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}
TOKENS = 262_144  # 128 samples of 2,048
SAMPLES, LENGTH = 8, 2048  # that are added at a time
COMPARED = 256  # channels whose sums are taken in float64 as well


def seconds(run: Callable[[], Any], device: torch.device, rounds: int = 1) -> float:
    """The least time of a call, after one that does not count if there are several rounds."""
    times = []
    for _ in range(rounds + (rounds > 1)):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def inputs(channels: int, device: torch.device) -> Tensor:
    """Correlated inputs in bfloat16: (SAMPLES, LENGTH, channels)."""
    draw = torch.Generator(device).manual_seed(channels)
    mix = torch.randn(channels, channels, generator=draw, device=device, dtype=torch.bfloat16) * (0.5 / channels**0.5)
    x = torch.randn(SAMPLES, LENGTH, channels, generator=draw, device=device, dtype=torch.bfloat16)
    return x + x @ mix


@contextmanager
def exchanged(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module, for a while."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def hessian_of(x: Tensor, tokens: int) -> Tensor:
    hessian = Hessian()
    for _ in range(max(1, tokens // (SAMPLES * LENGTH))):
        hessian.add(x)
    return hessian.take()


def measure_hessian(x: Tensor, tokens: int, rounds: int, **told: Any) -> Tensor:
    """Print its time, as arithmetic of the full square too, and its largest error, as a share of the largest entry."""
    h = hessian_of(x, SAMPLES * LENGTH)
    part = x.flatten(0, 1)[:, -COMPARED:].double()
    exact = part.T @ part * (2 / SAMPLES)
    error = float((h[-COMPARED:, -COMPARED:].double() - exact).abs().max() / exact.abs().max())
    spent = seconds(lambda: hessian_of(x, tokens), x.device, rounds)
    channels = x.shape[-1]
    report(benchmark="gptq_loop", part="hessian", channels=channels, tokens=tokens, seconds=round(spent, 4),
           full_tflops=round(2 * tokens * channels**2 / spent / 1e12, 1), error=error, **told)  # fmt: skip
    return h


def measure_factor(h: Tensor, rounds: int, **told: Any) -> None:
    """Print its time, and the largest entry of UᵀU·(H_λ·v) − v in float64, v all ones."""
    factor, _ = inverse_factor(h.clone(), 0.01)
    v = torch.ones(len(h), 1, dtype=torch.float64, device=h.device)
    damped = h.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    product = damped @ v
    del damped
    u = factor.double()
    residual = float((u.T @ (u @ product) - v).abs().max())
    del u
    spare = h.clone()
    spent = seconds(lambda: inverse_factor(spare.copy_(h), 0.01), h.device, rounds)
    report(benchmark="gptq_loop", part="factor", channels=len(h), seconds=round(spent, 4), residual=residual, **told)


def other_factors(h: Tensor) -> None:
    """Times of the pieces that a factor can be made of, by each library that torch has."""
    damped = h.clone()
    damped.diagonal().add_(0.01 * h.diagonal().mean())
    for library in ("default", "cusolver", "magma") if h.is_cuda else ("default",):
        try:
            torch.backends.cuda.preferred_linalg_library(library)
            lower = torch.linalg.cholesky_ex(damped)[0]
            eye = torch.eye(len(h), device=h.device)
            pieces: dict[str, Callable[[], Any]] = {
                "cholesky": lambda: torch.linalg.cholesky_ex(damped),
                "whole solve": lambda low=lower, one=eye: torch.linalg.solve_triangular(low, one, upper=False),
                "cholesky_inverse": lambda low=lower: torch.cholesky_inverse(low),
                "flip": lambda: damped.flip(0, 1),
            }
            for piece, run in pieces.items():
                spent = seconds(run, h.device, 2)
                report(benchmark="gptq_loop", part=piece, channels=len(h), library=library, seconds=round(spent, 4))
        except RuntimeError as error:
            print(f"{library}: {str(error).splitlines()[0]}")
    if h.is_cuda:
        torch.backends.cuda.preferred_linalg_library("default")


def measure_loop(name: str, h: Tensor, rounds: int, kernel: bool | None, **told: Any) -> tuple[Tensor, float]:
    """Print seconds of one matrix without its factor, and of all of it; returns codes and loss."""
    out, channels = SHAPES[name]
    draw = torch.Generator(h.device).manual_seed(0)
    weight = 0.02 * torch.randn(out, channels, generator=draw, device=h.device, dtype=torch.bfloat16)
    spare = h.clone()
    factor = inverse_factor(spare.copy_(h), 0.01)
    grid = UniformGrid(4, 128)

    def whole() -> Any:
        return gptq(weight, spare.copy_(h), grid, kernel=kernel)

    with exchanged(driver, inverse_factor=lambda *_: factor):  # of another order of channels: only the time counts
        loop = seconds(whole, h.device, rounds)
    quantized, loss, _ = whole()
    spent = seconds(whole, h.device)
    report(benchmark="gptq_loop", part="matrix", linears=name, out=out, channels=channels,
           kernel=h.is_cuda and kernel is not False, seconds=round(spent, 4), without_factor=round(loop, 4),
           loss=loss, **told)  # fmt: skip
    return quantized.codes, loss


def profile(name: str, h: Tensor) -> None:
    """Print what the GPU did for one matrix, the longest first."""
    weight = torch.randn(SHAPES[name], device=h.device, dtype=torch.bfloat16)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        gptq(weight, h.clone(), UniformGrid(4, 128))
    kernels = [e for e in seen.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    for kernel in sorted(kernels, key=lambda e: -e.self_device_time_total)[:12]:
        print(f"{name} {kernel.self_device_time_total / 1e3:9.3f} ms {kernel.count:6d} × {kernel.key[:90]}")


def variants(x: Tensor, h: Tensor, tokens: int) -> None:
    """Other sizes of the pieces, and other ways."""
    device = x.device

    def in_place(total: Tensor, a: Tensor, b: Tensor) -> None:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)

    for length in (512, 1024, 2048, SAMPLES * LENGTH):
        with exchanged(driver, TOKENS=length):
            measure_hessian(x, tokens // 4, 2, length=length)
            try:
                with exchanged(driver, _add_product=in_place):
                    measure_hessian(x, tokens // 4, 2, length=length, in_place=True)
            except (RuntimeError, NotImplementedError) as error:
                print(f"in place: {str(error).splitlines()[0]}")
    for width in (1024, 4096, 10**9):
        with exchanged(driver, PANELS={device.type: width}):
            measure_hessian(x, tokens // 4, 2, panel=width)
            measure_factor(h, 2, panel=width)
    if device.type == "cuda":
        from quantization.kernels import columns_triton

        name = next(n for n, (_, channels) in SHAPES.items() if channels == len(h))
        for rows_of_it, warps in ((16, 1), (32, 2), (32, 4), (64, 2), (64, 4), (128, 4)):
            with exchanged(columns_triton, ROWS=rows_of_it, WARPS=warps):
                measure_loop(name, h, 2, None, rows=rows_of_it, warps=warps)
        profile(name, h)
    other_factors(h)


def main() -> None:
    """All four sets of linears; one line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu tries it, in no useful time")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=1, help="divide every size by this, to try it")
    parser.add_argument("--variants", action="store_true", help="other sizes of the pieces as well")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no GPU is here")
        return
    device = torch.device(options.device)
    for name, shape in SHAPES.items():
        SHAPES[name] = (shape[0] // options.shrink, shape[1] // options.shrink)
    with torch.inference_mode():
        for channels in sorted({shape[1] for shape in SHAPES.values()}):
            x = inputs(channels, device)
            h = measure_hessian(x, options.tokens, options.rounds)
            measure_factor(h, options.rounds)
            for name, shape in SHAPES.items():
                if shape[1] == channels:
                    found = measure_loop(name, h, options.rounds, None)
                    if name == "o":
                        torch_codes, torch_loss = measure_loop(name, h, 1, False)
                        report(benchmark="gptq_loop", part="kernel beside torch", linears=name,
                               codes_differ=float((found[0] != torch_codes).float().mean()),
                               loss_ratio=found[1] / torch_loss)  # fmt: skip
            if options.variants:
                variants(x, h, options.tokens)
            del x, h


if __name__ == "__main__":
    main()
