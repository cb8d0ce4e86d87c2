"""The prefix: what it holds, how it is kept, and whose it is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SLIDING, plain_cache, plain_logits, random_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from corpora.errors import UserError
from intactkv.attach import attach
from intactkv.prefix import FORMAT, Prefix, build_prefix, identity_of, input_embeddings
from quantization.kv_cache import PerHead

BOS = 1
IDS = torch.cat([torch.tensor([BOS]), random_ids(33)])  # as long as the Vicuna prompt


@pytest.fixture(params=FAMILIES)
def model(request, tiny_model):
    model_type, overrides = FAMILIES[request.param]
    return tiny_model(model_type, **overrides)


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


def tensors_of(prefix: Prefix) -> dict[str, Tensor]:
    return {
        "ids": prefix.ids,
        "logits": prefix.logits,
        "embeddings": prefix.embeddings,
        **{f"key {i}": key for i, key in enumerate(prefix.keys)},
        **{f"value {i}": value for i, value in enumerate(prefix.values)},
    }


def assert_bit_identical(actual: Prefix, expected: Prefix) -> None:
    ours, theirs = tensors_of(actual), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


# What it holds --------------------------------------------------------------------------------------------------------


def test_a_model_in_training_mode_is_refused(tiny_model) -> None:
    with pytest.raises(UserError, match=r"call model\.eval\(\)"):
        build_prefix(tiny_model("opt").train(), [1])


def test_keys_and_values_are_bit_for_bit_what_the_plain_model_caches(model):
    prefix, cache = build_prefix(model, IDS), plain_cache(model, IDS[None])
    for layer, keys, values in zip(cache.layers, prefix.keys, prefix.values, strict=True):
        assert torch.equal(keys, layer.keys)
        assert torch.equal(values, layer.values)


def test_logits_are_the_plain_models(model):
    prefix = build_prefix(model, IDS.tolist())
    # A pass that also fills a cache is the same computation: equal up to the order of float32 sums.
    assert_close(prefix.logits, plain_logits(model, IDS), atol=1e-5, rtol=1e-5)


def test_embeddings_are_the_rows_of_the_input_embedding(model):
    assert torch.equal(build_prefix(model, IDS).embeddings, model.get_input_embeddings().weight[IDS])


@pytest.mark.parametrize("count", [1, 3, 34])
def test_the_first_tokens_of_a_prefix_are_the_prefix_of_the_first_tokens(model, count):
    sliced, built = build_prefix(model, IDS).first(count), build_prefix(model, IDS[:count])
    assert len(sliced) == count
    assert sliced.model == built.model
    for name, tensor in tensors_of(sliced).items():
        # Causal attention; a shorter pass only sums in another order.
        assert_close(tensor, tensors_of(built)[name], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("count", [0, -1, 35])
def test_no_slice_is_longer_than_the_prefix_or_empty(llama, count):
    with pytest.raises(UserError, match="1 to 34"):
        build_prefix(llama, IDS).first(count)


def test_ids_may_come_as_a_list_or_a_tensor_of_any_shape(llama):
    expected = build_prefix(llama, IDS)
    assert_bit_identical(build_prefix(llama, IDS.tolist()), expected)
    assert_bit_identical(build_prefix(llama, IDS[None].int()), expected)


def test_the_prefix_keeps_its_own_ids(llama):
    ids = IDS.clone()
    prefix = build_prefix(llama, ids)
    ids.zero_()
    assert torch.equal(prefix.ids, IDS)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "at least one token"), ([1, 101], "outside the vocabulary of 101"), ([-1], "outside the vocabulary")],
)
def test_ids_that_no_model_could_read_are_refused(llama, ids, message):
    with pytest.raises(UserError, match=message):
        build_prefix(llama, ids)


@pytest.mark.parametrize("name", SLIDING)
def test_a_prefix_that_a_sliding_window_cannot_hold_is_refused(name, tiny_model):
    model_type, overrides = FAMILIES[name]
    model = tiny_model(model_type, **{**overrides, "sliding_window": 8})
    with pytest.raises(UserError, match=r"sliding window of 8.* at most 7"):
        build_prefix(model, IDS[:8])
    assert len(build_prefix(model, IDS[:7])) == 7


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_can_flow_through_a_prefix_wherever_it_was_built(llama, context):
    with context():
        prefix = build_prefix(llama, torch.tensor([BOS, 5, 6]))
    for name, tensor in tensors_of(prefix).items():
        assert not tensor.is_inference(), name
        assert not tensor.requires_grad, name
    key = prefix.keys[0].requires_grad_()
    (key * key).sum().backward()  # an inference tensor could not be saved for backward
    assert_close(key.grad, 2 * key.detach())


@pytest.mark.parametrize("policy", [None, PerHead(2)], ids=["full", "kv2"])
def test_nothing_that_runs_behind_a_prefix_writes_to_it(model, policy):
    prefix = build_prefix(model, IDS[:3])
    before = {name: tensor.clone() for name, tensor in tensors_of(prefix).items()}
    behind = attach(model, prefix, policy)
    text = torch.cat([IDS[:3], random_ids(6, seed=1)])[None]
    behind.score(text)
    cache = behind.new_cache()
    behind.feed(random_ids(4)[None], cache=cache)
    cache.reorder_cache(torch.tensor([0]))
    cache.crop(-4)
    behind.feed(random_ids(4)[None], cache=cache)
    cache.reset()
    behind.generate(text, max_new_tokens=3, do_sample=False)
    behind.generate(text, max_new_tokens=3, do_sample=False, num_beams=3)
    behind.generate(torch.cat([text, text]), attention_mask=torch.ones(2, 9).long(), max_new_tokens=3, do_sample=False)
    for name, tensor in tensors_of(prefix).items():
        assert torch.equal(tensor, before[name]), name


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_prefix_loads_bit_for_bit(dtype, model, tmp_path):
    prefix = build_prefix(model.to(dtype), IDS)
    prefix.save(tmp_path / "sub" / "prefix.safetensors")
    loaded = Prefix.load(tmp_path / "sub" / "prefix.safetensors")
    assert loaded.dtype == dtype
    assert loaded.model == prefix.model
    assert_bit_identical(loaded, prefix)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["prefix.safetensors"]


@pytest.mark.parametrize("count", [1, 3])
def test_a_slice_saves_and_loads_bit_for_bit(llama, tmp_path, count):
    part = build_prefix(llama, IDS).first(count)
    part.save(tmp_path / "part.safetensors")
    assert_bit_identical(Prefix.load(tmp_path / "part.safetensors"), part)


def test_a_failed_save_leaves_the_old_file(llama, tmp_path, monkeypatch):
    path = tmp_path / "prefix.safetensors"
    build_prefix(llama, [BOS]).save(path)
    content = path.read_bytes()

    def full_disk(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("corpora.storage.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        build_prefix(llama, IDS).save(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("part", ["keys", "values", "logits", "embeddings"])
def test_a_prefix_that_is_not_finite_is_neither_saved_nor_read(llama, tmp_path, part):
    prefix, path = build_prefix(llama, IDS), tmp_path / "prefix.safetensors"
    prefix.save(path)
    tensors, metadata = load_file(path), {"intactkv": json.dumps({"format": 1, "model": prefix.model.stored()})}
    name = {"keys": "layers.1.key", "values": "layers.1.value"}.get(part, part)
    tensors[name].view(-1)[5] = float("nan")
    broken = getattr(prefix, part)
    broken = (broken[0], tensors[name], *broken[2:]) if isinstance(broken, tuple) else tensors[name]
    with pytest.raises(UserError, match=f"is not written: its tensor '{name}' holds values that are not finite"):
        replace(prefix, **{part: broken}).save(tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=rf"prefix file .*prefix\.safetensors: its tensor '{name}' holds .* not finite"):
        Prefix.load(path)


def test_a_model_that_computes_no_finite_prefix_is_refused(tiny_model):
    model = tiny_model("llama")
    model.model.norm.weight[:] = float("nan")
    with pytest.raises(UserError, match=r"the prefix \[1\] of llama has logits that are not finite.* float32"):
        build_prefix(model, [BOS])
    model.model.layers[2].self_attn.v_proj.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="has values of layer 2 that are not finite"):
        build_prefix(model, [BOS])


def test_a_missing_file_is_refused_and_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match="python -m intactkv build"):
        Prefix.load(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match=r"prefix file .* is a folder"):
        Prefix.load(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.0005, 0.5, 0.999])
def test_a_truncated_file_is_refused(llama, tmp_path, keep):
    path = tmp_path / "prefix.safetensors"
    build_prefix(llama, IDS).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=r"prefix file .* is truncated or not a safetensors file"):
        Prefix.load(path)


def test_a_file_that_is_no_prefix_is_refused(llama, tmp_path):
    text = tmp_path / "text.safetensors"
    text.write_text("a text of some length, but no safetensors file")
    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2, 2)}, weights, metadata={"format": "pt"})
    bare = tmp_path / "bare.safetensors"
    save_file({"weight": torch.ones(2, 2)}, bare)
    garbled = tmp_path / "garbled.safetensors"
    save_file({"ids": torch.ones(1)}, garbled, metadata={"intactkv": "{not json"})
    listed = tmp_path / "listed.safetensors"
    save_file({"ids": torch.ones(1)}, listed, metadata={"intactkv": "[1, 2]"})
    said = {
        text: "truncated",
        weights: "another kind",
        bare: "another kind",
        garbled: "not readable JSON",
        listed: "damaged",
    }
    for path, words in said.items():
        with pytest.raises(UserError, match=rf"prefix file {path} is {words}.*python -m intactkv build"):
            Prefix.load(path)


def test_a_file_without_one_of_its_layers_is_refused(llama, tmp_path):
    prefix = build_prefix(llama, IDS)
    path = tmp_path / "prefix.safetensors"
    replace(prefix, keys=prefix.keys[:2], values=prefix.values[:2]).save(path)
    with pytest.raises(UserError, match=r"it has no tensor 'layers\.2\.key'"):
        Prefix.load(path)


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def changed(path: Path, change: Change, *, summed: bool) -> None:
    """The same file with another header or tensors; summed: with the old sum, else as files of before, without any."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["intactkv"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    if not summed:
        header.pop("sha256", None)
    change(header, tensors)
    save_file(tensors, path, {"intactkv": json.dumps(header)})


