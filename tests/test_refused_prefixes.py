"""What cannot be is refused before the work, and leaves nothing on the disk; what is damaged serves no figure."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eval.__main__ import main as evaluate
from intactkv.__main__ import main as intactkv
from intactkv.prefix import build_prefix
from quantization.__main__ import main as quantize
from quantization.runs.opening import load_model

Run = Callable[..., tuple[int, str, str]]
PROGRAMS = {
    "build": intactkv,
    "calibrate": intactkv,
    "discover": intactkv,
    "train-prefix": intactkv,
    "export": intactkv,
}
OUT = {"discover": (), "export": ("--out", "ROOT/adapter")}
CPU = torch.device("cpu")


@pytest.fixture
def files(intactkv_root: Path) -> Callable[[], dict[str, str]]:
    """All that lies there, with its hash; caches of tokens, which belong to a text alone, are left out."""

    def look() -> dict[str, str]:
        return {
            str(path.relative_to(intactkv_root)): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else ""
            for path in sorted(intactkv_root.rglob("*"))
            if not path.is_relative_to(intactkv_root / "outputs")
        }

    return look


@pytest.fixture
def call(run_main: Run, intactkv_root: Path, text: Path) -> Run:
    """call(program, arguments…), where TEXT and ROOT stand for the text and the place of everything."""

    def run(program: str, *arguments: object) -> tuple[int, str, str]:
        words = [str(word).replace("ROOT", str(intactkv_root)).replace("TEXT", str(text)) for word in arguments]
        if program in PROGRAMS:
            out = OUT.get(program, ("--out", "ROOT/out.safetensors"))
            words = [program, *words, *(str(word).replace("ROOT", str(intactkv_root)) for word in out)]
            return run_main(PROGRAMS[program], *words)
        if program == "quantize":
            return run_main(quantize, *words)
        return run_main(evaluate, program, *words, "--corpus", text, "--window", 32, "--limit", 2)

    return run


# What does not fit ----------------------------------------------------------------------------------------------------

GPTQ = ("--recipe", "gptq", "--group-size", 16, "--calibration", "TEXT", "--calibration-samples", 2)
LONG = "x" * 300
FITS: dict[str, tuple[str, tuple[object, ...], str]] = {  # 256 positions, 101 tokens
    "calibration": ("quantize", (*GPTQ, "--calibration-length", 257), "--calibration-length 257: 257 tokens"),
    "behind a prefix": (
        "quantize",
        (*GPTQ, "--calibration-length", 254, "--prefix", "ab", "--calibrate-behind-prefix"),
        "use --calibration-length 253 or fewer",
    ),
    "calibration of a run": ("ppl", (*GPTQ, "--calibration-length", 900), "--calibration-length 900: 900 tokens"),
    "a text": ("build", ("--prefix", LONG), f"--prefix {'x' * 40}…: 302 tokens"),
    "a text in front of a run": ("ppl", ("--prefix", LONG), f"--prefix {'x' * 40}…: 302 tokens"),
    "a text behind which quantizing runs": (
        "quantize",
        (*GPTQ, "--calibration-length", 32, "--prefix", LONG, "--calibrate-behind-prefix"),
        f"--prefix {'x' * 40}…: 302 tokens",
    ),
    "as an adapter": ("export", ("--prefix", LONG), "302 tokens"),
    "vanilla": ("ppl", ("--prefix", LONG, "--vanilla"), "302 tokens"),
    "conversations": (
        "calibrate",
        ("--recipe", "rtn-w3", "--group-size", 16, "--prefix", "bos", "--max-length", 257, "--conversations", "sample"),
        "--max-length 257: 257 tokens",
    ),
    "pieces of a training": (
        "train-prefix",
        ("--prefix", "bos", "--corpus", "TEXT", "--prefix-len", 8, "--length", 249),
        "--length 249: 257 tokens",
    ),
    "pieces behind a longer discrete prefix": (
        "train-prefix",
        (
            "--prefix",
            "ab" * 20,
            "--corpus",
            "TEXT",
            "--samples",
            2,
            "--held-out",
            1,
            "--prefix-len",
            2,
            "--length",
            220,
        ),
        "--length 220: 261 tokens",
    ),
    "pieces of a discovery": (
        "discover",
        ("--corpus", "TEXT", "--length", 129),
        "--length 129: pieces take at most half",
    ),
    "a word that the model never got": ("build", ("--prefix", "ab fox"), "lie outside the vocabulary of 101"),
}


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("what", FITS)
def test_what_does_not_fit_the_model_is_told_by_the_plan(
    what: str,
    model_type: str,
    tiny_checkpoint: Callable[..., Path],
    tiny_tokenizer: Callable[..., object],
    intactkv_root: Path,
    call: Run,
    files: Callable[[], dict[str, str]],
) -> None:
    model = tiny_checkpoint(intactkv_root, model_type)
    if "never got" in what:
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens([f"fo{letter}" for letter in "pqrstuvwx"])  # type: ignore[attr-defined]
        tokenizer.save_pretrained(model)  # type: ignore[attr-defined]
    before = files()
    program, arguments, words = FITS[what]
    code, out, err = call(program, "--model", model, *arguments)
    assert (code, out) == (2, ""), err
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")
    assert files() == before


def test_what_just_fits_is_taken(tiny_checkpoint: Callable[..., Path], intactkv_root: Path, call: Run) -> None:
    for model_type in ("llama", "opt"):
        model = tiny_checkpoint(intactkv_root, model_type)
        behind = (*GPTQ, "--calibration-length", 253, "--prefix", "ab", "--calibrate-behind-prefix")
        code, _, err = call("quantize", "--model", model, *behind, "--out", intactkv_root / f"{model_type}-w4")
        assert code == 0, err
        code, _, err = call("build", "--model", model, "--prefix", "x" * 254)
        assert code == 0, err


def test_a_prefix_that_fills_a_sliding_window_is_told_before_the_quantizing(
    tiny_checkpoint: Callable[..., Path], intactkv_root: Path, call: Run, files: Callable[[], dict[str, str]]
) -> None:
    model = tiny_checkpoint(intactkv_root, "mistral", sliding_window=8)
    before = files()
    code, _, err = call("ppl", "--model", model, "--recipe", "rtn-w4", "--group-size", 16, "--prefix", "abcdefgh")
    assert code == 2
    assert "--prefix abcdefgh: 9 tokens do not fit the sliding window of 8" in err
    assert files() == before


# What is damaged or another's -----------------------------------------------------------------------------------------


def nan(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})


def incomplete(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [nan, incomplete, truncated])
def test_nothing_is_built_of_a_damaged_model(
    damage: Callable[[Path], None],
    tiny_checkpoint: Callable[..., Path],
    intactkv_root: Path,
    call: Run,
    files: Callable[[], dict[str, str]],
) -> None:
    model = tiny_checkpoint(intactkv_root, "llama")
    damage(model / "model.safetensors")
    before = files()
    train = ("--corpus", "TEXT", "--samples", 2, "--held-out", 1, "--prefix-len", 2, "--length", 32)
    for program, arguments in (
        ("build", ("--prefix", "bos")),
        ("build", ("--prefix", "auto:TEXT")),
        ("export", ("--prefix", "bos")),
        ("discover", ("--corpus", "TEXT", "--samples", 4)),
        ("train-prefix", ("--prefix", "bos", *train)),
        ("ppl", ("--prefix", "bos")),
        ("ppl", ("--prefix", "auto:TEXT")),
    ):
        code, _, err = call(program, "--model", model, *arguments)
        assert (code, err.splitlines()[-1][:7]) == (2, "error: "), err
        assert files() == before, (program, arguments)


def test_no_prefix_is_kept_for_a_checkpoint_that_is_refused(
    checkpoint: Callable[..., Path], intactkv_root: Path, call: Run, files: Callable[[], dict[str, str]]
) -> None:
    made = intactkv_root / "w4"
    code, _, err = call("quantize", "--model", checkpoint(), "--recipe", "rtn-w4", "--group-size", 16, "--out", made)
    assert code == 0, err
    block = made / "block-001.safetensors"
    whole = block.read_bytes()
    block.write_bytes(whole[:-1000] + bytes(900) + whole[-100:])
    before = files()
    code, _, err = call("ppl", "--model", made, "--prefix", "bos")
    assert code == 2
    assert "block-001.safetensors" in err
    assert files() == before
    block.write_bytes(whole)
    code, _, err = call("ppl", "--model", made, "--prefix", "bos")
    assert code == 0, err
    assert set(files()) - set(before)  # the prefix, now


@pytest.mark.parametrize("where", ["file", "adapter"])
def test_a_prefix_of_another_model_or_a_changed_one_is_refused_by_every_program(
    where: str,
    tiny_checkpoint: Callable[..., Path],
    checkpoint: Callable[..., Path],
    intactkv_root: Path,
    call: Run,
    files: Callable[[], dict[str, str]],
) -> None:
    model = checkpoint()
    prefix = intactkv_root / ("p.safetensors" if where == "file" else "p")
    build = ("build", "--model", model, "--prefix", "hello")
    code, _, err = call(*(build if where == "file" else ("export", *build[1:])))
    assert code == 0, err
    (intactkv_root / ("out.safetensors" if where == "file" else "adapter")).rename(prefix)
    file = prefix if where == "file" else prefix / "intactkv-prefix.safetensors"
    runs = (
        ("ppl", ("--prefix", prefix)),
        ("ppl", ("--prefix", prefix, "--vanilla")),
        ("ppl", ("--prefix", prefix, "--recipe", "rtn-w4", "--group-size", 16, "--kernel", "auto")),
        ("build", ("--prefix", prefix)),
        ("export", ("--prefix", prefix)),
        ("quantize", (*GPTQ, "--calibration-length", 32, "--prefix", prefix, "--calibrate-behind-prefix")),
        ("calibrate", ("--recipe", "rtn-w3", "--group-size", 16, "--prefix", prefix, "--conversations", "sample")),
    )
    other = tiny_checkpoint(intactkv_root / "others", "llama", seed=1)
    before = files()
    for program, arguments in runs:
        code, _, err = call(program, "--model", other, *arguments)
        assert code == 2, (program, arguments)
        assert "this prefix belongs to another model or basis: fingerprint is" in err
        assert files() == before
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["layers.0.key"].neg_()
    save_file(tensors, file, metadata)
    before = files()
    for program, arguments in runs:
        code, _, err = call(program, "--model", model, *arguments)
        assert code == 2, (program, arguments)
        assert f"prefix file {file} has changed since it was written" in err
        assert files() == before


# Trained for something else -------------------------------------------------------------------------------------------


def test_a_prefix_that_was_trained_behind_another_kv_policy_is_told(
    checkpoint: Callable[..., Path], intactkv_root: Path, call: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """By file and by adapter, on the same weights."""
    model, file = checkpoint(), intactkv_root / "trained.safetensors"
    kv = {"kind": "PerHead", "bits": 4}
    plain = build_prefix(load_model(model, torch.float32, CPU), [1, 20, 30])
    weights = {"weights": "fp16", "made_of": {"source": plain.model.fingerprint}, "kv": kv}
    trained = {"for": weights, "conversations": {"source": "sample"}}
    replace(plain, calibrated=trained).save(file)
    for prefix in (file, intactkv_root / "adapter"):
        code, _, err = call("ppl", "--model", model, "--prefix", prefix)
        assert code == 0, err
        assert (
            'was trained behind the KV policy {"bits": 4, "kind": "PerHead"}; that of this run is none' in caplog.text
        )
        assert "was trained for the weights" not in caplog.text
        caplog.clear()
        if prefix == file:
            code, _, err = call("export", "--model", model, "--prefix", file)
            assert code == 0, err
            told = (intactkv_root / "adapter" / "README.md").read_text()
            assert "trained for the weights fp16" in told
