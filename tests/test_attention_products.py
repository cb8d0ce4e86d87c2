"""Attention's products: queries and softmax rows on their grids, against a slow formula, whatever the cache holds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, random_ids
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corpora.errors import UserError
from intactkv.attach import attach
from intactkv.attention import ROWS
from intactkv.prefix import build_prefix
from quantization.grids.uniform import UniformGrid
from quantization.kv_cache import PerHead
from quantization.model.attention import AttentionProducts

SPY = "products_compared"
PREFIX = torch.tensor([1, 40, 7])
WINDOW = 8  # of the sliding layers: the prefix leaves it


pytestmark = pytest.mark.usefixtures("no_grad")


def plain_grid(x: Tensor, bits: int) -> Tensor:
    """x (n,) on the asymmetric grid of its own range with 0 in it, float64."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    if high == low:
        return x
    step = (high - low) / (2**bits - 1)
    zero = round(-low / step)
    return ((x / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step


def plain_products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, bits: int, kept: int
) -> Tensor:
    """One query, one row, one product at a time: (B, T, heads, D), float64. kept: columns that are not rounded."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]  # the KV head that this query head reads
            for t in range(q.shape[2]):
                scores = k[b, shared] @ plain_grid(q[b, head, t], bits) * scaling
                if mask is not None:
                    scores = scores + mask[b, 0, t].double()
                row = scores.softmax(-1)
                row = torch.cat([row[:kept], plain_grid(row[kept:], bits)])
                out[b, t, head] = row @ v[b, shared]
    return out


def installed(model: PreTrainedModel, bits: int = 4) -> PreTrainedModel:
    AttentionProducts(UniformGrid(bits)).install(model)
    return model


def close(ours: Tensor, expected: Tensor) -> bool:
    """Equal up to float32, but for a value in thousands that lies on a rounding border."""
    far = (ours.double() - expected.double()).abs() > 1e-4 * expected.abs().max()
    return float(far.double().mean()) < 5e-3


# the formula ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("behind", [False, True], ids=["without a prefix", "behind a prefix"])
def test_every_layer_computes_the_plain_formula(
    family: str, bits: int, behind: bool, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model_type, overrides = FAMILIES[family]
    model = tiny_model(model_type, **overrides)
    prefix = build_prefix(model, PREFIX) if behind else None
    compared: list[float] = []

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        out, rows = ALL_ATTENTION_FUNCTIONS[ROWS](module, q, k, v, mask, **options)
        kept = 3 if behind else 0
        assert close(out, plain_products(q, k, v, mask, options["scaling"], bits, kept))
        if bits == 3:  # and it is not the formula of a full-precision, or of a wholly quantized row
            assert not close(out, plain_products(q, k, v, mask, options["scaling"], 16, kept))
            assert not close(out, plain_products(q, k, v, mask, options["scaling"], bits, 3 - kept))
        compared.append(float(rows.sum()))
        return out, rows

    AttentionInterface.register(SPY, spy)
    AttentionMaskInterface.register(SPY, eager_mask)
    installed(model, bits).set_attn_implementation(SPY)
    attach(model, prefix, PerHead(4)).feed(random_ids(10)[None])
    assert len(compared) == 3


@pytest.mark.parametrize("bits", [2, 4])
def test_the_columns_of_the_prefix_keep_full_precision(bits: int, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = installed(tiny_model("llama"), bits)
    intact = attach(model, build_prefix(model, PREFIX))
    seen: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(lambda _module, _args, out: seen.append(out[1]))
    intact.feed(random_ids(12)[None])
    for rows in seen:
        of_prefix, others = rows[..., :3].flatten(), rows[0, :, :, 3:].flatten(0, 1)
        assert len(of_prefix.unique()) > 0.9 * len(of_prefix)
        assert all(len(row.unique()) <= 2**bits for row in others)


def test_keys_and_values_are_the_policys_alone(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """In the first layer, whose input nothing has rounded, the cache holds what it holds without the products."""
    model = tiny_model("llama")
    prefix = build_prefix(model, PREFIX)
    ids = random_ids(12)[None]
    held = []
    for _ in range(2):
        intact = attach(model, prefix, PerHead(4))
        cache = intact.new_cache()
        intact.feed(ids, cache=cache)
        held.append(cache.intact_layers[0].held)
        installed(model)
    assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))
    assert torch.equal(held[0][0][:, :, :3], prefix.keys[0])


# passes that must agree -----------------------------------------------------------------------------------------------


def small_windows(family: str) -> dict[str, Any]:
    overrides = dict(FAMILIES[family][1])
    if "sliding_window" in overrides:
        overrides["sliding_window"] = WINDOW
    return overrides


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefixed", [False, True], ids=["without a prefix", "behind a prefix"])
def test_tokens_one_at_a_time_are_the_whole_text_at_once(
    family: str, prefixed: bool, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    """Also where a sliding window leaves the prefix behind, token by token.

    In float64, and but for one token: sums over fewer columns differ in the last bit, which may move a code.
    """
    model = tiny_model(FAMILIES[family][0], **small_windows(family)).double()
    intact = attach(installed(model, 4), build_prefix(model, PREFIX) if prefixed else None, PerHead(8))
    ids = random_ids(14)[None]
    whole = intact.feed(ids).logits[0]
    cache = intact.new_cache()
    first = intact.feed(ids[:, :2], cache=cache).logits[0, -1]
    steps = [first, *(intact.feed(token, cache=cache).logits[0, -1] for token in ids[:, 2:].split(1, dim=1))]
    assert sum(not close(step, at_once) for step, at_once in zip(steps, whole[1:], strict=True)) <= 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family: str, side: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model_type, overrides = FAMILIES[family]
    model = tiny_model(model_type, **overrides)
    intact = attach(installed(model, 6), build_prefix(model, PREFIX), PerHead(6))
    short, long = random_ids(5), random_ids(11, seed=1)
    pads = torch.zeros(6, dtype=torch.long)
    padded = torch.stack([torch.cat([pads, short] if side == "left" else [short, pads]), long])
    mask = torch.ones_like(padded)
    where = slice(6, 11) if side == "left" else slice(0, 5)
    mask[0] = 0
    mask[0, where] = 1
    both = intact.score(padded, mask)
    assert close(both[0, where], intact.score(short[None])[0])
    assert close(both[1], intact.score(long[None])[0])


def test_generation_reads_the_same_rows_as_scoring(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("mistral", sliding_window=WINDOW)
    intact = attach(installed(model, 8), build_prefix(model, PREFIX), PerHead(8))
    prompt = torch.cat([PREFIX, random_ids(6)])[None]
    out = intact.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=-1)
    logits = intact.feed(out[:, 3:]).logits[0]
    assert out[0, 9:].tolist() == logits[5:-1].argmax(-1).tolist()


def test_a_model_without_any_cache_runs(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = installed(tiny_model("llama"), 8)
    ids = random_ids(12)[None]
    assert torch.equal(model(ids, use_cache=False).logits, attach(model, None).feed(ids).logits)


def test_a_prefix_is_trained_through_the_grids_as_if_they_were_not_there(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    """With 8 bits the gradient is nearly that of the full-precision products; rounding alone would have none."""
    ids = random_ids(12)[None]

    def gradient(model: PreTrainedModel) -> Tensor:
        prefix = build_prefix(model, PREFIX)
        with torch.enable_grad():
            keys = tuple(x.clone().requires_grad_() for x in prefix.keys)
            trained = replace(prefix, keys=keys)
            attach(model, trained).feed(ids).logits.logsumexp(-1).sum().backward()
        assert all(key.grad is not None for key in keys)
        return torch.cat([key.grad.flatten() for key in keys if key.grad is not None])

    exact, ours = gradient(tiny_model("llama")), gradient(installed(tiny_model("llama"), 8))
    assert float((ours - exact).norm() / exact.norm()) < 0.1


# in a recipe ----------------------------------------------------------------------------------------------------------


def test_more_bits_are_nearer_to_full_precision(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = tiny_model("llama"), random_ids(30)[None]
    exact = model(ids).logits
    errors = [float((installed(model, bits)(ids).logits - exact).norm()) for bits in (3, 5, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_groups_of_channels_are_refused() -> None:
    with pytest.raises(UserError, match=r"attention\.grid\.group_size=16 is not allowed.*-1"):
        AttentionProducts(UniformGrid(8, 16))