SILENT: dict[str, Change] = {  # of the right shape, dtype and range
    "a flipped sign": lambda _, tensors: tensors["layers.0.key"].neg_(),
    "another value": lambda _, tensors: tensors["layers.1.value"].view(-1)[3].add_(1),
    "other ids": lambda _, tensors: tensors["ids"].copy_(tensors["ids"].flip(0)),
    "other logits": lambda _, tensors: tensors["logits"].mul_(2),
    "two layers exchanged": lambda _, tensors: tensors.update(
        {"layers.0.key": tensors["layers.1.key"], "layers.1.key": tensors["layers.0.key"]}
    ),
    "another basis": lambda header, _: header["model"].update(basis="1a2b3c4d"),
    "another model": lambda header, _: header["model"].update(fingerprint="0123456789abcdef"),
    "trained": lambda header, _: header.update(calibrated={"steps": 1}),
}


@pytest.mark.parametrize("what", SILENT)
def test_a_prefix_that_changed_since_it_was_written_is_refused(llama, tmp_path, what):
    path = tmp_path / "prefix.safetensors"
    build_prefix(llama, IDS).save(path)
    changed(path, lambda _header, _tensors: None, summed=True)
    Prefix.load(path)  # rewritten by another tool, but the same
    changed(path, SILENT[what], summed=True)
    with pytest.raises(UserError, match=r"prefix file .* has changed since it was written .*python -m intactkv build"):
        Prefix.load(path)


