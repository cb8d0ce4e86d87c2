"""PrefixQuant's discovery: what is planted is found, ranked and kept; `--prefix auto` is the same in every program."""

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from families import FAMILIES, plain_logits, random_ids
from torch import Tensor
from torch.testing import assert_close

from corpora.errors import UserError
from eval.mtbench.chat_templates import ChatTemplate
from eval.tasks.lm import IntactLM
from intactkv.architecture import decoder_of
from intactkv.attach import attach
from intactkv.discover import chosen_tokens, discover, down_maxima, largest_ratios
from intactkv.pivots import OutlierTokens, outlier_tokens
from intactkv.prefix import Prefix, build_prefix

BOS, SINK, RARE = 1, 7, 11


def down_of(model) -> str:
    return "fc2" if model.config.model_type == "opt" else "mlp.down_proj"


# Steps 1 to 4, on maxima that are made up -----------------------------------------------------------------------------


def planted(*outliers: tuple[int, int, int], sequences: int = 20) -> Tensor:
    """Maxima of 1 in 3 layers, 1000 at these (layer, sequence, position): (3, N, 9)."""
    maxima = torch.ones(3, sequences, 9)
    for place in outliers:
        maxima[place] = 1000.0
    return maxima


def chosen(maxima: Tensor, ids: Tensor) -> tuple[int, ...]:
    return chosen_tokens(outlier_tokens(maxima, ids), len(ids), BOS)


def test_the_o_most_frequent_outlier_tokens_stand_in_front_and_bos_is_last():
    ids = torch.full((20, 9), 50)
    ids[:, 3], ids[:, 5], ids[:, 7] = SINK, RARE, 13
    every = range(20)
    twice = [(1, s, p) for s in every for p in (0, 3)]
    assert chosen(planted(*twice), ids) == (SINK, BOS)  # o = 2, but there is one id: position 0 says nothing
    thrice = [*twice, *((2, s, 5) for s in range(4)), *((2, s, 7) for s in range(6))]
    assert chosen(planted(*thrice), ids) == (SINK, 13, BOS)  # o is still 2: the most frequent of three ids
    deeper = [*twice, *((1, s, 5) for s in range(1))]
    assert chosen(planted(*deeper), ids) == (SINK, RARE, BOS)  # 41 outliers of 20 sequences in one layer: o = 3


@pytest.mark.parametrize(("count", "kept"), [(1, False), (2, True)])
def test_a_single_id_that_fewer_than_a_tenth_of_the_sequences_show_is_chance(count, kept):
    ids = torch.full((20, 9), 50)
    ids[:, 3] = SINK
    maxima = planted(*((0, s, 3) for s in range(count)))
    assert chosen(maxima, ids) == ((SINK, BOS) if kept else (BOS,))
    ids[0, 4] = RARE  # two ids are no chance, however rare
    maxima[0, 0, 4] = 1000.0
    assert chosen(maxima, ids)[-2] in (SINK, RARE)


def test_without_outliers_or_with_the_first_token_alone_the_prefix_is_bos():
    ids = torch.full((20, 9), SINK)
    assert chosen(planted(), ids) == (BOS,)
    assert chosen(planted(*((1, s, 0) for s in range(20))), ids) == (BOS,)


def test_bos_is_not_put_in_front_twice():
    assert chosen_tokens(OutlierTokens(2, 20, {BOS: 30, SINK: 20, RARE: 5}), 20, BOS) == (SINK, BOS)


# On models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def model(request, tiny_model):
    model_type, overrides = FAMILIES[request.param]
    return tiny_model(model_type, **overrides)


@torch.no_grad()
def down_inputs(model, ids: Tensor) -> list[Tensor]:
    """What the last linear of each feed-forward part must read, computed from its norm's output: (T, channels)."""
    blocks = decoder_of(model).layers
    opt = model.config.model_type == "opt"
    norms = [block.final_layer_norm if opt else block.post_attention_layernorm for block in blocks]
    seen: list[Tensor] = []
    handles = [norm.register_forward_hook(lambda _m, _a, out: seen.append(out)) for norm in norms]
    model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for block, x in zip(blocks, seen, strict=True):
        x = x.reshape(ids.numel(), -1)
        found.append(block.fc1(x).relu() if opt else block.mlp.act_fn(block.mlp.gate_proj(x)) * block.mlp.up_proj(x))
    return found


