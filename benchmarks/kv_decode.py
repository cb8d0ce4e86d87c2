"""Attention of one decoded token straight from packed KV codes, beside torch's SDPA over a dense cache, on a GPU."""

import argparse
import statistics
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import alternating, graph_time, ratio, report
from intactkv.store import Store
from quantization.kv_cache import KIVI, PerHead, Policy, TurboQuant

KV_HEADS, HEADS, SIZE = 8, 32, 128  # of an 8B model
POLICIES: dict[str, Policy] = {
    "per_head 4": PerHead(4, scale_dtype="float16"),
    "kivi 4": KIVI(4, prefill="final"),
    "kivi 2": KIVI(2, prefill="final"),
    "turboquant k8v4": TurboQuant(8, v_bits=4),
    "turboquant 4bit-nc": TurboQuant(4),
    "turboquant k3v4-nc": TurboQuant(3, v_bits=4),
    "turboquant 3bit-nc": TurboQuant(3),
    "turboquant lloyd 2": TurboQuant(2, values="lloyd"),
}
CHUNK = 2048  # tokens that are encoded at a time


def filled(policy: Policy, batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Store:
    """The packed store of one layer that holds so many random tokens."""
    store = policy.store(0, None, packed=True)
    generator = torch.Generator(device).manual_seed(0)
    for start in range(0, tokens, CHUNK):
        shape = (batch, KV_HEADS, min(CHUNK, tokens - start), SIZE)
        states = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
        store.append(*states, decode=False)
    return store


def measure(name: str, batch: int, tokens: int, device: torch.device, rounds: int) -> None:
    """Milliseconds of one layer's attention, packed and dense over the same numbers, as plain calls and as the GPU
    takes (a replayed CUDA graph); how far the results differ, as a share of the dense one's norm."""
    dtype, scaling = torch.bfloat16, SIZE**-0.5
    store = filled(POLICIES[name], batch, tokens, device, dtype)
    query = torch.randn(batch, HEADS, 1, SIZE, device=device, dtype=dtype)
    keys, values = store.states()
    packed = partial(store.attended, query, scaling, None)
    dense = partial(scaled_dot_product_attention, query, keys, values, scale=scaling, enable_gqa=True)
    truth = dense().float()
    times = alternating(packed, dense, rounds, device.type)
    on_gpu: dict[str, float] = {}
    if device.type == "cuda":
        mine, theirs = graph_time([packed] * 5), graph_time([dense] * 5)  # microseconds
        on_gpu = {
            "gpu_milliseconds": round(mine / 1e3, 4),
            "gpu_dense_milliseconds": round(theirs / 1e3, 4),
            "gpu_ratio": round(mine / theirs, 3),
        }
    report(
        benchmark="kv_decode",
        policy=name,
        batch=batch,
        tokens=tokens,
        device=device.type,
        milliseconds=round(1e3 * statistics.median(times[0]), 4),
        dense_milliseconds=round(1e3 * statistics.median(times[1]), 4),
        ratio=round(ratio(*times), 3),
        **on_gpu,
        megabytes=round(sum(side.memory().bytes for side in store.sides) / 1e6, 2),
        dense_megabytes=round((keys.nbytes + values.nbytes) / 1e6, 2),
        error=float((packed().float() - truth).norm() / truth.norm()),
    )


def main() -> None:
    """All policies at the given lengths and batches; one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu tries the plain torch products, in no useful time")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no GPU is here, and packed attention is only fast on one")
        return
    with torch.inference_mode():
        for tokens in options.tokens:
            for batch in options.batch:
                for name in options.policies:
                    measure(name, batch, tokens, torch.device(options.device), options.rounds)


if __name__ == "__main__":
    main()
