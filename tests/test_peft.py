"""A prefix as a PEFT adapter: PEFT itself is the reader, and `attach` what it must agree with."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT
from families import FAMILIES, SLIDING, WINDOW, random_ids
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.attach import IntactModel, attach
from intactkv.peft import CONFIG, PREFIX_FILE, WEIGHTS, read_adapter, write_adapter
from intactkv.prefix import Prefix, build_prefix

BOS = 1
CLOSE = 1e-4  # of logits that spread over tens, in float32: PEFT runs without our attention function
TEXTS = torch.stack([random_ids(9, seed) for seed in range(4)])
MASK = torch.tensor([[0] * (9 - count) + [1] * count for count in (9, 5, 7, 2)])
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prefix_ids(count: int) -> Tensor:
    return torch.cat([torch.tensor([BOS]), random_ids(count - 1)])


def coarse(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its linears rounded to steps of an eighth."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
            weight.copy_((weight * 8).round() / 8)
    return model


@pytest.fixture
def pair(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[..., tuple[IntactModel, PeftModel]]:
    """pair(family, P, **overrides) -> a coarse model behind the intact prefix: ours, and PEFT's by the adapter."""

    def make(family: str, count: int, **overrides: Any) -> tuple[IntactModel, PeftModel]:
        kind, own = FAMILIES[family]
        options = {**own, **overrides}
        prefix = build_prefix(tiny_model(kind, **options), prefix_ids(count))
        write_adapter(prefix, tmp_path / family)
        theirs = PeftModel.from_pretrained(coarse(tiny_model(kind, **options)), tmp_path / family).eval()
        return attach(coarse(tiny_model(kind, **options)), prefix), theirs

    return make


@pytest.fixture
def prefix(tiny_model: Callable[..., PreTrainedModel]) -> Prefix:
    return build_prefix(tiny_model("llama"), prefix_ids(5))


@pytest.fixture
def adapter(prefix: Prefix, tmp_path: Path) -> Path:
    write_adapter(prefix, tmp_path / "adapter", base_model="some/model")
    return tmp_path / "adapter"


