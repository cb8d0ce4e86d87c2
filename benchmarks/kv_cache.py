"""KV caches beside each other at one length: bytes, the error of the logits, and decoding speed.

    python -m benchmarks.kv_cache [--tokens 4096] [--decode 32] [--policies kivi per_head]

One full-precision pass writes the keys and values of a text; every cache is given the same ones, as after an exact
prefill, and then decodes the same following tokens, in turn, token by token. Ours keep codes (packed storage), without
and behind an intact [BOS]; beside them transformers' DynamicCache, and its QuantizedCache where quanto and hqq are
installed (`pip install optimum-quanto hqq`). The error is ‖l − l₀‖ / ‖l₀‖ over all decoded tokens, l₀ the logits of the
dense cache. Bytes are those that are held, with exact numbers counted as 16 bits, over those of a 16-bit dense cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from benchmarks.measure import report
from corpora.text import evaluation_stream, protocol
from intactkv.attach import IntactModel, attach
from intactkv.policy import Bound
from intactkv.prefix import build_prefix
from intactkv.store import Memory
from quantization.kv_cache import KV_POLICIES
from quantization.runs.opening import load_model, load_tokenizer

GROUP = 64  # of QuantizedCache, by default
Arm = tuple[Callable[[Tensor], Tensor], Callable[[], int], Any]  # logits of a token, 16-bit bytes held, the cache


def main() -> None:
    """Run all arms and print a JSON line each."""
    parser = argparse.ArgumentParser(description="KV caches at one length: bytes, error of the logits, speed.")
    parser.add_argument("--model", type=Path, default=Path("modelzoo/smollm2/smollm2-135m"))
    parser.add_argument("--tokens", type=int, default=4096, help="of the text before decoding, [BOS] included")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode, the same for all")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--policies", nargs="+", default=list(KV_POLICIES), help="of ours (default: all without text)")
    options = parser.parse_args()
    model: Any = load_model(options.model, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(options.model)
    stream = evaluation_stream(tokenizer, "sample", window=512, protocol=protocol("gptq"))
    ids = stream.ids[: options.tokens + options.decode][None]
    if ids.shape[1] < options.tokens + options.decode:
        raise SystemExit(f"error: the text has {ids.shape[1]} tokens; give fewer with --tokens")
    with torch.inference_mode():
        run(model, ids, options.tokens, options.bits, options.policies)


def run(model: Any, ids: Tensor, tokens: int, bits: list[int], policies: list[str]) -> None:
    """ids: (1, tokens + decode)."""
    dense = DynamicCache(config=model.config)
    model.model(ids[:, :tokens], past_key_values=dense, use_cache=True)
    layers: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in dense.layers]  # type: ignore[misc]
    whole = sum(x.numel() * 2 for pair in layers for x in pair)
    arms = {"dense": _theirs(model, _filled(DynamicCache(config=model.config), layers))}
    for word in policies:
        for b in bits:
            kind = KV_POLICIES[word]
            if kind.calibrates or b not in kind.allowed_bits:
                continue
            plain: dict[str, Any] = {"prefill": "fp"} if "prefill" in kind.__dataclass_fields__ else {}
            wide = plain | {"group_size": GROUP}  # whose elements take as many bits as those of QuantizedCache
            for more in (plain, wide) if word == "kivi" else (plain,):
                for prefix in (None, build_prefix(model, ids[0, :1])):
                    name = f"{word} {b} bits" + f", groups of {GROUP}" * (more is wide) + ", [B]" * (prefix is not None)
                    arms[name] = _ours(attach(model, prefix, Bound(kind(bits=b, **more), {}, packed=True)), layers)
    for backend, there in (("quanto", is_optimum_quanto_available()), ("hqq", is_hqq_available())):
        # quanto: axis 0 makes groups along tokens and channels of a head, as its users run it; hqq: its default, 1.
        axis = {"quanto": 0, "hqq": 1}[backend]
        for b in bits if there else ():
            cache = QuantizedCache(
                backend, model.config, nbits=b, axis_key=axis, axis_value=axis, q_group_size=GROUP, residual_length=128
            )
            arms[f"QuantizedCache {backend} {b} bits"] = _theirs(model, _filled(cache, layers))
    logits: dict[str, list[Tensor]] = {name: [] for name in arms}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    held = {name: arm[1]() for name, arm in arms.items()}
    for step in range(tokens, ids.shape[1]):
        for name, (decode, _, _) in arms.items():
            started = time.perf_counter()
            found = decode(ids[:, step : step + 1])
            seconds[name].append(time.perf_counter() - started)
            logits[name].append(found)
    exact = torch.stack(logits["dense"]).double()
    base = statistics.median(seconds["dense"])
    for name in arms:
        error = float((torch.stack(logits[name]).double() - exact).norm() / exact.norm())
        median = statistics.median(seconds[name])
        report(
            cache=name, tokens=tokens, times_smaller=round(whole / held[name], 2), logit_error=float(f"{error:.4g}"),
            tokens_per_second=round(1 / median, 2), seconds_over_dense=round(median / base, 2),
        )  # fmt: skip


def _filled(cache: Any, layers: list[tuple[Tensor, Tensor]]) -> Any:
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def _theirs(model: Any, cache: Any) -> Arm:
    def decode(ids: Tensor) -> Tensor:
        return model(ids, past_key_values=cache, use_cache=True).logits[0, -1]

    return decode, lambda: _bytes_of(vars(layer) for layer in cache.layers), cache


def _ours(intact: IntactModel, layers: list[tuple[Tensor, Tensor]]) -> Arm:
    cache, length = intact.new_cache(), intact.prefix_length
    for index, (keys, values) in enumerate(layers):
        cache.update(keys[:, :, length:], values[:, :, length:], index)

    def decode(ids: Tensor) -> Tensor:
        return intact.feed(ids, cache=cache).logits[0, -1]

    def held() -> int:
        told, total = cache.memory(), 0
        for side in (told["keys"], told["values"]):
            assert isinstance(side, Memory)
            total += side.codes + side.exact // 2
        prefix = told["prefix"]
        assert isinstance(prefix, int)
        return total + prefix // 2

    return decode, held, cache


def _bytes_of(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of all tensors in a structure, numbers of more than 16 bits counted as 16 (scales and exact states)."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return sum(_bytes_of(getattr(value, name), seen) for name in value.__tensor_flatten__()[0])
        return value.numel() * min(value.element_size(), 2 if value.is_floating_point() else value.element_size())
    if isinstance(value, dict):
        return sum(_bytes_of(one, seen) for one in value.values())
    if isinstance(value, list | tuple) or hasattr(value, "__next__"):
        return sum(_bytes_of(one, seen) for one in value)
    return 0


if __name__ == "__main__":
    main()
