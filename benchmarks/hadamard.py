"""Online rotations on the same tokens as the dense products they stand in front of, and as a dense rotation."""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.measure import alternating, ratio, report
from quantization.hadamard import apply, apply_heads, matrix, plan
from quantization.programs.options import chosen_device

# Hidden size, MLP width, query heads, head size.
SHAPES = {"SmolLM2-135M": (576, 1536, 9, 64), "8B": (4096, 14336, 32, 128)}


def main() -> None:
    """One decoded token and a prefill, in float32 and bfloat16. A ratio is what the rotation adds to the product."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    options = parser.parse_args()
    device = chosen_device(options.device)

    def measure(shape: str, tokens: int, dtype: torch.dtype) -> None:
        hidden, width, heads, head_size = SHAPES[shape]
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        def compare(name: str, mine: Callable[[], Tensor], peer: Callable[[], Tensor]) -> None:
            with torch.inference_mode():
                times = alternating(mine, peer, options.rounds, device.type)
            report(
                benchmark=name,
                shape=shape,
                tokens=tokens,
                dtype=str(dtype).removeprefix("torch."),
                device=device.type,
                milliseconds=round(1e3 * statistics.median(times[0]), 3),
                peer_milliseconds=round(1e3 * statistics.median(times[1]), 3),
                ratio=round(ratio(*times), 3),
            )

        x, down, mlp = random(tokens, width), random(hidden, width), plan(width)
        compare("rotation beside down_proj", lambda: apply(x, mlp), lambda: linear(x, down))
        dense = matrix(mlp).to(device, dtype)
        compare("rotation beside dense rotation", lambda: apply(x, mlp), lambda: linear(x, dense))
        y, out, mix = random(tokens, heads * head_size), random(hidden, heads * head_size), plan(heads)
        compare("heads beside o_proj", lambda: apply_heads(y, mix, head_size), lambda: linear(y, out))

    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in options.tokens:
                measure(shape, tokens, dtype)


if __name__ == "__main__":
    main()
