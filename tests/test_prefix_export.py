"""A prefix on its way to other programs: `python -m intactkv export`, --prefix ADAPTER_DIR, stock lm-eval, and a prefix
file where no full-precision model is left."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import FOXES, ROOT
from families import random_ids
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eval.__main__ import main as eval_main
from eval.generation import own_generation
from eval.tasks.lm import IntactLM
from intactkv.__main__ import main
from intactkv.attach import attach
from intactkv.peft import CONFIG, PREFIX_FILE, read_adapter, write_adapter
from intactkv.prefix import Prefix, build_prefix
from quantization.export.writer import export_checkpoint
from quantization.grids.uniform import UniformGrid
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import load_quantized
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.prefixes import choose_prefix
from quantization.weights.rtn import RTN

BOS = 1
CLOSE = 1e-4  # nats, of sums over a few tokens in float32; logits of tiny models spread over tens
PAIRS = [*(("What is it? Answer: ", letter) for letter in "ABCD"), ("The sheep", " on the hill"), ("x", "yz"),
         ("A longer context, so that a batch of four is padded,", " ends here.")]  # fmt: skip


@pytest.fixture
def dense(tiny_checkpoint: Callable[..., Path], intactkv_root: Path) -> Path:
    """A dense checkpoint beside an empty modelzoo."""
    # As many tokens as the tokenizer has: with an adapter, stock lm-eval cuts off the rest.
    return tiny_checkpoint(intactkv_root, "llama", vocab_size=100)


@pytest.fixture
def quantized(dense: Path, intactkv_root: Path) -> Path:
    return quantize_checkpoint(dense, Recipe(weights=RTN(UniformGrid(3, 32))), intactkv_root / "w3")


@pytest.fixture
def program(run_main: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """program(*arguments, main=…) -> exit code, stdout, stderr; in this process, as torch takes seconds to import."""

    def run(*arguments: Any, main: Callable[[], None] = main) -> tuple[int, str, str]:
        return run_main(main, *arguments)

    return run


@pytest.fixture
def adapter(dense: Path, intactkv_root: Path, program: Callable[..., tuple[int, str, str]]) -> Path:
    """[BOS] of the dense checkpoint, exported from the command line."""
    out = intactkv_root / "adapter"
    code, printed, errors = program("export", "--model", dense, "--prefix", "bos", "--device", "cpu", "--out", out)
    assert code == 0, errors
    assert printed == f"1 tokens [1]  torch.float32  basis plain  {out}\n"
    return out


def loaded(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)


def text_ids(count: int) -> Tensor:
    """Ids of ordinary tokens of the smaller vocabulary, (1, count)."""
    return random_ids(count)[None].clamp_max(99)


# the program ----------------------------------------------------------------------------------------------------------


def test_help_answers_without_importing_torch_and_says_who_needs_peft() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "intactkv", "export", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "numpy", "safetensors", "peft"}
    assert done.stdout.startswith("usage: python -m intactkv export")
    for word in ("--model", "--recipe", "--prefix", "--format {peft}", "--out", "pip install peft"):
        assert word in done.stdout


def test_the_adapter_holds_what_build_writes(
    dense: Path, adapter: Path, intactkv_root: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    file = intactkv_root / "bos.safetensors"
    assert program("build", "--model", dense, "--prefix", "bos", "--device", "cpu", "--out", file)[0] == 0
    built, read = Prefix.load(file), read_adapter(adapter)
    assert read.model == built.model
    for name in ("ids", "logits", "embeddings"):
        assert torch.equal(getattr(read, name), getattr(built, name))
    for a, b in zip((*read.keys, *read.values), (*built.keys, *built.values), strict=True):
        assert torch.equal(a, b)
    assert json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"] == str(dense)


@pytest.mark.parametrize("convention", ["gptq-asym", "gptq-sym"])
def test_an_adapter_is_exported_from_a_file_for_an_export_of_quantized_weights(
    convention: str, dense: Path, intactkv_root: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    """The export has no full-precision twin, but a prefix beside."""
    recipe = Recipe(weights=RTN(UniformGrid(3, 32, convention)))
    quantized = quantize_checkpoint(dense, recipe, intactkv_root / "w3")
    export_checkpoint(quantized, intactkv_root / "ct", prefix="bos")
    beside, out = intactkv_root / "ct" / PREFIX_FILE, intactkv_root / "made"
    code, _, errors = program("export", "--model", intactkv_root / "ct", "--prefix", beside, "--out", out)
    assert code == 0, errors
    theirs = PeftModel.from_pretrained(loaded(intactkv_root / "ct"), out)
    ours, text = attach(loaded(intactkv_root / "ct"), Prefix.load(beside)), text_ids(20)
    assert (theirs(input_ids=text).logits - ours.score(text)).abs().max() < CLOSE


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no prefix": ([], "no prefix was named; name one"),
    "no such format": (["--prefix", "bos", "--format", "gguf"], "invalid choice: 'gguf'"),
    "missing model": (["--prefix", "bos", "--model", "nowhere"], "model directory nowhere is missing"),
    "missing file": (["--prefix", "nowhere.safetensors"], "prefix file nowhere.safetensors is missing"),
    "another model's file": (["--prefix", "other.safetensors"], "this prefix belongs to another model or basis"),
    "another model's adapter": (["--prefix", "other"], "this prefix belongs to another model or basis"),
    "trained in another basis": (["--prefix", "rotated.safetensors"], "basis is 'rotated' in the prefix and 'plain'"),
    "no adapter": (["--prefix", "plain"], "--prefix plain is a directory without adapter_config.json"),
    "a path that is not there": (["--prefix", "plain/adapter"], "--prefix plain/adapter looks like a path"),
    "with projection": (["--prefix", "projected"], "projected is an adapter with a projection"),
    "out that exists": (["--prefix", "bos", "--out", "plain"], "--out plain exists already"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_one_line(
    mistake: str,
    dense: Path,
    tiny_checkpoint: Callable[..., Path],
    intactkv_root: Path,
    program: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(intactkv_root)
    prefix = build_prefix(loaded(tiny_checkpoint(intactkv_root / "elsewhere", "llama", seed=1)), [BOS])
    prefix.save("other.safetensors")
    for name in ("other", "projected"):
        write_adapter(prefix, name)
    config = json.loads(Path("projected", CONFIG).read_text())
    Path("projected", CONFIG).write_text(json.dumps(config | {"prefix_projection": True}))
    Path("plain").mkdir()
    own = replace(build_prefix(loaded(dense), [BOS]), calibrated={"best_step": 1})
    own.model.__dict__["basis"] = "rotated"
    own.save("rotated.safetensors")
    arguments, words = MISTAKES[mistake]
    code, printed, errors = program("export", "--model", dense, "--out", "made", "--device", "cpu", *arguments)
    assert (code, printed) == (2, "")
    assert errors.startswith("error: ")
    assert words in errors
    assert errors.count("\n") == 1
    assert not Path("made").exists()


# the adapter as --prefix ----------------------------------------------------------------------------------------------


def test_an_adapter_directory_is_a_prefix_wherever_a_file_is(
    dense: Path, adapter: Path, intactkv_root: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    (intactkv_root / "text.txt").write_text(FOXES)
    ppl = ("ppl", "--model", dense, "--recipe", "rtn", "--bits", 3, "--group-size", 32, "--corpus",
           intactkv_root / "text.txt", "--window", 64, "--limit", 4, "--device", "cpu", "--json")  # fmt: skip
    records = {}
    for word in ("bos", adapter, adapter / PREFIX_FILE, "none"):
        code, out, errors = program(*ppl, "--prefix", word, main=eval_main)
        assert code == 0, errors
        records[word] = json.loads(out)
    assert records["bos"]["perplexity"] == records[adapter]["perplexity"] != records["none"]["perplexity"]
    by_directory, by_file = (records[word]["settings"]["prefix"] for word in (adapter, adapter / PREFIX_FILE))
    assert by_directory == by_file | {"label": "[adapter]"}


@pytest.mark.parametrize("text", ["word " * 100, "to/" + "x" * 300, "x" * 300 + "/y"])
def test_a_text_that_is_too_long_for_a_path_is_a_text(text: str, tiny_tokenizer: Callable[..., Any]) -> None:
    choice = choose_prefix(text, tiny_tokenizer(), "tiny")
    assert (choice.label, len(choice.ids)) == ("[T]", 1 + len(text))


@pytest.mark.parametrize("form", ["ours", "dense"])
def test_a_prefix_needs_no_full_precision_model(
    form: str,
    dense: Path,
    quantized: Path,
    adapter: Path,
    intactkv_root: Path,
    program: Callable[..., tuple[int, str, str]],
) -> None:
    """Neither do the adapter, the scores and the perplexity: all of the dense checkpoint is gone."""
    if form != "ours":
        export_checkpoint(quantized, intactkv_root / "export", form)
    model = quantized if form == "ours" else intactkv_root / "export"
    file, ids = intactkv_root / "bos.safetensors", torch.cat([torch.tensor([[BOS]]), text_ids(30)], dim=1)
    prefix = build_prefix(loaded(dense), [BOS])
    prefix.save(file)
    full = load_quantized(quantized)
    truth = attach(full, prefix).score(ids)
    (intactkv_root / "text.txt").write_text(FOXES)
    ppl = ("ppl", "--model", model, "--corpus", intactkv_root / "text.txt", "--window", 64, "--limit", 4, "--device",
           "cpu", "--json", "--force", "--prefix")  # fmt: skip
    before = json.loads(program(*ppl, file, main=eval_main)[1])["perplexity"]
    shutil.rmtree(dense)
    shutil.rmtree(intactkv_root / "modelzoo", ignore_errors=True)
    assert not list(intactkv_root.rglob("tiny-llama"))
    left = load_quantized(model) if form == "ours" else loaded(model)
    assert (attach(left, Prefix.load(file)).score(ids) - truth).abs().max() < CLOSE
    for word in (file, adapter):
        code, out, errors = program(*ppl, word, main=eval_main)
        assert code == 0, errors
        assert json.loads(out)["perplexity"] == before
    if form == "ours":
        code, _, errors = program(*ppl, "bos", main=eval_main)
        assert code == 2
        assert "the dense full-precision model of" in errors


# stock lm-eval --------------------------------------------------------------------------------------------------------


def likelihoods(lm: Any, pairs: list[tuple[str, str]]) -> tuple[Tensor, list[bool]]:
    """Log-likelihood (N,) and greediness of every pair."""
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    return torch.tensor([answer[0] for answer in answers], dtype=torch.float64), [answer[1] for answer in answers]


def answers(lm: Any, texts: list[str], count: int) -> list[str]:
    options = {"until": ["\n\n"], "max_gen_toks": count}
    requests = [Instance("generate_until", {}, (text, dict(options)), i) for i, text in enumerate(texts)]
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("form", ["dense", "compressed-tensors"])
def test_stock_lm_eval_gives_our_scores(form: str, quantized: Path, adapter: Path, intactkv_root: Path) -> None:
    out = intactkv_root / "export"
    export_checkpoint(quantized, out, form)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ours = IntactLM(attach(loaded(out), read_adapter(adapter)), tokenizer, (BOS,), batch_size=4, context=256,
                    generation=own_generation(out, tokenizer))  # fmt: skip
    options: dict[str, Any] = {"batch_size": 4, "device": "cpu", "dtype": "float32", "max_length": 256}
    theirs = HFLM(str(out), peft=str(adapter), add_bos_token=False, **options)
    (expected, greedy), (found, theirs_greedy) = likelihoods(ours, PAIRS), likelihoods(theirs, PAIRS)
    assert (found - expected).abs().max() < CLOSE
    assert greedy == theirs_greedy
    assert (
        likelihoods(HFLM(str(out), add_bos_token=True, **options), PAIRS)[0] - expected
    ).abs().max() > 0.1  # vanilla
    texts = ["The sheep", "x", "A longer context, so that a batch of four is padded,", "What is it?"]
    assert answers(ours, texts, 16) == answers(theirs, texts, 16)


def test_a_symmetric_export_that_stays_packed_is_scored_as_our_own(dense: Path, adapter: Path, tmp_path: Path) -> None:
    """compressed-tensors unpacks it when the whole model is called, so its decoder cannot be called apart."""
    ours = quantize_checkpoint(dense, Recipe(weights=RTN(UniformGrid(4, 32, "gptq-sym"))), tmp_path / "w4")
    export_checkpoint(ours, tmp_path / "export", "compressed-tensors")
    tokenizer, prefix = AutoTokenizer.from_pretrained(dense), read_adapter(adapter)
    expected, found = (
        likelihoods(IntactLM(attach(model, prefix), tokenizer, (BOS,), batch_size=4, context=256), PAIRS)
        for model in (load_quantized(ours), loaded(tmp_path / "export"))
    )
    assert (found[0] - expected[0]).abs().max() < CLOSE
    assert found[1] == expected[1]


def test_a_tokenizer_that_adds_bos_by_itself_must_be_told_not_to(dense: Path, adapter: Path) -> None:
    """The prefix is the [BOS]: another one in front of the text changes every score."""
    options: dict[str, Any] = {"peft": str(adapter), "batch_size": 4, "device": "cpu", "dtype": "float32"}
    told, by_itself = HFLM(str(dense), add_bos_token=False, **options), HFLM(str(dense), **options)
    assert by_itself.tok_encode("a")[0] == BOS
    assert (likelihoods(told, PAIRS)[0] - likelihoods(by_itself, PAIRS)[0]).abs().max() > 0.1
    assert "add_bos_token=False" in (adapter / "README.md").read_text()


# the real model -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_behind_its_bos_is_the_same_through_peft(smollm2: Path, smollm2_w4: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    bos = tokenizer.bos_token_id
    write_adapter(build_prefix(loaded(smollm2), [bos]), tmp_path / "adapter")
    ours = attach(load_quantized(smollm2_w4), read_adapter(tmp_path / "adapter"))
    theirs = PeftModel.from_pretrained(load_quantized(smollm2_w4), tmp_path / "adapter").eval()
    texts = [
        "The river had risen in the night, and by morning the lower field was a lake.",
        "Name three colours:",
        "Anna counted the sheep that had made it to the hill: forty-one. There should have been",
        "Once",
    ]
    batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits * mask[..., None]
    difference = float((logits - ours.score(ids, mask)).abs().max())
    without = attach(ours.model, None).score(ids, mask)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    texts_theirs = theirs.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(texts_theirs, ours.generate(ids, mask, prepend=True, **options))

    pairs = [
        (texts[0], " The sheep were gone."),
        (texts[1], " red"),
        (texts[1], " green and blue"),
        (texts[2], " forty"),
    ]
    lm = IntactLM(ours, tokenizer, (bos,), batch_size=4, context=2048)
    stock = HFLM(theirs, tokenizer=tokenizer, add_bos_token=False, batch_size=4, max_length=2048)
    scores = likelihoods(lm, pairs)[0], likelihoods(stock, pairs)[0]
    shift = float((scores[0] - scores[1]).abs().max())
    effect = float((logits - without).abs().max())
    print(f"logits {difference:.1e} (the prefix moves them by {effect:.1e})  lm-eval {shift:.1e}")
    assert difference < 1e-3  # thirty layers with hidden values up to 24,800 in float32
    assert shift < 1e-3
