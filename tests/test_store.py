"""What every KV policy must hold to, whatever it rounds: one pass is token by token, packed is rounded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from common import every
from families import FAMILIES, plain_logits, random_ids
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attach import IntactModel, attach
from intactkv.cache import IntactCache, IntactLayer
from intactkv.growing import ROOM, Rooms
from intactkv.policy import Bound
from intactkv.prefix import Prefix, build_prefix
from intactkv.store import Memory
from quantization.kv_cache import KIVI, KV_POLICIES, KVQuant, PerHead, Policy, TurboQuant
from quantization.kv_cache.per_head import WholeRange
from quantization.model.blocks import DecoderBlock
from quantization.model.stream import CalibrationStream

pytestmark = pytest.mark.usefixtures("no_grad")

P = 3
IDS = torch.cat([torch.tensor([1]), random_ids(P - 1)])
TEXT = random_ids(45, seed=5)
SAME = {"atol": 1e-4, "rtol": 1e-4}


@dataclass(frozen=True, eq=False)
class Recent(WholeRange):
    """Rounded once 8 newer tokens are there."""

    def rounded(self, query: int) -> int:
        """All but the 8 newest, the query's own included."""
        return max(query - 7, 0)


@dataclass(frozen=True)
class Newest(PerHead):
    """`PerHead` whose 8 newest tokens stay exact."""

    def roundings(self, tensors: Any = None) -> Any:
        """Keys and values alike."""
        return Recent(self, self.grid), Recent(self, self.v_grid)

    def bits_per_element(self, tokens: int, head_size: int, heads: int) -> tuple[float, float]:
        """16 of tokens that are exact."""
        share = max(tokens - 7, 0) / tokens  # the next token is the eighth
        keys, values = (share * b + (1 - share) * 16 for b in super().bits_per_element(tokens, head_size, heads))
        return keys, values


POLICIES: dict[str, Policy] = {
    **{f"{word}4": kind(bits=4) for word, kind in KV_POLICIES.items() if word not in ("kivi", "kvquant")},
    "per_head fp16": PerHead(3, scale_dtype="float16", v_bits=2),
    "per_head by token": PerHead(4, group_size=-1),
    "newest": Newest(3),
    "turboquant fp8": TurboQuant(8, v_bits=3),
    "turboquant lloyd": TurboQuant(2, "lloyd", norm_correction=False),
    "kivi2": KIVI(2, group_size=8, residual=16),
    "kivi4": KIVI(4, group_size=16, residual=16, v_bits=2),
    "kivi8": KIVI(8, group_size=8, residual=8),
    # Behind a prefix there are no sinks; Fisher weights need gradients.
    "kvquant4": KVQuant(bits=4, sinks=0, weighting="none"),
    "kvquant3": KVQuant(bits=3, v_bits=2, outliers=0.1, key_slots=3, sinks=0, qnorm=True, levels="nf"),
    "kvquant2": KVQuant(bits=2, outliers=0.0, sinks=0, weighting="none"),
}


# By bits, how far a small model's logits may move, as a share of them; unrelated ones are √2 away.
MOVED = {2: 1.0, 3: 0.6, 4: 0.6, 8: 0.03}


def calibrated(model: PreTrainedModel, policy: Policy) -> dict[int, dict[str, Tensor]]:
    """What the layers of a policy that calibrates have, from a little text."""
    if not policy.calibrates:
        return {}
    architecture = architecture_of(model.config)
    tensors = {}
    for index, module in enumerate(architecture.blocks_of(model)):
        stream = CalibrationStream(model, architecture, random_ids(40).view(2, 20))
        block = DecoderBlock(index, module, architecture, model.config, stream)
        tensors[index] = policy.fit_block(block)
    return tensors


@pytest.fixture
def llama(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model("llama")


def behind(model: PreTrainedModel, policy: Policy, prefix: Prefix | None, packed: bool = False) -> IntactModel:
    return attach(model, prefix, Bound(policy, calibrated(model, policy), packed))


def fed(intact: IntactModel, ids: Tensor, chunk: int) -> tuple[Tensor, IntactCache]:
    """Logits of (B, T) ids that are fed in parts, and the cache."""
    cache = intact.new_cache()
    return torch.cat([intact.feed(part, cache=cache).logits for part in ids.split(chunk, dim=1)], dim=1), cache


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(intact: IntactModel, index: int = 0) -> IntactLayer:
    layer = intact.new_cache().intact_layers[index]
    assert isinstance(layer, IntactLayer)
    return layer


@pytest.mark.parametrize("name", POLICIES)
def test_a_pass_is_token_by_token_whatever_its_parts(name: str, llama: PreTrainedModel) -> None:
    """Of the first layer, whose states nothing has rounded: later ones may flip a code by 1e-7."""
    intact = behind(llama, POLICIES[name], build_prefix(llama, IDS))
    keys, values, queries = (states(2, heads, 45, 16, seed=heads) for heads in (2, 2, 4))
    module: Any = architecture_of(llama.config).blocks_of(llama)[0].self_attn  # type: ignore[union-attr]

    def attended(chunk: int) -> tuple[Tensor, IntactLayer]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        layer, outputs = layer_of(intact), []
        for q, k, v in zip(*(x.split(chunk, dim=2) for x in (queries, keys, values)), strict=True):
            read = layer.update(k, v)
            seen, tokens = read[0].shape[2], q.shape[2]
            mask = torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens)[None, None]
            outputs.append(ALL_ATTENTION_FUNCTIONS["intact"](module, q, *read, mask, scaling=0.25)[0])
        return torch.cat(outputs, dim=1), layer

    expected, one_by_one = attended(1)
    for chunk in (3, 17, 45):
        found, layer = attended(chunk)
        assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(layer.held, one_by_one.held, strict=True):
            assert torch.equal(ours, theirs)
        assert layer.store.keys.memory() == one_by_one.store.keys.memory()
        assert layer.store.values.read == one_by_one.store.values.read


