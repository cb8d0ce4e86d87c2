"""A decoding step straight from the packed codes of a cache is the step over what they stand for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from families import random_ids
from test_store import calibrated, states
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intactkv import store
from intactkv.architecture import architecture_of
from intactkv.attach import IntactModel, attach
from intactkv.cache import IntactLayer
from intactkv.policy import Bound
from intactkv.prefix import build_prefix
from quantization.kernels import kv_attention
from quantization.kv_cache import KIVI, ClippedPerHead, PerHead, Policy, Rotated, StaticPerHead, TurboQuant, base

pytestmark = pytest.mark.usefixtures("no_grad")

P = 3
IDS = torch.cat([torch.tensor([1]), random_ids(P - 1)])
POLICIES: dict[str, Policy] = {
    "per_head": PerHead(4),
    "per_head, symmetric": PerHead(3, "gptq-sym", v_bits=2),
    "per_head, groups": PerHead(8, group_size=8, scale_dtype="float16"),
    "per_head, by token": PerHead(5, group_size=-1),
    "rotated": Rotated(4),
    "static": StaticPerHead(4, rotate_keys=True, group_size=8),
    "static, by token": StaticPerHead(4, group_size=-1),
    "clipped": ClippedPerHead(4),
    "kivi": KIVI(2, group_size=8, residual=16),
    "kivi, v4": KIVI(8, group_size=16, residual=16, v_bits=4),
    "k8v4": TurboQuant(8, v_bits=4),
    "3bit-nc": TurboQuant(3),
    "lloyd": TurboQuant(2, "lloyd", norm_correction=False, seed=3),
}


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[int]]:
    """A switch: products with codes also on a CPU, or nowhere. It gives the list of their calls."""
    calls: list[int] = []
    plain = base.attend

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(base, "attend", counted)

    def switch(on: bool) -> list[int]:
        monkeypatch.setattr(store, "DIRECT_ON", {"cpu", "cuda"} if on else set())
        return calls

    return switch


def packed(model: PreTrainedModel, policy: Policy, prefix: bool = True) -> IntactModel:
    return attach(model, build_prefix(model, IDS) if prefix else None, Bound(policy, calibrated(model, policy), True))


def steps(intact: IntactModel, first: int, padded: bool) -> Tensor:
    """The outputs of one layer for tokens from `first` to 60, one by one: two rows, two query heads for a KV head."""
    module = architecture_of(intact.model.config).blocks_of(intact.model)[0].self_attn
    keys, values, queries = (states(2, heads, 60, 16, seed=heads) for heads in (2, 2, 4))
    layer, outputs = intact.new_cache().intact_layers[0], []
    assert isinstance(layer, IntactLayer)
    layer.update(keys[:, :, :first], values[:, :, :first])
    layer.unread = None  # nothing attends to the prompt here
    front = layer.prefix_length
    for i in range(first, 60):
        part = slice(i, i + 1)
        read = layer.update(keys[:, :, part], values[:, :, part])
        assert read[0].shape == (2, 2, front + i + 1, 16)
        mask = torch.ones(2, 1, 1, front + i + 1, dtype=torch.bool) if padded else None
        if mask is not None:
            mask[0, :, :, front : front + 5] = False
        outputs.append(ALL_ATTENTION_FUNCTIONS["intact"](module, queries[:, :, part], *read, mask, scaling=0.25)[0])
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_from_codes_is_a_step_from_numbers(
    name: str, prefix: bool, padded: bool, tiny_model: Callable[..., PreTrainedModel], direct: Any
) -> None:
    intact = packed(tiny_model("llama"), POLICIES[name], prefix)
    calls = direct(False)
    truth = steps(intact, 20, padded)
    assert not calls
    direct(True)
    assert_close(steps(intact, 20, padded), truth, atol=1e-5, rtol=1e-5)
    assert len(calls) == 40


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "per_head, by token"])  # 5 bits
def test_the_kernel_reads_what_a_store_holds(
    name: str, tiny_model: Callable[..., PreTrainedModel], direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    intact = packed(tiny_model("llama"), POLICIES[name])
    direct(False)
    truth = steps(intact, 57, padded=True)
    direct(True)
    monkeypatch.setattr(base, "attend", partial(kv_attention.attend, kernel=True))
    assert_close(steps(intact, 57, padded=True), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_generation_from_codes_never_decodes_them_and_follows_the_same_text(
    name: str, tiny_model: Callable[..., PreTrainedModel], direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = POLICIES[name]
    intact = packed(tiny_model("llama"), policy)
    text = torch.cat([IDS, random_ids(40, seed=8)])[None]
    told: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

    def decoding(on: bool, **more: Any) -> Tensor:
        direct(on)
        return intact.generate(text, **told, **more, return_dict_in_generate=True, output_logits=True)

    truth = decoding(False)
    decodings: list[int] = []
    roundings = policy.store(0, calibrated(intact.model, policy).get(0)).roundings
    for kind in {next(kind for kind in type(r).__mro__ if "decode" in vars(kind)) for r in roundings}:
        monkeypatch.setattr(kind, "decode", counted(kind.decode, decodings))
    found = decoding(True)
    assert len(decodings) <= 3 * 2  # layers, keys and values: in the pass over the prompt
    told_apart = [*(found.sequences != truth.sequences)[0].tolist(), True].index(True)
    assert told_apart > text.shape[1] + 1  # a code may flip by 1e-7 of its input, and move the text
    a, b = found.logits[1], truth.logits[1]
    assert (a - b).norm() < 0.1 * b.norm()
    beams = decoding(True, num_beams=3)
    assert beams.sequences.shape == truth.sequences.shape


def counted(decode: Callable[..., Tensor], calls: list[int]) -> Callable[..., Tensor]:
    def counting(self: Any, codes: Any, places: Any) -> Tensor:
        calls.append(1)
        return decode(self, codes, places)

    return counting


@pytest.mark.parametrize("policy", [KIVI(4, group_size=8, residual=8), PerHead(4)])
def test_attention_that_gives_its_rows_decodes_the_codes(
    policy: Policy, tiny_model: Callable[..., PreTrainedModel], direct: Any
) -> None:
    model = tiny_model("llama")
    ids = random_ids(20)[None]
    for implementation, called in (("sdpa", True), ("eager", False)):
        model.set_attn_implementation(implementation)
        intact = attach(model, None, Bound(policy, packed=True))
        logits = []
        for on in (False, True):
            calls = direct(on)
            calls.clear()
            cache = intact.new_cache()
            intact.feed(ids, cache=cache)
            logits.append(intact.feed(ids[:, :1], cache=cache).logits)
            assert bool(calls) == (on and called)
        assert_close(logits[0], logits[1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("prefix", [False, True])
def test_one_token_that_nothing_follows_is_scored_as_in_numbers(
    prefix: bool, direct: Callable[[bool], list[int]], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model("llama")
    direct(True)
    row = torch.cat([IDS, torch.tensor([9])])[None] if prefix else torch.tensor([[9]])
    intact = packed(model, PerHead(4), prefix)
    assert torch.equal(intact.score(row), attach(model, intact.prefix, PerHead(4)).score(row))
