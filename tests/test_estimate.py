"""What tables will take: sizes of models, bits of weights, seconds of a GPU, and the plan itself."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from common import ROOT, computing_at_most

from eval.tables.asked import Call, Run
from eval.tables.estimate import bits_per_weight, disk_of, seconds_of, size_of
from eval.tables.papers import PAPERS

MODEL = Path("modelzoo/llama-2/llama-2-7b")


def test_the_size_of_a_model_is_that_of_its_headers_or_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 10}')
    header = json.dumps({
        "__metadata__": {"a": "b"},
        "x": {"dtype": "F16", "shape": [10, 4], "data_offsets": [0, 80]},
        "y": {"dtype": "F16", "shape": [4, 4], "data_offsets": [80, 112]},
    }).encode()  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(112))
    size = size_of(tmp_path)
    assert size is not None
    assert (size.parameters, size.embedded, size.bytes) == (56, 40, 2)
    named = {name: getattr(size_of(Path(name)), "parameters", None)
             for name in ("llama-2-7b", "vicuna-7b-v1.5", "opt-125m", "qwen2.5-0.5b", "mine")}  # fmt: skip
    assert named == {"llama-2-7b": 7e9, "vicuna-7b-v1.5": 7e9, "opt-125m": 125e6, "qwen2.5-0.5b": 0.5e9, "mine": None}
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert size_of(tmp_path / "model") is None


@pytest.mark.parametrize(
    ("words", "measured"),
    [("--recipe rtn --bits 4 --group-size 64", 4.60), ("--recipe gptq-w3", 3.57), ("--recipe bcq --bits 4", 6.00),
     ("--recipe gptq --bits 4 --group-size -1", 4.09)],
)  # fmt: skip
def test_the_bits_of_a_weight_are_those_that_were_measured(words: str, measured: float) -> None:
    """docs/results.md, "Weights only: every method"."""
    run = Run("quantization", Path("smollm2-135m"), "", tuple(words.split()))
    assert bits_per_weight(run) == pytest.approx(measured, abs=0.1)


def test_the_estimate_returns_the_figures_that_it_is_made_of() -> None:
    """GPTQ: 6.3 s for two blocks, docs/performance.md; a checkpoint of 3 bits has a fifth of the bytes of one of 16."""
    size = size_of(MODEL)
    assert size is not None
    run = Run("quantization", MODEL, "", ("--recipe", "gptq-w3"))
    work = seconds_of(Call((run,)), size) - seconds_of(Call((replace(run, program="judge"),)), size)
    assert work == pytest.approx(6.3 / 2 * (size.parameters - size.embedded) / 218e6, rel=1e-6)
    assert 1 / 5 < disk_of(run, size) / (2 * size.parameters) < 1 / 4
    few, many = (seconds_of(Call((Run("ppl", MODEL, "c4", ("--limit", n)),)), size) for n in ("1", "256"))
    assert few < many


def test_the_plan_of_every_table_takes_no_library_that_computes() -> None:
    code = "import sys; sys.argv[1:] = ['reproduce', 'all', '--dry-run']\n" \
           "from eval.__main__ import main; main()\n" \
           "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"  # fmt: skip
    with computing_at_most(10):  # measured: 0.7 s on an idle core, which tests do not have
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| in all" in done.stdout
    assert all(name in done.stdout for name in PAPERS)
