"""KIVI against its paper, written as loops over groups and tokens in float64, and what its groups must hold to."""

from collections.abc import Callable

import pytest
import torch
from common import Rounds, every
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corpora.errors import UserError
from intactkv.attach import attach
from intactkv.cache import IntactLayer
from intactkv.prefix import build_prefix
from intactkv.store import Store
from quantization.kv_cache import KIVI, PerHead

pytestmark = pytest.mark.usefixtures("no_grad")

BITS = (2, 4, 8)
G, R = 8, 16


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group(x: list[float], bits: int) -> list[float]:
    """One group by the paper's formula; scale and minimum as they are stored."""
    low = float(torch.tensor(min(x)).half())
    scale = float(torch.tensor((max(x) - low) / (2**bits - 1)).half()) or 1.0
    return [low + scale * min(max(round((value - low) / scale), 0), 2**bits - 1) for value in x]


def by_hand(x: Tensor, bits: int, axis: int) -> Tensor:
    """x (B, H, T, D) in groups of G along tokens (2) or channels (3), float64."""
    flat = x.double().transpose(axis, -1).reshape(-1, G)
    rounded = torch.tensor([group(row, bits) for row in flat.tolist()], dtype=torch.float64)
    moved = x.transpose(axis, -1)
    return rounded.view(moved.shape).transpose(axis, -1)


@every("bits", BITS)
def test_keys_are_rounded_by_channel_and_values_by_token(bits: int) -> None:
    x = states(2, 3, 2 * G, 2 * G, seed=bits) * torch.tensor([0.3, 1.0, 20.0]).view(1, 3, 1, 1)
    policy = Rounds(KIVI(bits, group_size=G, residual=R))
    for rounded, axis in ((policy.keys(x), 2), (policy.values(x), 3)):
        off = (rounded.double() - by_hand(x, bits, axis)).abs()
        # A number next to a border may fall to either side in float32.
        assert float((off > 1e-4 * float(x.abs().max())).double().mean()) < 0.01


@every("bits", BITS)
def test_no_number_moves_by_more_than_half_a_step_and_the_ends_stay(bits: int) -> None:
    x = states(1, 2, 4 * G, 4 * G, seed=1)
    rounded = Rounds(KIVI(bits, group_size=G, residual=R)).values(x)
    before, after = (y.unflatten(-1, (-1, G)) for y in (x, rounded))
    step = (before.amax(-1, keepdim=True) - before.amin(-1, keepdim=True)) / (2**bits - 1)
    stored = 2**-11 * (before.abs().amax(-1, keepdim=True) + step * 2**bits)  # of scale and minimum in float16
    assert ((after - before).abs() <= step / 2 + 2 * stored).all()
    for end in (torch.amin, torch.amax):
        assert ((end(after, -1) - end(before, -1)).abs() <= 2 * stored[..., 0]).all()


@every("value", [0.0, 3.0, -0.0625, 6.1e-5])
def test_groups_of_one_value_are_exact(value: float) -> None:
    x = torch.full((1, 2, R, 2 * G), value)
    policy = Rounds(KIVI(2, group_size=G, residual=R))
    for rounded in (policy.keys(x), policy.values(x)):
        assert_close(rounded, x, rtol=2**-11, atol=0)  # the minimum is a float16


def test_a_channel_that_dwarfs_the_others_costs_their_keys_nothing() -> None:
    """What keys by channel are for; values are the other way round."""
    keys = states(1, 2, 2 * G, 2 * G)
    keys[..., 3] *= 50
    values = states(1, 2, 2 * G, 2 * G)
    values[:, :, 3] *= 50
    ours, token = Rounds(KIVI(2, group_size=G, residual=R)), Rounds(PerHead(2, group_size=G))
    others = torch.arange(2 * G) != 3
    error = {
        name: float((rounds.keys(keys) - keys)[..., others].norm()) for name, rounds in (("us", ours), ("token", token))
    }
    assert error["us"] < 0.5 * error["token"]
    moved = (ours.values(values) - values)[:, :, others].norm()
    assert float(moved) < 0.5 * float((ours.keys(values) - values)[:, :, others].norm())


def test_permuting_channels_permutes_keys_and_tokens_within_a_group_too() -> None:
    x, policy = states(1, 2, 2 * G, 2 * G), Rounds(KIVI(4, group_size=G, residual=R))
    channels = torch.randperm(2 * G, generator=torch.Generator().manual_seed(1))
    assert torch.equal(policy.keys(x[..., channels]), policy.keys(x)[..., channels])
    tokens = torch.cat([torch.randperm(G, generator=torch.Generator().manual_seed(2)) + start for start in (0, G)])
    assert torch.equal(policy.keys(x[:, :, tokens]), policy.keys(x)[:, :, tokens])


