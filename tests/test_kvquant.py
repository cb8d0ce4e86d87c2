"""KVQuant's cache against the paper's formula in float64, and its laws in models of every family."""

import hashlib
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import every
from families import FAMILIES, random_ids
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attach import IntactModel, attach
from intactkv.cache import IntactCache
from intactkv.observe import outputs_of
from intactkv.policy import Bound
from intactkv.prefix import Prefix, build_prefix
from intactkv.rope import Places, Rope, ropes_of
from quantization.kv_cache import KV_POLICIES, KVQuant
from quantization.kv_cache.fisher import gradients_of, squared_gradients
from quantization.model.blocks import DecoderBlock
from quantization.model.stream import CalibrationStream

HEADS, SIZE = 4, 16  # of the states that are not a model's: 64 channels
BITS = [2, 3, 4]
SEGMENTS = torch.stack([random_ids(24, seed=20 + i) for i in range(3)])
TEXT = random_ids(40, seed=5)
SCALED = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(bits: int, v_bits: int | None = None, channels: int = HEADS * SIZE, seed: int = 0) -> dict[str, Tensor]:
    """What a calibration might have found for states of spread 1."""
    random = torch.Generator().manual_seed(seed)

    def levels(bits: int) -> Tensor:
        return (torch.rand(2**bits, generator=random) * 2 - 1).sort().values

    low, high = (sign * (1 + torch.rand(channels, generator=random)) for sign in (-1, 1))
    return {"keys_low": low, "keys_high": high, "keys_levels": levels(bits), "values_levels": levels(v_bits or bits)}


def places(first: int, count: int, pads: Tensor | None = None, prefix: int = 0) -> Places:
    return Places(first, count, pads, Rope(10000.0 ** -(torch.arange(0, SIZE, 2) / SIZE), 1.0))


def turned(key: "np.ndarray", position: int, back: bool = False) -> "np.ndarray":
    """RoPE of one head's key in float64: channel pairs (i, i + D/2) as complex numbers."""
    half = len(key) // 2
    angle = position * 10000.0 ** -(np.arange(half) / half)
    pair = (key[:half] + 1j * key[half:]) * np.exp(-1j * angle if back else 1j * angle)
    return np.concatenate([pair.real, pair.imag])


def loop(x: Tensor, found: Mapping[str, Tensor], side: str, share: float, sinks: int, first: int) -> Tensor:
    """The paper's rules for one token after another, in float64; nothing is capped."""
    levels = found[f"{side}_levels"].double().numpy()
    scale, offset = found.get(f"{side}_qnorm", torch.tensor([1.0, 0.0])).double().numpy()
    result, t = x.double().numpy().copy(), 1 - share / 2
    for row in range(x.shape[0]):
        for token in range(sinks, x.shape[2]):
            heads = x[row, :, token].double().numpy()
            if side == "keys":
                heads = np.stack([turned(head, first + token, back=True) for head in heads])
            y = heads.ravel()
            if side == "keys":
                low, high = (found[f"keys_{end}"].double().numpy() for end in ("low", "high"))
                out = (y < low) | (y > high)
                middle, half = (high + low) / 2, (high - low) / 2
            else:
                out = (y <= np.quantile(y, 1 - t)) | (y >= np.quantile(y, t)) if share else np.zeros(len(y), bool)
                inner = np.where(out, np.median(y), y)
                middle = float(torch.tensor((inner.max() + inner.min()) / 2).half())
                half = float(torch.tensor((inner.max() - inner.min()) / 2).half())
            codes = np.abs(((y - middle) / half)[:, None] - levels).argmin(1)
            decoded = (levels[codes] * scale + offset) * half + middle
            kept = torch.tensor(y).half().double().numpy()
            heads = np.where(out, kept, decoded).reshape(heads.shape)
            if side == "keys":
                heads = np.stack([turned(head, first + token) for head in heads])
            result[row, :, token] = heads
    return torch.tensor(result)


