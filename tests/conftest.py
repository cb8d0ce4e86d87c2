"""Tiny random models of every family, and checkpoints of them that all programs can open.

The factories are plain functions, handed out by session fixtures of the same names.
"""

import os
import string
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

# Without a GPU kernels run in Triton's interpreter. It must be asked for before transformers imports triton.
os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from common import FOXES, SMOLLM2
from tiny import BOS
from tiny import tiny_config as _tiny_config
from tiny import tiny_model as _tiny_model
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from corpora.errors import run_program

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "opt")
# The real checkpoint's threads: all cores, shared with the other processes of pytest-xdist.
THREADS = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of programs that tests start: threads that outnumber the cores wait


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tests first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _tiny_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a character of ASCII: <pad> 0, <s> 1, </s> 2, <unk> 3; it adds <s> by itself when asked to."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    # Byte-level, as Qwen2's own class insists on: a space is written Ġ, a line end Ċ.
    characters = ["Ġ", "Ċ", *string.digits, *string.ascii_letters, *string.punctuation]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**special, **options})


def _tiny_checkpoint(
    directory: Path, model_type: str, *, seed: int = 0, max_shard_size: str = "50GB", **overrides: Any
) -> Path:
    """Save a tiny model and the tiny tokenizer to `directory`/tiny-MODEL_TYPE, which is returned."""
    directory = directory / f"tiny-{model_type}"
    _tiny_model(model_type, seed, **overrides).save_pretrained(directory, max_shard_size=max_shard_size)
    _tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., PreTrainedConfig]:
    """tiny_config(model_type, **overrides) -> configuration."""
    return _tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """tiny_model(model_type, seed=0, **overrides of the configuration) -> model in evaluation mode."""
    return _tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """tiny_tokenizer(**options of PreTrainedTokenizerFast) -> tokenizer, one token a character."""
    return _tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Callable[..., Path]:
    """tiny_checkpoint(directory, model_type, seed=0, max_shard_size=…, **overrides of the configuration) -> Path."""
    return _tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(model_type="llama", **options of tiny_checkpoint) -> a dense checkpoint that tests only read."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", **options: Any) -> Path:
        key = f"{model_type}{sorted(options.items(), key=str)}"
        if key not in made:
            made[key] = _tiny_checkpoint(tmp_path_factory.mktemp("dense"), model_type, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real checkpoint; without it the test is skipped."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip("scripts/prepare/model.sh smollm2 135m has not run")
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2_w4(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its blocks rounded to 4 bits in groups of 64, made once for all processes of pytest-xdist: the directory is
    locked while it is written."""
    from quantization.grids.uniform import UniformGrid
    from quantization.recipes.recipe import Recipe
    from quantization.runs.pipeline import quantize_checkpoint
    from quantization.weights.rtn import RTN

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return quantize_checkpoint(smollm2, Recipe(weights=RTN(UniformGrid(4, 64))), shared / "smollm2-w4")


@pytest.fixture
def no_grad() -> Iterator[None]:
    """For modules that compute without gradients: pytestmark = pytest.mark.usefixtures("no_grad")."""
    with torch.no_grad():
        yield


@pytest.fixture
def text(intactkv_root: Path) -> Path:
    """A text of 3,400 tokens of the tiny tokenizer, no sentence of it twice."""
    file = intactkv_root / "some text.txt"
    file.write_text(FOXES)
    return file


@pytest.fixture
def intactkv_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh place for datasets/, modelzoo/ and outputs/, so that no test reads or writes the checkout's."""
    monkeypatch.setenv("INTACTKV_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """run_main(main, *arguments) -> (exit code, stdout, stderr) of a program, run in this process, since torch takes
    seconds to import."""

    def run(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        code = 0
        capsys.readouterr()  # what the test itself printed
        try:
            run_program(main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread for tiny models: theirs wait for each other far longer than they compute, most of all on a busy
    machine. The real checkpoint gets `THREADS`."""
    torch.set_num_threads(THREADS if request.node.get_closest_marker("slow") else 1)


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Triton's interpreter (3.9) multiplies the bits of bfloat16 numbers, not the numbers: hand it float32."""
    if torch.cuda.is_available() or find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    def widened(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype.scalar != interpreter.tl.bfloat16:
            return x
        wide = (x.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    multiply = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest),
    )


@pytest.fixture
def triton_anywhere(monkeypatch):
    """Products take their weights on this machine's device, where Triton's kernels are interpreted if need be."""
    pytest.importorskip("triton")
    for name in ("lut", "spqr", "uniform"):
        monkeypatch.setattr(f"quantization.kernels.{name}.runs_triton", lambda device: True)