def test_maxima_are_those_of_the_inputs_of_the_last_linear_whatever_runs_at_once(model, monkeypatch):
    texts = torch.stack([random_ids(30, seed) for seed in range(5)])
    truth = torch.stack([torch.stack([x.abs().amax(dim=-1) for x in down_inputs(model, ids)]) for ids in texts], dim=1)
    done: list[int] = []
    monkeypatch.setattr("intactkv.discover.TOKENS_AT_ONCE", 60)
    assert_close(down_maxima(model, texts, linear=down_of(model), advance=done.append), truth, rtol=1e-4, atol=1e-5)
    assert done == [2, 2, 1]


def test_behind_a_prefix_the_maxima_are_those_of_the_whole_text_from_there_on(model):
    texts = torch.stack([torch.cat([torch.tensor([BOS, 40, 41]), random_ids(20, seed)]) for seed in range(3)])
    whole = down_maxima(model, texts, linear=down_of(model))
    behind = down_maxima(model, texts[:, 3:], build_prefix(model, texts[0, :3]), linear=down_of(model))
    assert_close(behind, whole[..., 3:], rtol=1e-4, atol=1e-5)  # the same sums in another order


def with_sinks(model) -> None:
    """SINK alone has anything in channel 11, which the feed-forward norms amplify and no block writes to; what the
    feed-forward parts make of it would drown it, so they write nothing at all."""
    embedding = model.get_input_embeddings().weight
    embedding[:, 11] = 0.0
    embedding[SINK, 11] = 5.0
    for block in model.model.layers:
        block.self_attn.o_proj.weight[11] = 0.0
        block.mlp.down_proj.weight[:] = 0.0
        block.post_attention_layernorm.weight[11] = 2000.0


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_planted_token_is_discovered_with_its_count(tiny_model, model_type):
    model = tiny_model(model_type)
    texts = torch.stack([random_ids(40, seed) for seed in range(10)])
    texts[texts == SINK] = SINK + 1
    assert discover(model, texts, BOS).prefix == (BOS,)
    with_sinks(model)
    plain = discover(model, texts, BOS)
    assert (plain.prefix, plain.outliers) == ((BOS,), OutlierTokens(0, 0, {}))
    texts[:, 20], texts[:5, 30], texts[0, 0] = SINK, SINK, SINK
    found = discover(model, texts, BOS)
    assert found.prefix == (SINK, BOS)
    assert found.outliers == OutlierTokens(2, 3, {SINK: 3 * 15})  # in each of 3 layers, 16 in 10 sequences
    assert min(found.ratios) > 64 > max(plain.ratios)
    assert discover(model, texts, SINK).prefix == (SINK,)


def test_what_cannot_be_looked_at_is_refused_and_leaves_no_hook(tiny_model):
    model, texts = tiny_model("llama"), random_ids(20)[None]
    with pytest.raises(UserError, match=r"threshold 1: a ratio"):
        discover(model, texts, BOS, threshold=1)
    with pytest.raises(UserError, match=r"holds no 'fc2'.*mlp\.down_proj"):
        discover(model, texts, BOS, linear="fc2")
    model.model.layers[1].mlp.up_proj.weight[:] = float("nan")
    with pytest.raises(UserError, match="are NaN"):
        discover(model, texts, BOS)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_rows_own_bos_gives_way_to_the_one_that_such_a_prefix_has_last(tiny_model, tiny_tokenizer):
    """And a text that happens to start with the prefix's first token keeps it."""
    model, text = tiny_model("llama"), random_ids(12)
    intact = attach(model, build_prefix(model, [SINK, RARE, BOS]))
    text[0] = SINK
    plain = intact.score(text[None])[0]
    whole = plain_logits(model, torch.cat([torch.tensor([SINK, RARE, BOS]), text]))
    assert_close(plain, whole[3:], rtol=1e-4, atol=1e-4)
    begun = intact.score(torch.cat([torch.tensor([BOS]), text])[None])[0]
    assert_close(begun, whole[2:], rtol=1e-4, atol=1e-4)
    harness = SimpleNamespace(lead=[SINK, RARE, BOS], tokenizer=tiny_tokenizer())
    for row in ([SINK, 40], [BOS, SINK, 40], [SINK, RARE, BOS, SINK, 40]):
        assert IntactLM.behind_lead(cast(Any, harness), row) == [SINK, RARE, BOS, SINK, 40]
    template = ChatTemplate("plain", tiny_tokenizer(), lambda turns: turns[0])
    assert template.behind([SINK, RARE, BOS]).ids(["a"]) == [SINK, RARE, *template.ids(["a"])]