@every("bits", BITS)
@every("share", [0.0, 0.01, 0.1])
@every("qnorm", [False, True])
def test_keys_and_values_follow_the_formula(bits, share, qnorm):
    policy, found = KVQuant(bits=bits, outliers=share, key_slots=HEADS * SIZE), tensors(bits)
    if not share:
        found |= {"keys_low": torch.full((64,), -9.0), "keys_high": torch.full((64,), 9.0)}
    if qnorm:
        found |= {"keys_qnorm": torch.tensor([1.1, 0.05]), "values_qnorm": torch.tensor([0.9, -0.1])}
    for rounding, side in zip(policy.roundings(found), ("keys", "values"), strict=True):
        x = states(2, HEADS, 9, SIZE, seed=bits)
        # No number of this seed lies within float32's precision of a border.
        expected = loop(x, found, side, share, sinks=1, first=0).float()
        assert_close(rounding.numbers(x, places(0, 9)), expected, rtol=1e-4, atol=1e-4)


def test_bits_of_values_may_be_others_than_those_of_keys():
    keys, values = KVQuant(bits=4, v_bits=2).roundings(tensors(4, 2))
    x = states(1, HEADS, 5, SIZE)
    assert keys.encode(x, places(3, 5))["codes"].shape[-1] == SIZE // 2
    assert values.encode(x, places(3, 5))["codes"].shape[-1] == SIZE // 4


@every("bits", BITS)
@every("share", [0.0, 0.01, 0.1])
@every("sinks", [0, 1, 5])
def test_codes_decode_to_the_rounded_numbers_bit_for_bit_and_take_the_bytes_that_are_promised(bits, share, sinks):
    policy, x = KVQuant(bits=bits, outliers=share, sinks=sinks), states(2, HEADS, 12, SIZE)
    promised = policy.bits_per_element(12, SIZE, HEADS)
    for rounding, bits_each in zip(policy.roundings(tensors(bits)), promised, strict=True):
        codes = rounding.encode(x, places(0, 12))
        assert torch.equal(rounding.decode(codes, places(0, 12)), rounding.numbers(x, places(0, 12)))
        assert 8 * sum(part.nbytes for part in codes.values()) == pytest.approx(bits_each * x.numel())