def assert_same(ours: Prefix, theirs: Prefix) -> None:
    """Bit for bit, dtypes included."""
    assert ours.model == theirs.model
    for name in ("ids", "logits", "embeddings"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for a, b in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# PEFT computes what attach computes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 34])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_attach(family: str, count: int, pair: Callable[..., Any]) -> None:
    ours, theirs = pair(family, count)
    plain = theirs(input_ids=TEXTS).logits
    assert (plain - ours.score(TEXTS)).abs().max() < CLOSE
    assert (attach(ours.model, None).score(TEXTS) - plain).abs().max() > 1  # the prefix does matter
    padded = TEXTS * MASK
    positions = (MASK.cumsum(-1) - 1).clamp_min(0)
    left = theirs(input_ids=padded, attention_mask=MASK, position_ids=positions).logits * MASK[..., None]
    assert (left - ours.score(padded, MASK)).abs().max() < CLOSE
    mask = MASK.flip(1)
    right = theirs(input_ids=TEXTS * mask, attention_mask=mask).logits * mask[..., None]
    assert (right - ours.score(TEXTS * mask, mask)).abs().max() < CLOSE


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_generations_are_those_of_attach(family: str, count: int, pair: Callable[..., Any]) -> None:
    ours, theirs = pair(family, count)
    padded = TEXTS * MASK
    for options in (GREEDY, {**GREEDY, "num_beams": 3}):
        batch = theirs.generate(input_ids=padded, attention_mask=MASK, **options)
        assert torch.equal(batch, ours.generate(padded, MASK, prepend=True, **options))
    one = TEXTS[:1, :1]  # shorter than the prefix
    assert torch.equal(theirs.generate(input_ids=one, **GREEDY), ours.generate(one, prepend=True, **GREEDY))


@pytest.mark.parametrize("family", SLIDING)
@torch.no_grad()
def test_a_text_that_outgrows_a_sliding_window_is_right_without_padding(family: str, pair: Callable[..., Any]) -> None:
    ours, theirs = pair(family, 7)
    text = random_ids(2 * WINDOW)[None]
    assert (theirs(input_ids=text).logits - ours.score(text)).abs().max() < CLOSE
    assert torch.equal(theirs.generate(input_ids=text, **GREEDY), ours.generate(text, prepend=True, **GREEDY))


@torch.no_grad()
def test_what_peft_gets_wrong_is_what_the_readme_says(pair: Callable[..., Any], adapter: Path) -> None:
    """Should one of these become right, the README of an adapter needs a line less."""
    text = (adapter / "README.md").read_text()
    # A forward pass counts pads as positions; OPT alone asks the mask.
    ours, theirs = pair("llama", 7)
    padded = TEXTS * MASK
    wrong = theirs(input_ids=padded, attention_mask=MASK).logits * MASK[..., None]
    assert (wrong - ours.score(padded, MASK)).abs().max() > 1
    assert "direct forward pass over a left-padded batch needs" in text
    # Pads push the prefix out of a window. `attach` refuses that; the truth is the row without pads.
    ours, theirs = pair("mistral-sliding", 7, sliding_window=16)
    lost = theirs.generate(input_ids=padded[3:], attention_mask=MASK[3:], **GREEDY)[:, 9:]
    short = TEXTS[3:, -2:]
    truth = theirs.generate(input_ids=short, **GREEDY)[:, 2:]
    assert torch.equal(truth, ours.generate(short, prepend=True, **GREEDY)[:, 2:])
    assert not torch.equal(lost, truth)
    with pytest.raises(UserError, match="pads would push the prefix out"):
        ours.generate(padded, MASK, prepend=True, **GREEDY)
    assert "loses the prefix without a word" in text


# files ----------------------------------------------------------------------------------------------------------------


def test_a_row_holds_k_then_v_of_every_layer_head_by_head(prefix: Prefix, adapter: Path) -> None:
    matrix = load_file(adapter / WEIGHTS)["prompt_embeddings"]
    heads, dim = prefix.model.kv_heads, prefix.model.head_dim
    assert (heads, prefix.model.n_layers) == (2, 3)  # grouped queries: 4 heads read them
    assert matrix.shape == (5, 2 * 3 * heads * dim)
    for layer in range(3):
        for part, states in enumerate((prefix.keys, prefix.values)):
            for head in range(heads):
                start = ((2 * layer + part) * heads + head) * dim
                assert torch.equal(matrix[:, start : start + dim], states[layer][0, head])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_bit_for_bit(
    dtype: torch.dtype, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=dtype)
    prefix = build_prefix(model, prefix_ids(5))
    write_adapter(prefix, tmp_path / "adapter")
    assert_same(read_adapter(tmp_path / "adapter"), prefix)
    assert_same(Prefix.load(tmp_path / "adapter" / PREFIX_FILE), prefix)
    # PEFT keeps adapters in float32, and hands the model its own dtype: nothing is lost on the way.
    theirs = PeftModel.from_pretrained(model, tmp_path / "adapter")
    for layer, keys, values in zip(theirs.get_prompt(2).layers, prefix.keys, prefix.values, strict=True):
        assert torch.equal(layer.keys, keys.expand(2, -1, -1, -1))
        assert torch.equal(layer.values, values.expand(2, -1, -1, -1))
    theirs.save_pretrained(tmp_path / "adapter")
    assert_same(read_adapter(tmp_path / "adapter"), prefix)


def test_the_configuration_is_what_peft_writes_itself(
    adapter: Path, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    ours = json.loads((adapter / CONFIG).read_text())
    assert ours["base_model_name_or_path"] == "some/model"
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "own")
    theirs = json.loads((tmp_path / "own" / CONFIG).read_text())
    assert {k: v for k, v in ours.items() if k != "base_model_name_or_path"}.items() <= theirs.items()


def test_neither_way_needs_peft(prefix: Prefix, adapter: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"  # importing it fails
        "import intactkv.attach, intactkv.cache\n"
        "from intactkv.peft import read_adapter, write_adapter\n"
        f"write_adapter(read_adapter({str(adapter)!r}), {str(tmp_path / 'again')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert_same(read_adapter(tmp_path / "again"), prefix)


def test_an_existing_directory_is_refused_and_a_failure_leaves_nothing(
    prefix: Prefix, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="exists already; choose another directory"):
        write_adapter(prefix, adapter)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Prefix, "save", full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="No space left"):
        write_adapter(prefix, tmp_path / "other")
    assert sorted(tmp_path.rglob("*")) == before


def test_layers_of_different_shapes_are_refused(prefix: Prefix, tmp_path: Path) -> None:
    uneven = replace(prefix, values=(*prefix.values[:2], prefix.values[2][..., :8]))
    with pytest.raises(UserError, match=r"layer 2 has V of shape \(1, 2, 5, 8\).*cannot be served by PEFT"):
        write_adapter(uneven, tmp_path / "uneven")


# adapters that are no prefix of ours ----------------------------------------------------------------------------------


def changed(adapter: Path, **values: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | values))


def with_matrix(adapter: Path, change: Callable[[Tensor], Tensor], name: str = "prompt_embeddings") -> None:
    save_file({name: change(load_file(adapter / WEIGHTS)["prompt_embeddings"])}, adapter / WEIGHTS)


