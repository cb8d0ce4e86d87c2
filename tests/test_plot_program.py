"""The program `python -m eval plot`, from the outside: its files, what stands in them, and its refusals."""

import csv
import json
import os
import re
import subprocess
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import pytest
import torch
from common import FOXES, ROOT, SMOLLM2, refusals

from corpora.errors import Parser
from corpora.files import sha256_of_file
from corpora.sharegpt import VICUNA_SYSTEM
from eval.plots.canvas import plt
from eval.plots.linear_ranges import token_ranges
from eval.programs import plot
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.observe import attention_mass, down_input, token_maxima

LINEAR_INPUTS = ("q_proj", "o_proj", "gate_proj", "down_proj")

# kind -> (options, what they add to the name of its files, parts that it draws)
SMALL = ("--tokens", "24")
PIECES = ("--tokens", "24", "--samples", "3")
LAYERS = ("--layers", "0,2")
KINDS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "pivots": (SMALL, "1x24", ("",)),
    "act": ((*SMALL, *LAYERS), "1x24", ("layer0", "layer2")),
    "attn": ((*SMALL, "--layers", "step:2", "--samples", "2"), "2x24", ("layer0", "layer2")),
    "kv-smooth": ((*SMALL, "--samples", "2"), "2x24", ("",)),
    "linear-input": (PIECES, "3x24", ("", *LINEAR_INPUTS)),
    "linear-output": ((*PIECES, "--log", "--pre-rope"), "3x24__log__pre-rope", ("", "query", "key", "value")),
    "outlier-layers": (PIECES, "3x24", ("",)),
    "outlier-count": ((*PIECES, "--outlier-threshold", "1.5"), "3x24__eta1.5", ("",)),
    "outlier-position": ((*PIECES, "--outlier-object", "hidden_state", "--outlier-threshold", "1.5", "--text-seed",
                          "5"), "3x24__seed5__hidden_state__eta1.5", ("",)),
    "outlier-content": ((*PIECES, "--outlier-threshold", "1.5", "--bos-first"), "3x24__bos-first__eta1.5", ("",)),
    "layer-input-3d": ((*SMALL, "--layers", "1", "--log"), "1x24__log",
                       (*(f"{name}__layer1" for name in LINEAR_INPUTS), "lm_head")),
    "block-output-3d": ((*SMALL, *LAYERS), "1x24", ("layer0", "layer2")),
}  # fmt: skip
WITHOUT_PREFIX = ("pivots", "kv-smooth")


@pytest.fixture
def model(intactkv_root, tiny_checkpoint) -> Path:
    """A tiny checkpoint whose [BOS] (id 1) is a pivot: one channel of its embedding dwarfs the rest."""
    from safetensors.torch import load_file, save_file

    directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama")
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][1, 11] = 5000.0
    save_file(tensors, file, {"format": "pt"})
    return directory


@pytest.fixture
def program(run_main):
    """program(kind, options…) -> (exit code, stdout, stderr), run in this process."""

    def main() -> None:
        top: ArgumentParser = Parser(prog="eval")
        plot.add(top.add_subparsers(dest="command", required=True))
        plot.run(top.parse_args())

    return partial(run_main, main, "plot")


def names_of(stem: str, parts: tuple[str, ...], suffixes: tuple[str, ...]) -> set[str]:
    return {f"{stem}{f'__{part}' if part else ''}.{suffix}" for part in parts for suffix in suffixes}


def text_part(text: Path) -> str:
    """A text file in the names of figures."""
    return f"{text.stem.replace(' ', '-')}-{sha256_of_file(text)[:8]}"