@every("packed", [False, True])
def test_how_many_tokens_are_held_rounded_depends_on_their_number_alone(packed: bool) -> None:
    policy = KIVI(2, group_size=G, residual=R)
    for chunks in ([1] * 50, [7] * 7 + [1], [50], [16, 16, 16, 2], [15, 1, 34]):
        store, total = policy.store(0, packed=packed), 0
        for count in chunks:
            store.append(states(1, 2, count, 16, seed=total), states(1, 2, count, 16, seed=total))
            total += count
            for side in store.sides:
                side.settle()
            assert (store.keys.coded, store.values.coded) == (R * (total // R), max(total - R, 0))
            assert store.length == total


def reference(q: Tensor, k: Tensor, v: Tensor, bits: int, prefix: int) -> Tensor:
    """Attention of a text token by token with the paper's rule, one query at a time, float64: (B, heads, T, D). The
    first `prefix` tokens are in no group."""
    tokens, heads = q.shape[2] - prefix, q.shape[1] // k.shape[1]
    body_k, body_v = k[:, :, prefix:], v[:, :, prefix:]
    closed = tokens // R * R
    rounded_k = torch.cat([by_hand(body_k[:, :, :closed], bits, 2), body_k[:, :, closed:].double()], 2)
    rounded_v = by_hand(body_v, bits, 3)
    out = torch.zeros(*q.shape[:2], tokens, q.shape[3], dtype=torch.float64)
    for i in range(tokens):
        keys = torch.stack([(rounded_k if i // R > j // R else body_k.double())[:, :, j] for j in range(i + 1)], 2)
        values = torch.stack([(rounded_v if i - j > R else body_v.double())[:, :, j] for j in range(i + 1)], 2)
        keys, values = (torch.cat([x[:, :, :prefix].double(), y], 2) for x, y in ((k, keys), (v, values)))
        keys, values = (x.repeat_interleave(heads, 1) for x in (keys, values))
        scores = (q[:, :, prefix + i, None].double() @ keys.transpose(2, 3)) / q.shape[3] ** 0.5
        out[:, :, i] = (scores.softmax(-1) @ values)[:, :, 0]
    return out


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("prefix", [0, 3])
def test_one_pass_is_the_papers_decoding_token_by_token(
    bits: int, prefix: int, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model("llama")
    module = model.model.layers[0].self_attn
    q, k, v = (states(1, heads, prefix + 40, 16, seed=heads) for heads in (4, 2, 3))
    v = v[:, :2]
    front = None if not prefix else (k[:, :, :prefix], v[:, :, :prefix])
    from intactkv.cache import Rows

    layer = IntactLayer(front, KIVI(bits, group_size=G, residual=R).store(0), Rows())
    read = layer.update(k[:, :, prefix:], v[:, :, prefix:])
    out, _ = ALL_ATTENTION_FUNCTIONS["intact"](module, q[:, :, prefix:], *read, None, scaling=16**-0.5)
    expected = reference(q, k, v, bits, prefix)
    far = (out.transpose(1, 2).double() - expected).abs() > 1e-4  # where a code lies on a border
    assert float(far.double().mean()) < 0.03
    final = Store(*KIVI(bits, group_size=G, residual=R).roundings(), "final")
    last = IntactLayer(front, final, Rows()).update(k[:, :, prefix:], v[:, :, prefix:])
    seen, _ = ALL_ATTENTION_FUNCTIONS["intact"](module, q[:, :, prefix:], *last, None, scaling=16**-0.5)
    assert (seen.transpose(1, 2).double() - expected).abs().max() > 0.05  # which an early query sees otherwise


def test_the_three_kinds_of_prefill(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, 100, (1, 50), generator=torch.Generator().manual_seed(3))
    prefix = build_prefix(model, torch.tensor([1, 5]))
    exact = attach(model, prefix).feed(ids).logits
    logits = {}
    for prefill in ("exact", "final", "fp"):
        intact = attach(model, prefix, KIVI(2, group_size=G, residual=R, prefill=prefill))
        cache = intact.new_cache()
        logits[prefill] = intact.feed(ids[:, :-1], cache=cache).logits
        share = cache.rounded_share
        after = intact.feed(ids[:, -1:], cache=cache).logits
        assert (share > 0) == (prefill != "fp")
        assert not torch.allclose(after, exact[:, -1:], atol=1e-3)  # decoding reads what is rounded
    assert torch.equal(logits["fp"], attach(model, prefix).feed(ids[:, :-1]).logits)
    assert_close(logits["exact"][:, :R], logits["fp"][:, :R], rtol=1e-4, atol=1e-4)  # nothing is rounded for the first
    assert not torch.allclose(logits["final"][:, :R], logits["fp"][:, :R], rtol=0.01, atol=0.01)


@every("given", [
    ({"group_size": 12}, "kv_cache.group_size=12 is not allowed; give a multiple of 8"),
    ({"residual": 40}, "kv_cache.residual=40 is not allowed; give a multiple of the 32"),
    ({"residual": 0}, "kv_cache.residual=0 is not allowed"),
    ({"prefill": "none"}, "kv_cache.prefill=none is not known; choose exact, final, fp"),
    ({"bits": 3}, "KV bits=3 is not supported by KIVI; use 2, 4, 8"),
])  # fmt: skip
def test_what_it_cannot_be_is_refused(given: tuple[dict[str, object], str]) -> None:
    told, message = given
    with pytest.raises(UserError) as refused:
        KIVI(**({"bits": 2} | told))  # type: ignore[arg-type]
    assert message in str(refused.value)
