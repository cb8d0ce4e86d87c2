"""Prefill and decode time with an intact [BOS] beside the plain model, on the same tokens."""

import argparse
import copy
from pathlib import Path

import torch

from benchmarks.measure import alternating, ratio, report
from corpora.text import evaluation_stream, protocol, start_token_id
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.named import named_recipe
from quantization.programs.options import chosen_device
from quantization.runs.plan import plan_run


def main() -> None:
    """Prefill of 256, 512 and 2048 tokens (one new token), and decoding of 64 tokens behind a prompt of 64."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("modelzoo/smollm2/smollm2-135m"))
    parser.add_argument("--corpus", default="sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device = chosen_device(options.device)
    plan = plan_run(options.model, named_recipe("fp16"), device=device)
    model = plan.load().model
    intact = attach(model, build_prefix(model, [start_token_id(plan.tokenizer)]))
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")  # as transformers runs it; an attached model has ours
    stream = evaluation_stream(plan.tokenizer, options.corpus, window=2048, protocol=protocol("intactkv"))
    pad = plain.generation_config.pad_token_id or 0

    def compare(name: str, prompt: int, new: int) -> None:
        ids = stream.ids[None, :prompt].to(device)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": pad}
        mask = torch.ones_like(ids)
        times = alternating(
            lambda: intact.generate(ids, mask, **settings),
            lambda: plain.generate(ids, attention_mask=mask, **settings),
            options.rounds,
            device.type,
        )
        middle = options.rounds // 2
        report(
            benchmark=name,
            prompt_tokens=prompt,
            new_tokens=new,
            device=device.type,
            seconds=round(sorted(times[0])[middle], 4),
            plain_seconds=round(sorted(times[1])[middle], 4),
            overhead=round(ratio(*times) - 1, 4),
        )

    for prompt in (256, 512, 2048):
        compare("prefill", prompt, 1)
    compare("decode", 64, 64)


if __name__ == "__main__":
    main()