def comments(path: Path) -> str:
    """The words on a figure: SVG keeps them as comments beside the drawn letters."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"), re.DOTALL))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_writes_exactly_the_announced_files_and_says_what_it_shows(
    kind, program, model, text, intactkv_root, monkeypatch
):
    monkeypatch.delenv("DISPLAY", raising=False)
    options, named, parts = KINDS[kind]
    out = intactkv_root / "figures"
    code, stdout, stderr = program(kind, "--model", model, "--corpus", text, *options, "--out", out,
                                   "--format", "svg", "--dpi", 50)  # fmt: skip
    assert code == 0, stderr
    suffixes = ("svg", "csv", "json") if kind == "kv-smooth" else ("svg", "csv")
    expected = names_of(f"tiny-llama__{kind}__{text_part(text)}-{named}", parts, suffixes)
    assert {path.name for path in out.iterdir()} == expected
    assert {Path(line).name for line in stdout.splitlines() if line.startswith(str(out))} == expected
    assert all(path.stat().st_size > 30 for path in out.iterdir())
    for picture in out.glob("*.svg"):
        words = comments(picture)
        assert "tiny-llama" in words
        assert "24 tokens of" in words
        assert "some text.txt" in words
    assert plt.get_fignums() == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITHOUT_PREFIX])
def test_with_a_prefix_and_a_quantized_model_both_arms_stand_side_by_side(kind, program, model, text, intactkv_root):
    options, named, parts = KINDS[kind]
    out = intactkv_root / "figures"
    code, _, stderr = program(kind, "--model", model, "--recipe", "rtn-w4", "--group-size", 32, "--prefix", "bos",
                              "--corpus", text, *options, "--out", out, "--format", "svg")  # fmt: skip
    assert code == 0, stderr
    (weights,) = (intactkv_root / "modelzoo" / "quantized" / "tiny-llama").glob("rtn-w4g32-*[0-9a-f]")
    stem = f"tiny-llama-{weights.name}__{kind}__bos__{text_part(text)}-{named}"
    assert {path.name for path in out.glob("*.svg")} == names_of(stem, parts, ("svg",))
    for picture in out.glob("*.svg"):
        words = comments(picture)
        assert "without an intact prefix" in words
        assert "behind the intact prefix [B]" in words
    for table in out.glob("*.csv"):
        rows = list(csv.DictReader(table.open(encoding="utf-8")))
        assert "none" in {row["prefix"] for row in rows} or "outlier" in kind
        if "position" in rows[0] and kind.endswith("3d"):  # the prefix's own tokens are not drawn
            assert {row["position"] for row in rows if row["prefix"] == "[B]"} <= {str(i) for i in range(1, 25)}


@pytest.mark.parametrize(
    ("kind", "variants"),
    [
        ("outlier-count", ("", "--outlier-threshold 32", "--outlier-object hidden_state", "--bos-first",
                           "--text-seed 1", "--samples 2", "--tokens 25", "--corpus OTHER", "--dtype bfloat16")),
        ("outlier-count", [f"--prefix {prefix}" for prefix in ("none", "bos", "fox", "dog", "ONE", "TWO")]),
        ("outlier-count", [f"--recipe rtn-w4 --group-size 32 --set weights.grid.convention=gptq-{convention}"
                           for convention in ("asym", "sym")]),
        ("linear-output", ("", "--pre-rope", "--log", "--pre-rope --log")),
    ],
)  # fmt: skip
def test_figures_of_different_settings_never_overwrite_each_other(kind, variants, program, model, text, intactkv_root):
    from intactkv.prefix import build_prefix

    folders = {name: intactkv_root / name for name in ("ONE", "TWO", "OTHER")}
    places = {name: folder / "same name.safetensors" for name, folder in folders.items()} | {
        "OTHER": folders["OTHER"] / text.name
    }
    for token, name in enumerate(("ONE", "TWO"), start=5):
        build_prefix(loaded(model), (1, token)).save(places[name])
    folders["OTHER"].mkdir()
    places["OTHER"].write_text(FOXES.upper())
    common = (kind, "--model", model, *PIECES, "--out", intactkv_root / "f", "--format", "svg", "--dpi", 50)
    for variant in variants:
        options = [places.get(word, word) for word in variant.split()]
        code, _, err = program(*common, "--corpus", text, *options)
        assert code == 0, err
    figures_and_tables = 2 * len(KINDS[kind][2])
    assert len(list((intactkv_root / "f").iterdir())) == len(variants) * figures_and_tables


def test_the_first_tokens_share_of_the_hessian_is_drawn_for_the_text_that_is_named(program, model, text, intactkv_root):
    out = intactkv_root / "figures"
    common = ("hessian", "--model", model, "--calibration", text, "--out", out, "--format", "svg")
    code, _, err = program(*common, "--calibration-samples", 2, "--calibration-length", 24)
    assert code == 0, err
    stem = f"tiny-llama__hessian__{text_part(text)}-2x24"
    assert {path.name for path in out.iterdir()} == names_of(stem, ("",), ("svg", "csv"))
    assert "2 × 24 tokens of some text.txt" in comments(out / f"{stem}.svg")
    shares = [float(row["share"]) for row in csv.DictReader((out / f"{stem}.csv").open())]
    assert (len(shares), min(shares) > 0, max(shares) < 1) == (2 * 4 * 3, True, True)
    for samples, length, named in (
        (0, 24, "samples: 0"),
        (-1, 24, "samples: -1"),
        (2, 0, "length: 0"),
        (2, 257, "256"),
    ):
        code, _, err = program(*common, "--calibration-samples", samples, "--calibration-length", length)
        assert (code, named in err.splitlines()[-1]) == (2, True), err
    assert len(list(out.iterdir())) == 2


def test_tokens_are_written_as_they_are_and_repeated_ones_are_told_apart(program, model, intactkv_root):
    text = intactkv_root / "money.txt"
    text.write_text("a$a $b$ " * 40)
    common = ("--model", model, "--corpus", text, *SMALL)
    assert program("pivots", *common, "--out", intactkv_root / "pivots.svg")[0] == 0
    head = next(csv.reader((intactkv_root / "pivots.csv").open()))
    assert head[:7] == ["layer", "median", "0: <s>", "1: a", "2: $", "3: a", "4:  "]
    assert len(set(head)) == 2 + 24
    words = comments(intactkv_root / "pivots.svg")
    assert ("$" in words, "\\$" in words) == (True, False)
    assert program("outlier-content", *common, "--outlier-threshold", 1.01, "--out", intactkv_root / "o.svg")[0] == 0
    found = {row["token"] for row in csv.DictReader((intactkv_root / "o.csv").open())}
    assert "'$'" in found


def loaded(directory: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)


def ids_of(directory: Path, length: int) -> torch.Tensor:
    from quantization.runs.opening import load_tokenizer

    ids = load_tokenizer(directory)(FOXES, add_special_tokens=False)["input_ids"]
    return torch.tensor([[1, *ids][:length]])


def test_the_csv_reproduces_the_drawn_arrays(program, model, text, intactkv_root):
    out, common = intactkv_root, ("--model", model, "--corpus", text, "--tokens", 24, "--format", "svg")
    ids, plain = ids_of(model, 24), loaded(model)
    assert program("attn", *common, "--layers", 1, "--out", out / "attn.svg")[0] == 0
    assert program("act", *common, "--layers", 1, "--out", out / "act.svg")[0] == 0
    mass = attention_mass(attach(plain, None), ids, [1])[1]
    rows = list(csv.DictReader((out / "attn__layer1.csv").open()))
    assert len(rows) == 24 * 25 // 2
    for row in rows:
        assert float(row["attention"]) == pytest.approx(float(mass[int(row["query"]), int(row["key"])]), rel=1e-4)
    state = plain(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[2][0]
    rows = list(csv.DictReader((out / "act__layer1.csv").open()))
    assert [int(row["position"]) for row in rows] == list(range(24))
    drawn = torch.tensor([[float(row[f"channel {c}"]) for c in range(64)] for row in rows])
    torch.testing.assert_close(drawn, state.abs(), rtol=1e-4, atol=1e-4)


def test_the_csv_of_ranges_holds_their_order_statistics(program, model, text, intactkv_root):
    from corpora.text import calibration_segments
    from quantization.runs.opening import load_tokenizer

    arguments = ("--model", model, "--corpus", text, *PIECES, "--text-seed", 5, "--out", intactkv_root / "x.svg")
    assert program("linear-input", *arguments)[0] == 0
    pieces = calibration_segments(load_tokenizer(model), str(text), samples=3, length=24, seed=5)
    plain = loaded(model)
    site = down_input(architecture_of(plain.config))
    truth = token_ranges(token_maxima(attach(plain, None), pieces, (site,))[site.name])
    rows = list(csv.DictReader((intactkv_root / "x__down_proj.csv").open()))
    assert len(rows) == 5 * 3
    for row in rows:
        assert float(row["maximum"]) == pytest.approx(float(truth[row["line"]][int(row["block"])]), rel=1e-4)


def test_smoothness_is_a_table_and_the_same_numbers_as_json(program, model, text, intactkv_root):
    code, out, _ = program("kv-smooth", "--model", model, "--corpus", text, *SMALL, "--out", intactkv_root / "kv.svg")
    assert code == 0
    record = json.loads((intactkv_root / "kv.json").read_text())
    assert record["pivots"] == [{"position": 0, "token": "<s>"}]
    rows = list(csv.DictReader((intactkv_root / "kv.csv").open()))
    for mean in record["means_over_layers"]:
        mine = [row for row in rows if (row["tensor"], row["statistic"]) == (mean["tensor"], mean["statistic"])]
        assert len(mine) == 3
        assert sum(float(row["pivots"]) for row in mine) / 3 == pytest.approx(mean["pivots"], rel=1e-4)
        assert f"{mean['ratio']:.2f}" in out
    plain = loaded(model)
    kept = attach(plain, None).new_cache()
    attach(plain, None).feed(ids_of(model, 24), cache=kept)
    values = torch.stack([layer.held[1][0].transpose(0, 1).reshape(24, -1) for layer in kept.intact_layers]).abs()
    (largest,) = (m for m in record["means_over_layers"] if (m["tensor"], m["statistic"]) == ("V", "largest magnitude"))
    assert largest["pivots"] == pytest.approx(float(values.amax(-1)[:, 0].mean()), rel=1e-4)
    assert largest["others"] == pytest.approx(float(values.amax(-1)[:, 1:].mean()), rel=1e-4)


def test_a_sharegpt_conversation_is_the_default_and_its_system_prompt_ends_at_the_line(
    program, model, intactkv_root, tiny_tokenizer
):
    turns = [{"from": role, "value": FOXES[:400]} for role in ("human", "gpt", "human", "gpt")]
    folder = intactkv_root / "datasets" / "ShareGPT_Vicuna_unfiltered"
    folder.mkdir(parents=True)
    file = folder / "ShareGPT_V4.3_unfiltered_cleaned_split.json"
    file.write_text(json.dumps([{"id": "a", "conversations": turns}]))
    for kind in ("act", "attn"):
        out = intactkv_root / f"{kind}.svg"
        code, _, err = program(kind, "--model", model, "--tokens", 200, "--layers", 0, "--prefix", "bos", "--out", out)
        assert code == 0, err
        words = comments(intactkv_root / f"{kind}__layer0.svg")
        assert "first 200 tokens of a ShareGPT conversation" in words
        assert words.count("end of the system prompt") == 2
    assert len(tiny_tokenizer()(VICUNA_SYSTEM)["input_ids"]) < 200
    short = program("act", "--model", model, "--tokens", 100, "--layers", 0, "--out", intactkv_root / "short.svg")
    assert short[0] == 0
    assert "system prompt" not in comments(intactkv_root / "short__layer0.svg")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("act", "--tokens", 10_000), "256 positions"),
        (("attn", "--tokens", 200, "--samples", 90), "ask for less"),
        (("act", "--tokens", 1), "--tokens 1"),
        (("attn", "--samples", 0), "--samples: 0 is not allowed"),
        (("act", "--layers", "0,3"), "layers 0 to 2, but no 3"),
        (("act", "--layers", "all"), "--layers all"),
        (("act", "--layers", "step:0"), "--layers step:0"),
        (("act", "--layers", "step:-1"), "--layers step:-1"),
        (("act", "--layers", ""), "--layers"),
        (("act", "--format", "png,gif"), "'gif'"),
        (("linear-input", "--samples", 2, "--tokens", 250, "--prefix", "the quick brown fox"), "256 positions"),
        (("linear-input", "--samples", 2, "--tokens", 2), "at least 3"),
        (("outlier-count", "--outlier-object", "q_proj"), "hidden_state"),
        (("outlier-count", "--outlier-threshold", "1"), "give a number above 1"),
        (("act", "--tokens", 6, "--prefix", "TEXT"), "more with --tokens"),
        (("act", "--recipe", "rtn-w9"), "rtn-w9"),
        (("act", "--out", "x.jpg"), "x.jpg"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, named, program, model, text, intactkv_root):
    arguments = [FOXES[:5] if word == "TEXT" else word for word in arguments]
    given = () if "--out" in arguments else ("--out", intactkv_root / "figures")
    size = () if "--tokens" in arguments else ("--tokens", 16)
    code, out, err = program(*arguments, "--model", model, "--corpus", text, *size, *given)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert named in lines[0]
    assert not list(intactkv_root.rglob("*.svg")) + list(intactkv_root.rglob("*.png"))


def test_absent_text_an_unknown_architecture_and_a_text_without_pivots_are_named(
    program, model, text, intactkv_root, tiny_checkpoint
):
    code, _, err = program("act", "--model", model, "--out", intactkv_root / "f")
    assert (code, "ShareGPT conversations are missing" in err) == (2, True)
    config = json.loads((model / "config.json").read_text())
    plain = tiny_checkpoint(intactkv_root / "other", "llama")
    code, _, err = program("kv-smooth", "--model", plain, "--corpus", text, *SMALL, "--out", intactkv_root / "f")
    assert (code, "0 of 24 tokens are pivot tokens" in err) == (2, True)
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mpt"}))
    code, _, err = program("act", "--model", model, "--corpus", text, "--out", intactkv_root / "f")
    assert (code, "'mpt' is not in the architecture table" in err) == (2, True)


def test_without_out_the_figures_lie_in_the_outputs_as_png_and_pdf(program, model, text, intactkv_root):
    assert program("pivots", "--model", model, "--corpus", text)[0] == 0
    found = {path.name for path in (intactkv_root / "outputs" / "figures").iterdir()}
    assert found == names_of(f"tiny-llama__pivots__{text_part(text)}", ("",), ("png", "pdf", "csv"))


def values(directory: Path) -> dict[str, str]:
    """What the figures of a directory show, by their part of the name."""
    return {path.name.partition("__")[2]: path.read_text(encoding="utf-8") for path in directory.glob("*.csv")}


@pytest.mark.parametrize("kind", ["pivots", "act", "attn", "linear-input", "outlier-count", "block-output-3d"])
def test_figures_show_the_model_with_its_cache_rounded(kind, program, model, text, intactkv_root):
    options, _, _ = KINDS[kind]
    shown = []
    for kv in ((), ("--kv-bits", 2), ("--kv", "rotated", "--kv-bits", 2)):
        out = intactkv_root / f"figures{len(shown)}"
        code, _, stderr = program(kind, "--model", model, "--corpus", text, *options, *kv, "--out", out,
                                  "--format", "svg")  # fmt: skip
        assert code == 0, stderr
        shown.append(values(out))
        names = {path.name.split("__")[0] for path in out.iterdir()}
        assert names == {"tiny-llama" + {0: "", 1: "-KV-PerHead-2", 2: "-KV-Rotated-2"}[len(shown) - 1]}
    assert shown[0].keys() == shown[1].keys() == shown[2].keys()
    assert shown[0] != shown[1] != shown[2]


def test_a_figure_of_a_method_that_calibrates_takes_its_text(program, model, text, intactkv_root):
    out = intactkv_root / "figures"
    for samples in (2, 3):
        code, _, stderr = program("linear-input", "--model", model, "--corpus", text, *PIECES, "--recipe", "gptq",
                                  "--group-size", 32, "--calibration", text, "--calibration-samples", samples,
                                  "--calibration-length", 32, "--out", out, "--format", "svg")  # fmt: skip
        assert code == 0, stderr
    assert len({path.name.split("__")[0] for path in out.iterdir()}) == 2  # two checkpoints, each by its identity
    code, _, stderr = program("act", "--model", model, "--corpus", text, *SMALL, "--recipe", "rtn",
                              "--calibration-samples", 2)  # fmt: skip
    assert code == 2
    assert "calibrates on no text" in stderr


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("plot_act", ("smollm2", "135m"), "got 2 of 3"),
        ("plot_act", ("smollm2", "135m", "gpu"), "device 'gpu'"),
        ("plot_act", ("no-such", "7b", "cpu"), "no-such-7b is"),
        ("prefixquant", ("cpu",), "got 1 of 2"),
        ("prefixquant", ("cpu", "no-such-model"), "no-such-model"),
    ],
)
def test_a_mistake_in_a_script_is_one_line(script, arguments, named):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("scripts/setup.sh has not made .venv")
    done = subprocess.run(["bash", f"scripts/visualization/{script}.sh", *arguments], cwd=ROOT, capture_output=True,
                          text=True, check=False, env=os.environ | {"INTACTKV_ROOT": str(ROOT)})  # fmt: skip
    assert done.returncode == 2
    assert len(refusals(done.stderr)) == 1, done.stderr
    assert named in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_the_intact_bos_of_smollm2_takes_the_outliers_out_of_its_down_projections(program, tmp_path):
    code, _, err = program("linear-input", "--model", SMOLLM2, "--samples", 1, "--tokens", 256, "--prefix", "bos",
                           "--bos-first", "--format", "png", "--out", tmp_path)  # fmt: skip
    assert code == 0, err
    stem = "smollm2-135m__linear-input__bos__1x256__bos-first"
    rows = list(csv.DictReader((tmp_path / f"{stem}__down_proj.csv").open()))
    largest = {arm: max(float(row["maximum"]) for row in rows if row["prefix"] == arm) for arm in ("none", "[B]")}
    assert largest["none"] > 1000
    assert largest["none"] > 10 * largest["[B]"]


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_the_published_call_draws_smollm2(tmp_path):
    done = subprocess.run(["bash", "scripts/visualization/plot_act.sh", "smollm2", "135m", "cpu"], cwd=ROOT,
                          capture_output=True, text=True, check=False,
                          env=os.environ | {"LAYERS": "20", "OUT": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {path.name for path in tmp_path.glob("*.png")}
    assert found == names_of("smollm2-135m", ("act__layer20", "attn__layer20", "kv-smooth"), ("png",))
    assert "Loading weights" not in done.stderr  # no foreign progress bar
