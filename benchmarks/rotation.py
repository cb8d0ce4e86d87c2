"""Prefill and decode time of a model with QuaRot's online rotations, and of KV policies, on the same tokens."""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import alternating, ratio, report
from intactkv.attach import IntactModel, attach
from quantization.kv_cache import PerHead, Rotated
from quantization.named import named_recipe
from quantization.programs.options import chosen_device
from quantization.runs.plan import plan_run


def main() -> None:
    """Through the decoder, without the head: 512 tokens, and one token behind 128 others. `added` is a share of the
    model's time without what is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("modelzoo/smollm2/smollm2-135m"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device = chosen_device(options.device)
    dense, rotated = (
        plan_run(options.model, named_recipe(name), device=device).load().model for name in ("fp16", "rotate")
    )
    pairs = {
        "online rotations": (attach(rotated, None), attach(dense, None)),
        "KV policy per_head": (attach(dense, None, PerHead(4)), attach(dense, None)),
        "KV policy rotated": (attach(dense, None, Rotated(4)), attach(dense, None)),
    }
    ids = torch.randint(3, dense.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0)).to(device)

    def prefill(model: IntactModel) -> Callable[[], object]:
        return lambda: model.feed(ids, through=model.model.get_decoder())

    def decode(model: IntactModel) -> Callable[[], object]:
        cache = model.new_cache()
        model.feed(ids[:, :128], through=model.model.get_decoder(), cache=cache)

        def step() -> None:
            model.feed(ids[:, 128:129], through=model.model.get_decoder(), cache=cache)
            cache.crop(-1)

        return step

    for name, models in pairs.items():
        for task, of in (("prefill of 512 tokens", prefill), ("one token behind 128", decode)):
            with torch.inference_mode():
                mine, plain = (of(model) for model in models)
                times = alternating(mine, plain, options.rounds, device.type)
            report(
                benchmark=name,
                task=task,
                device=device.type,
                milliseconds=round(1e3 * statistics.median(times[0]), 2),
                without_milliseconds=round(1e3 * statistics.median(times[1]), 2),
                added=round(ratio(*times) - 1, 4),
            )


if __name__ == "__main__":
    main()