# Programs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(intactkv_root, tiny_checkpoint, tiny_model) -> Path:
    """A checkpoint of the family whose default text is the sample, with `e` (a frequent letter) as its sink."""
    folder = intactkv_root / "datasets" / "sample"
    folder.mkdir(parents=True)
    for role in ("calibration", "evaluation"):
        rows = [
            {"title": f"{role} {i}", "text": f"{role} {i}: the text of the sample, once more. " * 20} for i in (1, 2)
        ]
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama")
    return directory.rename(directory.with_name("smollm2-tiny"))


@pytest.fixture
def program(run_main):
    def call(package: str, *arguments: object) -> tuple[int, str, str]:
        return run_main(import_module(f"{package}.__main__").main, *arguments)

    return call


def records(root: Path) -> list[Path]:
    return sorted((root / "modelzoo" / "prefixes" / "smollm2-tiny").glob("auto-*.json"))


def test_auto_is_discovered_once_and_found_again_without_a_model(program, dense, intactkv_root, monkeypatch):
    call = ("ppl", "--model", dense, "--window", 64, "--limit", 2, "--prefix", "auto", "--json")
    code, said, errors = program("eval", *call)
    assert code == 0, errors
    (file,) = records(intactkv_root)
    found = json.loads(file.read_text())
    record = json.loads(said)
    assert record["settings"]["prefix"]["label"] == "[A]"
    assert file.stem == f"auto-{record['settings']['prefix']['auto']}"
    assert record["prefix_ids"] == found["prefix"]
    assert record["prefix_ids"][-1] == BOS
    assert found["made_of"]["drawn"] == {"corpus": "sample", "samples": 64, "length": 128, "seed": 2}

    def never(*_arguments, **_options):
        raise AssertionError("it was there")

    monkeypatch.setattr("quantization.runs.auto_prefix.discover", never)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", never)
    assert program("eval", *call)[0] == 0  # a finished run, read back
    file.write_text("{}")
    code, _, errors = program("eval", *call)
    assert code == 2
    assert "is damaged: it has no 'prefix'; delete it to discover again" in errors


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {  # without a sum, as files of before
    "no counts": (lambda d: d.pop("counts"), "it has no 'counts'"),
    "no start": (lambda d: d["made_of"].pop("start"), "it has no 'made_of.start'"),
    "no prefix": (lambda d: d.update(prefix=[]), "its 'prefix' [] is not"),
    "a word": (lambda d: d["prefix"].insert(0, "7"), "its 'prefix.0' '7' is not"),
    "a negative id": (lambda d: d["prefix"].insert(0, -7), "its 'prefix.0' -7 is not"),
    "a fraction": (lambda d: d["prefix"].insert(0, 7.5), "its 'prefix.0' 7.5 is not"),
    "three of a pair": (lambda d: d["counts"].append([1, 2, 3]), "its 'counts."),
    "a null ratio": (lambda d: d["ratios"].append(None), "its 'ratios.3' None is not"),
    "a ratio less behind": (lambda d: d.update(behind=[1.0]), "is not of this model and threshold"),
    "another end": (lambda d: d["prefix"].append(7), "is not of this model and threshold"),
    "another model": (lambda d: d["made_of"].update(source="0" * 16), "is not of this model and threshold"),
    "another threshold": (lambda d: d["made_of"].update(threshold=3.0), "is not of this model and threshold"),
    "no such token": (lambda d: d["prefix"].insert(0, 101), "[101] lie outside the vocabulary of 101"),
    "a list": (lambda d: d.update(made_of=[]), "its 'made_of' [] is not"),
}


def test_a_discovery_that_is_damaged_or_edited_is_refused_before_anything_is_made(program, dense, intactkv_root):
    call = ("build", "--model", dense, "--prefix", "auto", "--out", intactkv_root / "a.safetensors")
    assert program("intactkv", *call)[0] == 0
    (file,) = records(intactkv_root)
    whole = json.loads(file.read_text())
    (intactkv_root / "a.safetensors").unlink()
    shutil.rmtree(intactkv_root / "outputs")
    before = sorted(intactkv_root.rglob("*"))
    for damage, words in DAMAGES.values():
        content = json.loads(json.dumps(whole))
        damage(content)
        file.write_text(json.dumps(content))
        assert program("intactkv", *call)[0] == 2
        del content["sha256"]
        file.write_text(json.dumps(content))
        code, _, errors = program("intactkv", *call)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert words in errors
        assert sorted(intactkv_root.rglob("*")) == before
    for change in ({"number": 3}, {"counts": [[9, 1]]}, {"prefix": [SINK, BOS]}):  # right, but not what was found
        file.write_text(json.dumps(whole | change))
        code, _, errors = program("intactkv", *call)
        assert code == 2
        assert f"the discovery {file} has changed since it was written (its sum is another); delete it" in errors
    del whole["sha256"]
    file.write_text(json.dumps(whole))
    assert program("intactkv", *call)[0] == 0