SHAPES: dict[str, tuple[Change, str]] = {  # what a file of before is refused for
    "a shorter key": (
        lambda _, t: t.update({"layers.0.key": t["layers.0.key"][:, :, :1].clone()}),
        r"'layers\.0\.key' is torch\.float32 of shape \(1, 2, 1, 16\), expected floats of \(1, 2, 34, 16\)",
    ),
    "fewer heads": (lambda _, t: t.update({"layers.2.value": t["layers.2.value"][:, :1].clone()}), r"\(1, 1, 34, 16\)"),
    "another dtype": (
        lambda _, t: t.update({"layers.2.value": t["layers.2.value"].half()}),
        r"torch\.float16 of shape",
    ),
    "integers": (lambda _, t: t.update(logits=t["logits"].int()), "'logits' is torch.int32"),
    "another vocabulary": (
        lambda _, t: t.update(logits=t["logits"][:, :-1].clone()),
        r"expected floats of \(34, 101\)",
    ),
    "other embeddings": (lambda _, t: t.update(embeddings=t["embeddings"][:3].clone()), r"\(34, any\)"),
    "a negative id": (lambda _, t: t["ids"].neg_(), "lie outside the vocabulary of 101"),
    "an id too large": (lambda _, t: t["ids"].add_(100), "lie outside the vocabulary of 101"),
    "ids of floats": (lambda _, t: t.update(ids=t["ids"].float()), "not a list of integers"),
    "no ids": (lambda _, t: t.update(ids=t["ids"][:0].clone()), "not a list of integers"),
    "one tensor more": (lambda _, t: t.update(extra=torch.ones(1)), "a tensor 'extra' that no prefix has"),
    "one layer more": (lambda h, _: h["model"].update(layers=4), r"it has no tensor 'layers\.3\.key'"),
    "no layers": (lambda h, _: h["model"].update(layers=0), "'model.layers' 0 is not"),
    "a word for a number": (lambda h, _: h["model"].update(kv_heads="2"), "'model.kv_heads' '2' is not"),
    "a huge number": (lambda h, _: h["model"].update(layers=10**22), "'model.layers' 1000"),
    "no model": (lambda h, _: h.pop("model"), "it has no 'model'"),
    "a model with more": (lambda h, _: h["model"].update(more=1), "'model.more' 1"),
    "no basis": (lambda h, _: h["model"].pop("basis"), "it has no 'model.basis'"),
    "trained for nothing": (lambda h, _: h.update(calibrated={"for": {"weights": 3}}), "calibrated.for"),
    "a list": (lambda h, _: h.update(calibrated=[1]), "'calibrated' \\[1\\] is not"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_file_of_before_has_no_sum_and_is_refused_for_its_form(llama, tmp_path, what):
    path = tmp_path / "prefix.safetensors"
    prefix, (change, words) = build_prefix(llama, IDS), SHAPES[what]
    prefix.save(path)
    changed(path, lambda _header, _tensors: None, summed=False)
    assert_bit_identical(Prefix.load(path), prefix)
    changed(path, change, summed=False)
    with pytest.raises(UserError, match=f"prefix file .*{words}.*python -m intactkv build") as caught:
        Prefix.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_format_is_refused(llama, tmp_path, monkeypatch):
    path = tmp_path / "prefix.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("intactkv.prefix.FORMAT", FORMAT + 1)
        build_prefix(llama, [BOS]).save(path)
    with pytest.raises(UserError, match=rf"format {FORMAT + 1}, this version reads {FORMAT}"):
        Prefix.load(path)


# Whose it is ----------------------------------------------------------------------------------------------------------


def test_a_model_accepts_its_own_prefix_also_from_a_file(model, tmp_path):
    build_prefix(model, IDS).save(tmp_path / "prefix.safetensors")
    attach(model, Prefix.load(tmp_path / "prefix.safetensors"))


def test_another_seeds_model_of_the_same_shape_is_refused(model, tiny_model):
    other = tiny_model(model.config.model_type, seed=1)
    other.config = model.config
    with pytest.raises(UserError, match=r"embeddings differ by 1\d\d%"):
        attach(other, build_prefix(model, [BOS]))


@pytest.mark.parametrize(
    ("field", "model_type", "overrides"),
    [
        ("model_type", "qwen2", {}),
        ("layers", "llama", {"num_hidden_layers": 2}),
        ("kv_heads", "llama", {"num_key_value_heads": 4}),
        ("head_dim", "llama", {"head_dim": 8}),
        ("vocabulary", "llama", {"vocab_size": 102}),
        ("rope", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    ],
)
def test_a_model_that_differs_in_anything_that_shapes_keys_is_refused(llama, tiny_model, field, model_type, overrides):
    with pytest.raises(UserError, match=f"another model or basis: {field} is"):
        attach(tiny_model(model_type, **overrides), build_prefix(llama, [BOS]))


def with_source(model, fingerprint: str | None, basis: str):
    model.intactkv_source = (fingerprint, basis)
    return model


def test_another_basis_or_another_checkpoint_is_refused_and_the_same_one_is_not(tiny_model):
    prefix = build_prefix(with_source(tiny_model("llama"), "aaaa", "rotated"), [BOS])
    attach(with_source(tiny_model("llama"), "aaaa", "rotated"), prefix)
    # A model without a fingerprint (not from a directory) is told apart by its embeddings alone.
    attach(with_source(tiny_model("llama"), None, "rotated"), prefix)
    with pytest.raises(UserError, match="basis is 'rotated' in the prefix and 'plain' in the model"):
        attach(with_source(tiny_model("llama"), "aaaa", "plain"), prefix)
    with pytest.raises(UserError, match="basis is 'rotated'"):
        attach(tiny_model("llama"), prefix)
    with pytest.raises(UserError, match="fingerprint is 'aaaa' in the prefix and 'bbbb'"):
        attach(with_source(tiny_model("llama"), "bbbb", "rotated"), prefix)


def test_a_model_from_a_directory_carries_the_fingerprint_of_its_content(tiny_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    directory = tiny_checkpoint(tmp_path / "one", "llama")
    copy = tiny_checkpoint(tmp_path / "two", "llama")
    other = tiny_checkpoint(tmp_path / "three", "llama", seed=1)
    first, second, third = (AutoModelForCausalLM.from_pretrained(d) for d in (directory, copy, other))
    assert identity_of(first).fingerprint == identity_of(second).fingerprint is not None
    prefix = build_prefix(first, [BOS])
    attach(second, prefix)
    with pytest.raises(UserError, match="fingerprint is"):
        attach(third, prefix)


def test_an_identity_survives_its_file(model, tmp_path):
    prefix = build_prefix(with_source(model, "0123", "smooth-1a2b"), [BOS])
    prefix.save(tmp_path / "prefix.safetensors")
    assert Prefix.load(tmp_path / "prefix.safetensors").model == identity_of(model)
    json.loads(prefix.model.rope)  # plain JSON, so that files compare across versions


def rounded_to_int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.mark.parametrize(
    "rounding",
    [lambda w: w.half().float(), lambda w: w.bfloat16().float(), rounded_to_int8],
    ids=["fp16", "bf16", "int8"],
)
def test_a_model_whose_embedding_was_rounded_is_still_the_same_model(model, rounding):
    prefix = build_prefix(model, IDS)
    before = input_embeddings(model).clone()
    input_embeddings(model).copy_(rounding(before))
    assert not torch.equal(input_embeddings(model), before)
    attach(model, prefix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_accepts_the_prefix_of_its_full_precision_twin(model, dtype):
    prefix = build_prefix(model, IDS)
    attach(model.to(dtype), prefix)


def test_a_prefix_is_laid_out_as_one_that_was_read_from_its_file(tiny_model, tmp_path):
    """Else training it from the one or the other differs in the last bits."""
    built = build_prefix(tiny_model("llama"), IDS[:3])
    built.save(tmp_path / "prefix.safetensors")
    read = Prefix.load(tmp_path / "prefix.safetensors")
    for ours, theirs in zip((*built.keys, *built.values), (*read.keys, *read.values), strict=True):
        assert ours.stride() == theirs.stride()