def negated(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["layers.0.key"].neg_()
    save_file(tensors, file, metadata)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not finite": (lambda a: with_matrix(a, lambda m: m / 0), "prompt_embeddings holds values that are not finite"),
    "no configuration": (lambda a: (a / CONFIG).unlink(), "has no adapter_config.json, so it is no PEFT adapter"),
    "broken configuration": (lambda a: (a / CONFIG).write_text("{"), "is not readable JSON"),
    "a list": (lambda a: (a / CONFIG).write_text("[]"), "not a valid dictionary"),
    "lora": (lambda a: changed(a, peft_type="LORA"), "holds a LORA adapter; a prefix is one of PREFIX_TUNING"),
    "projection": (lambda a: changed(a, prefix_projection=True), r"with a projection \(prefix_projection\)"),
    "no layers": (lambda a: changed(a, num_layers=None), "its 'num_layers' None is not"),
    "wrong tokens": (lambda a: changed(a, num_virtual_tokens=4), r"has shape \(5, 192\).* says 4 tokens"),
    "wrong heads": (
        lambda a: changed(a, num_attention_heads=3),
        "token_dim 32 is no multiple of its num_attention_heads 3",
    ),
    "a word for a number": (lambda a: changed(a, num_layers="3"), "its 'num_layers' '3' is not"),
    "true for a number": (lambda a: changed(a, num_virtual_tokens=True), "its 'num_virtual_tokens' True is not"),
    "a negative number": (lambda a: changed(a, token_dim=-32), "its 'token_dim' -32 is not"),
    "a huge number": (lambda a: changed(a, num_layers=10**22), "its 'num_layers' 1000"),
    "no kind": (lambda a: changed(a, peft_type=None), "holds no known adapter"),
    "code of PEFT's": (
        lambda a: changed(a, auto_mapping={"base_model_class": "C", "parent_library": "evil"}),
        r"asks for code of its directory \(auto_mapping: ",
    ),
    "code of transformers'": (
        lambda a: changed(a, auto_map={"AutoModel": "evil.C"}),
        r"asks for code of its directory \(auto_map: ",
    ),
    "integers": (lambda a: with_matrix(a, Tensor.int), "prompt_embeddings is torch.int32"),
    "a sign of the file of ours": (lambda a: negated(a / PREFIX_FILE), "has changed since it was written"),
    "other heads": (lambda a: changed(a, num_attention_heads=4), r"\(3, 4, 5, 8\), there \(3, 2, 5, 16\)"),
    "no weights": (lambda a: (a / WEIGHTS).unlink(), r"adapter_model\.safetensors is missing$"),
    "a pickle": (lambda a: (a / WEIGHTS).rename(a / "adapter_model.bin"), "is a pickle and not read"),
    "broken weights": (lambda a: (a / WEIGHTS).write_text("no"), "is truncated or not a safetensors file"),
    "other tensors": (
        lambda a: with_matrix(a, torch.clone, "lora_A"),
        "holds lora_A, but prefix tuning has prompt_embeddings alone",
    ),
    "trained since": (lambda a: with_matrix(a, lambda x: x * 1.001), "one of the two was trained or replaced"),
    "no file of ours": (lambda a: (a / PREFIX_FILE).unlink(), "so the token ids of its 5 rows .* are not known"),
    "broken file of ours": (lambda a: (a / PREFIX_FILE).write_text("no"), "prefix file .* is truncated"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_every_broken_adapter_is_refused_by_its_name(case: str, adapter: Path) -> None:
    damage, words = BROKEN[case]
    damage(adapter)
    with pytest.raises(UserError, match=words) as caught:
        read_adapter(adapter)
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_name_in_the_configuration_is_followed(adapter: Path, prefix: Prefix, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    changed(
        adapter, base_model_name_or_path=str(tmp_path / "elsewhere" / ".." / "x"), revision="main", auto_mapping=None
    )
    before = sorted(tmp_path.rglob("*"))
    assert_same(read_adapter(adapter), prefix)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter directory .*nowhere is missing"):
        read_adapter(tmp_path / "nowhere")


def test_a_lora_adapter_of_peft_is_refused(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a LORA adapter"):
        read_adapter(tmp_path)


@torch.no_grad()
def test_an_adapter_of_elsewhere_is_read_with_ids_and_model(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = get_peft_model(tiny_model("llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="token ids of its 4 rows and the full-precision logits"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match="give both"):
        read_adapter(tmp_path, ids=[1, 5, 6, 7])
    with pytest.raises(UserError, match=r"are \(3, 2, 4, 16\), there \(3, 2, 3, 16\)"):
        read_adapter(tmp_path, ids=[1, 5, 6], model=tiny_model("llama"))
    prefix = read_adapter(tmp_path, ids=[1, 5, 6, 7], model=tiny_model("llama"))
    for layer, keys, values in zip(theirs.get_prompt(1).layers, prefix.keys, prefix.values, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert torch.equal(prefix.logits, build_prefix(tiny_model("llama"), [1, 5, 6, 7]).logits)
    ours = attach(tiny_model("llama"), prefix)
    assert (theirs(input_ids=TEXTS).logits - ours.score(TEXTS)).abs().max() < CLOSE