@pytest.mark.parametrize("name", POLICIES)
def test_packed_storage_gives_the_same_bits(name: str, llama: PreTrainedModel) -> None:
    for prefix in (None, build_prefix(llama, IDS)):
        fake, packed = (behind(llama, POLICIES[name], prefix, packed) for packed in (False, True))
        for chunk in (1, 17, 45):
            (expected, kept), (found, codes) = fed(fake, TEXT[None], chunk), fed(packed, TEXT[None], chunk)
            assert torch.equal(found, expected)
            for ours, theirs in zip(codes.intact_layers, kept.intact_layers, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours.held, theirs.held, strict=True))
        assert found.isfinite().all()


@pytest.mark.parametrize("name", POLICIES)
def test_bytes_of_packed_storage_are_the_closed_form(name: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    policy = POLICIES[name]
    model = tiny_model("llama").half()  # exact tokens take 16 bits
    cache = fed(behind(model, policy, build_prefix(model, IDS), packed=True), random_ids(45 * 2).view(2, 45), 45)[1]
    told = cache.memory()
    for side, bits in zip(("keys", "values"), policy.bits_per_element(45, 16, 2), strict=True):
        memory = told[side]
        assert isinstance(memory, Memory)
        assert memory.elements == 3 * 2 * 2 * 45 * 16  # layers, rows, heads, tokens, channels
        assert memory.bytes * 8 / memory.elements == pytest.approx(bits, rel=1e-12)
    assert told["prefix"] == 3 * 2 * 2 * P * 16 * 2


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_do_not_see_each_other_and_edits_follow_them(name: str, packed: bool, llama: PreTrainedModel) -> None:
    prefix = build_prefix(llama, IDS)
    intact = behind(llama, POLICIES[name], prefix, packed)
    ids = random_ids(90, seed=3).view(2, 45)
    cache = fed(intact, ids, 45)[1]
    alone = fed(intact, ids[1:], 45)[1]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
    cache.batch_select_indices(torch.tensor([2]))
    for ours, theirs, key in zip(cache.intact_layers, alone.intact_layers, prefix.keys, strict=True):
        for a, b in zip(ours.held, theirs.held, strict=True):
            assert_close(a, b, atol=0.3, rtol=0)  # a code may flip by 1e-7 of its input
            assert ((a - b).abs() > 1e-4).float().mean() < 0.05
        assert torch.equal(ours.held[0][:, :, :P], key)
    mine, its = (intact.feed(ids[1:, :1], cache=held).logits for held in (cache, alone))
    assert float((mine - its).norm() / its.norm()) < 0.2  # behind the other row: 1.5 to 1.8


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_crop_is_exact_or_refused(name: str, packed: bool, llama: PreTrainedModel) -> None:
    intact = behind(llama, POLICIES[name], None, packed)
    for kept in range(0, 45, 4):
        cache = fed(intact, TEXT[None], 45)[1]
        before = [x.clone() for layer in cache.intact_layers for x in layer.held]
        store = cache.intact_layers[0].store
        lost = any(min(r.rounded(45), kept) > r.rounded(kept) for r in store.roundings)  # `held` has settled it
        assert not (cache.is_croppable and lost)
        if lost:
            with pytest.raises(ValueError, match="rounded already"):
                cache.crop(kept - 45)
            after = [x for layer in cache.intact_layers for x in layer.held]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
            continue
        cache.crop(kept - 45)
        assert cache.get_seq_length() == kept
        if kept:
            truth = fed(intact, TEXT[None, :kept], kept)[1]
            held, expected = cache.intact_layers[0].held, truth.intact_layers[0].held
            for a, b in zip(held, expected, strict=True):
                assert ((a - b).abs() > 1e-4).float().mean() < 0.05
            assert cache.intact_layers[0].store.keys.memory() == truth.intact_layers[0].store.keys.memory()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_runs_in_every_family_or_is_refused(
    family: str, name: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model_type, overrides = FAMILIES[family]
    model, policy = tiny_model(model_type, **overrides), POLICIES[name]
    prefix = build_prefix(model, IDS)
    if "sliding_window" in overrides and layer_of(behind(tiny_model("llama"), policy, None)).store.waits:
        with pytest.raises(UserError, match=f"attends to a window of {overrides['sliding_window']} tokens"):
            behind(model, policy, prefix)
        return
    intact = behind(model, policy, prefix)
    text = torch.cat([IDS, TEXT])
    logits, truth = intact.score(text[None])[0], plain_logits(model, text)
    moved = float((logits - truth)[P:].norm() / truth[P:].norm())
    assert 0 < moved < MOVED[min(policy.bits, policy.values_bits)]
    answer = intact.generate(text[None, :20], max_new_tokens=30, min_new_tokens=30, do_sample=False)
    beams = intact.generate(text[None, :20], max_new_tokens=30, min_new_tokens=30, do_sample=False, num_beams=2)
    assert answer.shape == beams.shape == (1, 50)
    rescored = intact.score(answer)[0, 19:-1].argmax(-1)
    assert (rescored == answer[0, 20:]).float().mean() > 0.6  # a code may flip by 1e-7 of its input


@every("bits", [2, 4, 8])
def test_a_residual_longer_than_the_text_is_the_full_precision_cache(bits: int, llama: Any) -> None:
    intact = attach(llama, None, KIVI(bits, group_size=8, residual=64))
    cache = intact.new_cache()
    logits = intact.feed(TEXT[None], cache=cache).logits
    assert torch.equal(logits, attach(llama, None).feed(TEXT[None]).logits)
    assert cache.rounded_share == 0


def test_what_comes_one_by_one_is_written_into_room_and_copied_seldom() -> None:
    rooms, parts = Rooms(), [states(2, 3, n, 5, seed=n) for n in (4, 1, 1, 7, *[1] * ROOM)]
    held: Tensor | None = None
    places = []
    for i, part in enumerate(parts):
        held = rooms.joined("codes", held, part)
        assert torch.equal(held, torch.cat(parts[: i + 1], dim=2))
        places.append(held.data_ptr())
    assert len(set(places)) == 5  # the first, its room, the joined one, its room, and another when that is full
    assert held is not None
    for edited in (held[:, :, :9], held[1:, :, :9], held[:, :2]):
        part = states(*edited.shape[:2], 1, 5)
        expected = torch.cat([edited, part], dim=2)
        assert torch.equal(rooms.joined("codes", edited, part), expected)
    with torch.inference_mode():
        held = rooms.joined("codes", held, parts[1])
    assert torch.equal(rooms.joined("codes", held, parts[2])[:, :, -1:], parts[2])


def test_a_padded_batch_is_refused_where_tokens_share_a_grid(llama: PreTrainedModel) -> None:
    intact = attach(llama, None, KIVI(2, group_size=8, residual=16))
    rows = [random_ids(20), random_ids(30, seed=2)]
    ids, mask = torch.zeros(2, 30).long(), torch.zeros(2, 30).long()
    for i, row in enumerate(rows):
        ids[i, 30 - len(row) :], mask[i, 30 - len(row) :] = row, 1
    for i, logits in enumerate(intact.score(ids, mask)):  # rows of one length share a batch
        assert_close(logits[mask[i].bool()], intact.score(rows[i][None])[0], **SAME)
    with pytest.raises(UserError, match="pads"):
        intact.generate(ids, attention_mask=mask, max_new_tokens=3)


def test_bytes_behind_a_prefix_have_no_sinks_that_stand_in_it(llama: PreTrainedModel) -> None:
    policy, prefix = KVQuant(4, weighting="none", sinks=2), build_prefix(llama, IDS[:1])
    tensors = calibrated(llama, policy)
    intact = attach(llama, prefix, Bound(policy, tensors, True))
    cache = fed(intact, TEXT[None], 45)[1]
    told = intact.kv_figures(45)
    assert told is not None
    for side, bits in zip(("keys", "values"), told["bits_per_element"], strict=True):
        memory = cache.memory()[side]
        assert isinstance(memory, Memory)
        assert memory.bytes * 8 / memory.elements == pytest.approx(bits, rel=1e-12)


def test_no_room_is_made_for_tokens_that_never_come(llama: PreTrainedModel) -> None:
    policy = KVQuant(4, weighting="none", sinks=1)
    cache = fed(attach(llama, None, Bound(policy, calibrated(llama, policy), True)), TEXT[None], 1)[1]
    for layer in cache.intact_layers:
        for side in layer.store.sides:
            assert side.codes["sinks"].untyped_storage().nbytes() == 2 * 16 * 4  # KV heads, channels, float32


def test_packed_storage_in_a_window_is_refused_before_anything_is_calibrated(tiny_model: Any) -> None:
    config = tiny_model("mistral", sliding_window=16).config
    with pytest.raises(UserError, match="attends to a window of 16 tokens"):
        IntactCache(config, policy=Bound(KV_POLICIES["static"](bits=4), {}, True))