def test_discover_shows_tokens_and_ratios_before_and_behind_and_writes_a_prefix(program, dense, intactkv_root):
    out = intactkv_root / "found.safetensors"
    call = ("discover", "--model", dense, "--samples", 8, "--threshold", 2)
    code, said, errors = program("intactkv", *call, "--out", out)
    assert code == 0, errors
    (file,) = records(intactkv_root)
    found = json.loads(file.read_text())
    prefix = Prefix.load(out)
    assert prefix.ids.tolist() == found["prefix"]
    assert len(prefix) > 1
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from corpora.text import calibration_segments

    model = AutoModelForCausalLM.from_pretrained(dense)
    ids = calibration_segments(AutoTokenizer.from_pretrained(dense), "sample", samples=8, length=128, seed=2)
    before, behind = (largest_ratios(down_maxima(model, ids, p)) for p in (None, prefix))
    assert found["ratios"] == pytest.approx(before, rel=1e-4)
    assert found["behind"] == pytest.approx(behind, rel=1e-4)
    rows = [line.split() for line in said.splitlines()]
    assert ["2", f"{before[2]:.1f}", f"{behind[2]:.1f}"] in rows
    for token, count in found["counts"][:3]:
        assert any(row[:1] == [str(token)] and row[-1:] == [str(count)] for row in rows)
    assert program("intactkv", *call)[1].splitlines()[:-1] == said.splitlines()[:-1]  # found again
    assert program("intactkv", *call, "--ablate", 1, "--out", out)[0] == 0
    assert Prefix.load(out).ids.tolist() == found["prefix"][:1]
    assert json.loads(file.read_text()) == found
    assert program("intactkv", "discover", "--model", dense, "--samples", 8)[0] == 0
    assert len(records(intactkv_root)) == 2  # another threshold is another discovery


def test_a_quantized_checkpoint_asks_its_dense_one_and_is_refused_without_it(program, dense, intactkv_root):
    quantized = intactkv_root / "modelzoo" / "w4"
    assert (
        program("quantization", "--model", dense, "--recipe", "rtn-w4", "--group-size", 32, "--out", quantized)[0] == 0
    )
    call = ("build", "--model", quantized, "--prefix", "auto", "--out", intactkv_root / "auto.safetensors")
    code, _, errors = program("intactkv", *call)
    assert code == 0, errors
    (file,) = records(intactkv_root)
    assert Prefix.load(intactkv_root / "auto.safetensors").ids.tolist() == json.loads(file.read_text())["prefix"]
    shutil.move(dense, dense.with_name("elsewhere"))
    assert program("intactkv", *call)[0] == 0  # both files are kept
    file.unlink()
    code, _, errors = program("intactkv", *call)
    assert code == 2
    assert "dense full-precision model" in errors.splitlines()[-1]


@pytest.mark.parametrize(("changes", "named"), [
    (("--samples", "0"), "argument --samples: 0 is not allowed; give a whole number from 1"),
    (("--length", "200"), "--length 200: pieces take at most half of the 256 positions"),
    (("--threshold", "0.5"), "argument --threshold: 0.5 is not allowed; give a number above 1"),
    (("--ablate", "0"), "argument --ablate: 0 is not allowed"),
    (("--corpus", "nowhere"), "'nowhere'"),
    (("--corpus", "ptb"), "the text ptb is missing; run 'bash scripts/prepare/data.sh ptb', or name another: --corpus"),
    (("--out", "prefix.pt"), "a prefix file ends in .safetensors"),
])  # fmt: skip
def test_a_mistake_is_one_line(program, dense, intactkv_root, changes, named):
    code, said, errors = program("intactkv", "discover", "--model", dense, *changes)
    assert (code, said) == (2, "")
    assert named in errors.splitlines()[-1]
    assert records(intactkv_root) == []


@pytest.mark.slow
def test_behind_its_prefix_smollm2_has_lost_its_large_ratios(smollm2):
    """A few pieces only; what 64 × 512 tokens give stands in the README."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from corpora.text import calibration_segments

    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    ids = calibration_segments(AutoTokenizer.from_pretrained(smollm2), "sample", samples=6, length=128, seed=2)
    found = discover(model, ids, BOS)
    behind = largest_ratios(down_maxima(model, ids, build_prefix(model, found.prefix)))
    assert found.prefix[-1] == BOS
    assert max(found.ratios) > 1000
    assert max(behind) < 0.2 * max(found.ratios)
