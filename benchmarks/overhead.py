"""Prefill and decode time behind an intact prefix beside the plain model on the same tokens, and what each call asks
of the host: operations, and times that it waits for the device."""

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.measure import alternating, asked_of_host, ratio, report
from benchmarks.memory import SHAPES
from corpora.text import evaluation_stream, protocol, start_token_id
from intactkv.architecture import decoder_of
from intactkv.attach import attach
from intactkv.policy import KVPolicy
from intactkv.prefix import build_prefix
from quantization.kv_cache import PerHead
from quantization.named import named_recipe
from quantization.programs.options import chosen_device
from quantization.runs.plan import plan_run

VOCABULARY = 32000  # of random models; the head is left out of prefill


def real_model(directory: Path, corpus: str, device: torch.device) -> tuple[PreTrainedModel, torch.Tensor]:
    """A model of the zoo and a text for it, which starts with its [BOS]."""
    plan = plan_run(directory, named_recipe("fp16"), device=device)
    stream = evaluation_stream(plan.tokenizer, corpus, window=2048, protocol=protocol("intactkv"))
    start = torch.tensor([start_token_id(plan.tokenizer)])
    return plan.load().model, torch.cat([start, stream.ids[stream.ids != start]]).to(device)


def random_model(shape: str, blocks: int, device: torch.device) -> tuple[PreTrainedModel, torch.Tensor]:
    """A LLaMA of random bfloat16 weights, made where it runs, and random ids."""
    config = LlamaConfig(
        **SHAPES[shape], num_hidden_layers=blocks, vocab_size=VOCABULARY, max_position_embeddings=16384,
        attn_implementation="sdpa", dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        return model, torch.randint(3, VOCABULARY, (16384,))


def main() -> None:
    """Prefill of several lengths and decoding behind prefixes of several lengths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("modelzoo/smollm2/smollm2-135m"))
    parser.add_argument("--corpus", default="sample")
    parser.add_argument("--shape", choices=[*SHAPES], help="random weights of this shape in place of --model")
    parser.add_argument("--blocks", type=int, default=8, help="of --shape (default: 8)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 512, 2048], help="tokens of a prefill")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[1], help="tokens of the prefix (default: 1, [BOS])")
    parser.add_argument("--new", type=int, default=64, help="tokens of a decoding (default: 64)")
    parser.add_argument("--kv-bits", type=int, help="also with the KV policy per_head at so many bits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device = chosen_device(options.device)
    if options.shape:
        model, ids = random_model(options.shape, options.blocks, device)
    else:
        model, ids = real_model(options.model, options.corpus, device)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")  # as transformers runs it; an attached model has ours
    pad = plain.generation_config.pad_token_id or 0
    settings = {"max_new_tokens": options.new, "min_new_tokens": options.new, "do_sample": False, "pad_token_id": pad}

    def compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], **of: Any) -> None:
        times = alternating(ours, theirs, options.rounds, device.type)
        (operations, waits), (plain_operations, plain_waits) = asked_of_host(ours), asked_of_host(theirs)
        report(
            benchmark=name,
            **of,
            device=device.type,
            seconds=round(statistics.median(times[0]), 5),
            plain_seconds=round(statistics.median(times[1]), 5),
            overhead=round(ratio(*times) - 1, 4),
            operations=[operations, plain_operations],
            waits=[waits, plain_waits],
        )

    policies: list[KVPolicy | None] = [None, *([PerHead(options.kv_bits)] if options.kv_bits else [])]
    with torch.inference_mode():
        for length in options.prefixes:
            prefix = build_prefix(model, ids[:length].tolist())
            for kv in policies:
                intact = attach(model, prefix, kv)
                of = {"prefix": length, "kv": kv and f"per_head {options.kv_bits}"}
                for prompt in options.prompts:
                    fed, whole = ids[None, length : length + prompt], ids[None, : length + prompt]
                    compare(
                        "prefill",
                        lambda fed=fed, intact=intact: intact.feed(fed, through=decoder_of(intact.model)),
                        lambda whole=whole: decoder_of(plain)(whole, use_cache=True),
                        **of,
                        prompt_tokens=prompt,
                    )
                whole = ids[None, : length + 64]
                mask = torch.ones_like(whole)
                compare(
                    "decode",
                    lambda whole=whole, mask=mask, intact=intact: intact.generate(whole, mask, **settings),
                    lambda whole=whole, mask=mask: plain.generate(whole, attention_mask=mask, **settings),
                    **of,
                    prompt_tokens=64,
                    new_tokens=options.new,
                )


if __name__ == "__main__":
    main()