@every(("channels", "keys", "values"), [(1024, 2.375, 2.40625), (4096, 2 + 42 * 32 / 4096, 2 + (42 * 32 + 32) / 4096)])
def test_two_bits_and_one_percent_of_outliers_take_what_the_paper_says(channels, keys, values):
    assert KVQuant(bits=2, sinks=0).bits_per_element(2048, 128, channels // 128) == (keys, values)
    assert KVQuant(bits=2, sinks=0, outliers=0.0).bits_per_element(9, 128, channels // 128) == (2, 2 + 32 / channels)


@every("share", [0.0, 0.1])
def test_chunks_of_any_size_store_the_same_bits(share):
    policy, x = KVQuant(bits=3, outliers=share, sinks=4), states(2, HEADS, 21, SIZE)
    for rounding in policy.roundings(tensors(3)):
        whole = rounding.encode(x, places(0, 21))
        for size in (1, 3, 17):
            parts = [rounding.encode(x[:, :, i : i + size], places(i, min(size, 21 - i))) for i in range(0, 21, size)]
            for name, stored in whole.items():
                assert torch.equal(torch.cat([part[name] for part in parts], 2), stored), (name, size)


def test_a_single_token_is_rounded_like_any_other():
    """The published code takes the first row of every call for a sink: one by one, no token is ever rounded there."""
    x = states(1, HEADS, 1, SIZE)
    for rounding in KVQuant(bits=4).roundings(tensors(4)):
        assert torch.equal(rounding.numbers(x, places(0, 1)), x)
        assert not torch.equal(rounding.numbers(x, places(1, 1)), x)


def test_sinks_are_the_first_tokens_of_every_row_whatever_pads_stand_in_front():
    pads, sinks = torch.tensor([0, 3, 6]), 2
    x = states(3, HEADS, 10, SIZE)
    for rounding in KVQuant(bits=2, sinks=sinks).roundings(tensors(2)):
        at = places(0, 10, pads)
        codes = rounding.encode(x, at)
        rounded = rounding.decode(codes, at)
        for row, count in enumerate(pads.tolist()):
            exact = (rounded[row] == x[row]).all(-1).all(0)
            assert exact[count:].tolist() == [True] * sinks + [False] * (10 - count - sinks)
            alone = rounding.numbers(x[row : row + 1, :, count:], places(0, 10 - count))
            assert torch.equal(rounded[row : row + 1, :, count:], alone)


@every("prefix", [1, 2, 5])
def test_a_prefix_takes_the_place_of_as_many_sinks(prefix):
    x = states(1, HEADS, 4, SIZE)
    for rounding in KVQuant(bits=2, sinks=2).roundings(tensors(2)):
        exact = (rounding.numbers(x, places(prefix, 4, prefix=prefix)) == x).all(-1).all(1)[0]
        assert int(exact.sum()) == max(2 - prefix, 0)


def test_sixteen_bit_outliers_come_back_exactly():
    x = (10 * states(1, HEADS, 8, SIZE)).bfloat16().float()
    rounded = KVQuant(bits=2, outliers=0.1).roundings(tensors(2))[1].numbers(x, places(5, 8))
    y, back = (part.transpose(1, 2).flatten(2)[0] for part in (x, rounded))
    for token, after in zip(y, back, strict=True):
        outer = torch.cat([token.topk(4).indices, (-token).topk(4).indices])  # ⌈0.05 · 63⌉ a side
        assert torch.equal(after[outer], token[outer])


@every("bits", BITS)
def test_a_gradient_passes_as_if_nothing_were_rounded(bits, tiny_config):
    cache = IntactCache(
        tiny_config("llama"), policy=Bound(KVQuant(bits=bits), dict.fromkeys(range(3), tensors(bits, None, 32)))
    )
    x = states(1, 2, 6, 16).requires_grad_()
    keys, values = cache.update(x, 2 * x, 0)
    (keys.sum() + values.sum()).backward()
    assert_close(x.grad, torch.full_like(x, 3.0))


# Refusals -------------------------------------------------------------------------------------------------------------


@every(("fields", "message"), [
    ({"bits": 5}, "KV bits=5 is not supported; use 2 to 4"),
    ({"bits": 1}, "KV bits=1 is not supported"),
    ({"bits": 4, "v_bits": 8}, "KV bits=8 is not supported"),
    ({"bits": 4, "outliers": -0.1}, r"outliers=-0\.1 is not allowed; give a share in \[0, 0\.5\)"),
    ({"bits": 4, "outliers": 0.5}, r"outliers=0\.5 is not allowed"),
    ({"bits": 4, "levels": "even"}, "levels=even is not known; choose nuq, uniform, nf"),
    ({"bits": 4, "weighting": "hessian"}, "weighting=hessian is not known; choose none, fisher, fisher_range"),
    ({"bits": 4, "sinks": -1}, "sinks=-1 is not allowed; give 0 or more"),
    ({"bits": 4, "key_slots": -1}, "key_slots=-1 is not allowed"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        KVQuant(**fields)


def test_heads_whose_codes_do_not_fill_bytes_are_refused():
    with pytest.raises(UserError, match="eight channels of a head together, and this model's have 12"):
        KVQuant(bits=3).in_heads(12)


def test_levels_that_do_not_depend_on_the_text_need_no_gradients_of_it():
    assert KVQuant(bits=4).needs_gradients
    for policy in (KVQuant(bits=4, levels="nf"), KVQuant(bits=4, weighting="none")):
        assert not policy.needs_gradients
    assert KVQuant(bits=4, levels="nf").in_heads(64) == KVQuant(bits=4, levels="nf", weighting="none")
    assert KVQuant(bits=4).in_heads(64) == KVQuant(bits=4)


def test_the_policy_has_a_name_and_says_where_it_rounds():
    assert KV_POLICIES["kvquant"] is KVQuant
    assert KVQuant.space == "pre_rope"
    assert KVQuant.calibrates


# Calibration ----------------------------------------------------------------------------------------------------------


def blocks_of(
    model: PreTrainedModel, behind: Tensor | None = None, folder: Path | None = None
) -> Iterator[DecoderBlock]:
    """Every block of a loaded model, with the text in front of it."""
    architecture = architecture_of(model.config)
    stream = CalibrationStream(model, architecture, SEGMENTS, behind)
    for index, module in enumerate(architecture.blocks_of(model)):
        block = DecoderBlock(index, module, architecture, model.config, stream)
        if folder is not None:
            block = replace(block, squared_gradients=load_file(folder / f"layer-{index:03d}.safetensors"))
        stream.seed(block)
        yield block
        stream.advance(block)


def unweighted(**fields: Any) -> KVQuant:
    """Without Fisher weights, which need a pass of their own."""
    return KVQuant(weighting="none", **fields)


def calibrated(model: PreTrainedModel, policy: KVQuant, behind: Tensor | None = None, folder: Path | None = None):
    return {block.index: policy.fit_block(block) for block in blocks_of(model, behind, folder)}


def behind_policy(model: PreTrainedModel, policy: KVQuant, prefix: Prefix | None = None) -> IntactModel:
    return attach(model, prefix, Bound(policy, calibrated(model, policy, None if prefix is None else prefix.ids)))


def linear_outputs(model: PreTrainedModel, which: str) -> list[Tensor]:
    """What RoPE receives as keys (behind k_norm, where there is one), or v_proj's outputs, by layer: (N, C)."""
    architecture = architecture_of(model.config)
    name = architecture.rope_key if which == "keys" else architecture.value
    found = []
    for block in architecture.blocks_of(model):
        with outputs_of([block.get_submodule(name)]) as seen:
            model(SEGMENTS)
        found.append(seen[0].flatten(0, 1).flatten(1))
    return found


@pytest.fixture(params=[*FAMILIES, "llama3", "yarn"])
def model(request, tiny_model):
    if request.param in FAMILIES:
        model_type, overrides = FAMILIES[request.param]
        return tiny_model(model_type, **overrides)
    return tiny_model("llama", rope_parameters=SCALED[request.param])


def test_thresholds_are_percentiles_of_what_rope_receives(model):
    found = calibrated(model, unweighted(bits=3, outliers=0.1, sinks=0))
    for layer, keys in enumerate(linear_outputs(model, "keys")):
        low, high = (np.percentile(keys.double(), 100 * q, axis=0) for q in (0.05, 0.95))
        assert_close(found[layer]["keys_low"].double(), torch.tensor(low), rtol=1e-4, atol=1e-4)
        assert_close(found[layer]["keys_high"].double(), torch.tensor(high), rtol=1e-4, atol=1e-4)
        assert found[layer]["keys_levels"].shape == (8,)


def test_calibration_leaves_out_sinks_and_runs_behind_a_prefix(tiny_model):
    model = tiny_model("llama")
    without, first = (calibrated(model, unweighted(bits=2, outliers=0.0, sinks=sinks))[0] for sinks in (0, 3))
    keys = linear_outputs(model, "keys")[0].view(3, 24, -1)
    assert_close(without["keys_high"], keys.amax((0, 1)), rtol=1e-4, atol=1e-4)
    assert_close(first["keys_high"], keys[:, 3:].amax((0, 1)), rtol=1e-4, atol=1e-4)
    behind = calibrated(model, unweighted(bits=2, outliers=0.0, sinks=2), behind=torch.tensor([1, 7]))[0]
    assert_close(behind["keys_high"], keys.amax((0, 1)), rtol=1e-4, atol=1e-4)  # of the first block: no mixing yet


def test_gradients_are_those_that_autograd_gives_the_projections(model, tmp_path):
    architecture = architecture_of(model.config)
    files = squared_gradients(model, SEGMENTS, None, tmp_path)
    assert sorted(tmp_path.iterdir()) == files
    for file, block in zip(files, architecture.blocks_of(model), strict=True):
        ours = {name: x.float() for name, x in load_file(file).items()}
        for name, path in (("keys", architecture.rope_key), ("values", architecture.value)):
            assert ours[name].shape[0] == len(SEGMENTS)
            for sample, ids in enumerate(SEGMENTS):
                with torch.enable_grad(), outputs_of([block.get_submodule(path)]) as held:
                    handle = block.get_submodule(path).register_forward_hook(lambda m, a, out: out.requires_grad_())
                    logits = model(ids[None]).logits[0]
                    loss = nn.functional.cross_entropy(logits[:-1], ids[1:])
                    (expected,) = torch.autograd.grad(loss, held)
                    handle.remove()
                expected = expected.reshape(len(ids), -1).square()
                # bfloat16 has 8 bits.
                assert_close(
                    ours[name][sample].transpose(0, 1).flatten(1),
                    expected,
                    rtol=1e-2,
                    atol=1e-5 * float(expected.max()),
                )


def test_gradients_behind_a_prefix_are_those_of_the_whole_text(tiny_model):
    model, lead = tiny_model("qwen3"), torch.tensor([1, 7, 9])
    behind = gradients_of(attach(model, build_prefix(model, lead)), TEXT)
    whole, tail = torch.cat([lead, TEXT]), len(TEXT) - 1
    architecture = architecture_of(model.config)
    names = (architecture.rope_key, architecture.value)
    modules = [block.get_submodule(name) for block in architecture.blocks_of(model) for name in names]
    handles = [module.register_forward_hook(lambda m, a, out: out.requires_grad_()) for module in modules]
    with torch.enable_grad(), outputs_of(modules) as held:
        logits = model(whole[None]).logits[0, 3:-1]
        expected = torch.autograd.grad(nn.functional.cross_entropy(logits, TEXT[1:]), held)
    for handle in handles:
        handle.remove()
    assert tail == len(logits)
    for ours, theirs in zip([x for pair in behind for x in pair], expected, strict=True):
        assert ours.shape == (1, 2, len(TEXT), 16)
        assert_close(ours[0].transpose(0, 1).flatten(1), theirs.reshape(len(whole), -1)[3:], rtol=1e-3, atol=1e-5)


def test_weights_of_the_text_change_levels_and_nothing_else(tiny_model, tmp_path):
    model = tiny_model("llama")
    squared_gradients(model, SEGMENTS, None, tmp_path)
    plain, fisher, ranged = (
        calibrated(model, KVQuant(bits=2, weighting=word), folder=tmp_path)[1]
        for word in ("none", "fisher", "fisher_range")
    )
    for name in ("keys_low", "keys_high"):
        assert torch.equal(plain[name], fisher[name])
        assert torch.equal(plain[name], ranged[name])
    for name in ("keys_levels", "values_levels"):
        assert (plain[name] - fisher[name]).abs().max() > 1e-3
        assert (ranged[name] - fisher[name]).abs().max() > 1e-3


@pytest.fixture
def file(tmp_path, tiny_model):
    """A quantizer file as the published code makes it for a tiny LLaMA of 3 layers and 32 channels, 3 bits."""
    architecture = architecture_of(tiny_model("llama").config)
    content: dict[str, tuple[Any, ...]] = {}
    for layer in range(3):
        found = tensors(3, None, 32, seed=layer)
        for linear, levels in ((architecture.rope_key, "keys_levels"), (architecture.value, "values_levels")):
            entry = (found["keys_high"][None], found["keys_low"][None], [found[levels].flip(0)[:, None].numpy()])
            content[f"{architecture.block_name(layer)}.{linear}"] = entry
    path = tmp_path / "quantizers.pickle"
    path.write_bytes(pickle.dumps(content))
    return path


def test_a_quantizer_file_takes_the_place_of_calibration(tiny_model, file):
    policy = KVQuant(bits=3, file=str(file)).in_heads(16)
    assert policy.file_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not policy.needs_gradients
    for layer, found in calibrated(tiny_model("llama"), policy).items():
        expected = tensors(3, None, 32, seed=layer)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_quantizer_file_of_another_model_or_other_bits_or_that_changed_is_refused(tiny_model, file):
    for bits, sizes, message in (
        (2, {}, "has 8 levels of keys, and 2 bits make 4"),
        (3, {"num_hidden_layers": 2}, "has 3 layers, and this model has 2"),
        (3, {"num_key_value_heads": 4}, "has keys of 32 channels, and this model's have 64"),
    ):
        with pytest.raises(UserError, match=message):
            calibrated(tiny_model("llama", **sizes), KVQuant(bits=bits, file=str(file)))
    policy = KVQuant(bits=3, file=str(file)).in_heads(16)
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UserError, match="has changed since it was named"):
        policy.in_heads(16)
    with pytest.raises(UserError, match="is missing"):
        KVQuant(bits=3, file=f"{file}.no").in_heads(16)


def test_weights_by_gradients_that_nobody_computed_are_refused(tiny_model):
    with pytest.raises(UserError, match="weighting=fisher needs gradients of the loss"):
        calibrated(tiny_model("llama"), KVQuant(bits=3))


# In a model -----------------------------------------------------------------------------------------------------------


@every("bits", BITS)
def test_what_is_rounded_is_what_rope_receives(bits, tiny_model):
    """Keys that are all outliers come back in 16 bits, whatever their levels: the rotation is undone and redone."""
    model = tiny_model("qwen3")
    found = calibrated(model, policy := unweighted(bits=bits, key_slots=10**6, sinks=0))
    for layer in found.values():
        layer["keys_low"], layer["keys_high"] = torch.full((32,), 1e6), torch.full((32,), 1e6 + 1)  # all lie below
    plain = attach(model, None).new_cache()
    model(TEXT[None], past_key_values=plain)
    keys = policy.roundings(found[0])[0].numbers(
        plain.intact_layers[0].held[0], Places(0, len(TEXT), None, ropes_of(model.config)[0])
    )
    assert_close(keys, plain.intact_layers[0].held[0], rtol=2e-3, atol=2e-3)


def one_by_one(intact: IntactModel, chunks: int) -> Tensor:
    cache = intact.new_cache()
    return torch.cat([intact.feed(part[None], cache=cache).logits[0] for part in TEXT.split(chunks)])


@pytest.mark.parametrize("arm", ["none", "sinks", "prefix"])
def test_one_pass_is_token_by_token(model, arm):
    model = model.double()  # float32 sums in another order would flip a code here and there
    prefix = build_prefix(model, torch.tensor([1, 7, 9])) if arm == "prefix" else None
    intact = behind_policy(model, unweighted(bits=4, sinks={"none": 0, "sinks": 2, "prefix": 0}[arm]), prefix)
    whole = intact.feed(TEXT[None]).logits[0]
    for chunks in (1, 3, 17):
        assert_close(one_by_one(intact, chunks), whole, rtol=1e-5, atol=1e-5)
    rounded = (whole - attach(model, prefix).feed(TEXT[None]).logits[0]).norm() / whole.norm()
    assert rounded > 1e-2


def test_packed_storage_gives_the_same_logits_bit_for_bit(model):
    policy = unweighted(bits=3, sinks=2)
    found = calibrated(model, policy)
    if attach(model, None).new_cache().smallest_window is not None:
        with pytest.raises(UserError, match="without packed storage"):
            attach(model, None, Bound(policy, found, True))
        return
    fake, packed = (attach(model, None, Bound(policy, found, packed)) for packed in (False, True))
    assert torch.equal(one_by_one(packed, 7), one_by_one(fake, 7))


def test_as_many_sinks_as_a_prefix_has_tokens_are_that_prefix_on_exact_weights(model):
    lead, policy = torch.tensor([1, 7, 9]), unweighted(bits=2, sinks=3)
    prefix = build_prefix(model, lead)
    found = calibrated(model, policy, lead)
    sinks = attach(model, None, Bound(policy, found)).feed(torch.cat([lead, TEXT])[None]).logits[0, 3:]
    behind = attach(model, prefix, Bound(policy, found)).feed(TEXT[None]).logits[0]
    assert (sinks - behind).norm() < 1e-2 * behind.norm()


def test_padded_rows_are_rounded_as_they_are_alone(model):
    policy, rows = unweighted(bits=4, sinks=1), [random_ids(5, seed=4), random_ids(11, seed=9)]
    intact = behind_policy(model, policy)
    ids, mask = torch.zeros(2, 11).long(), torch.zeros(2, 11).long()
    for i, row in enumerate(rows):
        ids[i, 11 - len(row) :], mask[i, 11 - len(row) :] = row, 1
    for logits, keep, row in zip(intact.score(ids, mask), mask.bool(), rows, strict=True):
        alone = intact.score(row[None])[0]
        assert (logits[keep] - alone).norm() < 0.02 * alone.norm()


def test_fewer_bits_and_no_outliers_err_more_and_all_of_it_is_quantized(tiny_model):
    model = tiny_model("llama")
    truth = attach(model, None).feed(TEXT[None]).logits[0]

    def error(policy: KVQuant) -> float:
        cache = (intact := behind_policy(model, policy)).new_cache()
        logits = intact.feed(TEXT[None], cache=cache).logits[0]
        pairs, exact = sum(range(1, len(TEXT) + 1)), policy.sinks * len(TEXT)  # every query sees the sinks
        assert cache.rounded_share == pytest.approx((pairs - exact) / pairs)
        return float((logits - truth).norm() / truth.norm())

    errors = [error(unweighted(bits=bits)) for bits in (4, 3, 2)]
    assert errors == sorted(errors)
    assert math.isfinite(error(KVQuant(bits=2, outliers=0.0, qnorm=True, levels="nf")))
