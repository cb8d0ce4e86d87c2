"""Ids that a tokenizer has and the model's embedding has not: one line wherever text meets a model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corpora.errors import UserError
from eval.__main__ import main
from intactkv.__main__ import main as intactkv_main
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from intactkv.vocabulary import known_ids
from quantization.__main__ import main as quantization_main


@pytest.fixture
def model(intactkv_root: Path, tiny_checkpoint: Callable, tiny_tokenizer: Callable) -> Path:
    """A checkpoint of 101 rows whose tokenizer knows [PAD] as 101."""
    directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<x>", "[PAD]"], special_tokens=True)
    tokenizer.save_pretrained(directory)
    return directory


CALIBRATION = ("--calibration-samples", 2, "--calibration-length", 32)
CALLS = {
    "perplexity": (main, "ppl", "--window", 64, "--corpus"),
    "behind a prefix": (main, "ppl", "--window", 64, "--prefix", "bos", "--corpus"),
    "statistics": (main, "stats", "pivots", "--window", 64, "--corpus"),
    "figure": (main, "plot", "hessian", *CALIBRATION, "--calibration"),
    "calibration": (quantization_main, "--recipe", "gptq-w4", "--set", "weights.grid.group_size=32", "--out", "q",
                    *CALIBRATION, "--calibration"),
    "discovery": (intactkv_main, "discover", "--corpus"),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_an_added_token_in_a_text_is_one_line(call, model, run_main, intactkv_root, monkeypatch):
    monkeypatch.chdir(intactkv_root)
    text = intactkv_root / "pads.txt"
    text.write_text("some text [PAD] and more of it " * 3000)
    program, *words = CALLS[call]
    code, out, err = run_main(program, *words, text, "--model", model)
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, out) == (2, "")
    assert "the token ids 101, but the embedding of" in line
    assert "tiny-llama has 101 rows" in line
    assert "Traceback" not in err


def test_the_library_says_so_too_and_pads_do_not_count(tiny_model):
    model = tiny_model("llama")
    behind = attach(model, build_prefix(model, [1]))
    ids = torch.tensor([[101, 101, 1, 20, 33], [1, 20, 33, 40, 50]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert behind.score(ids, mask).isfinite().all()
    assert behind.generate(ids, mask, max_new_tokens=2).shape[1] == 7
    for bad in (101, -1):
        ids[1, 2] = bad
        for call in (lambda: behind.score(ids, mask), lambda: behind.generate(ids, mask, max_new_tokens=2),
                     lambda: behind.feed(ids[1:]), lambda: known_ids(ids[1], model)):  # fmt: skip
            with pytest.raises(UserError, match=rf"token ids {bad}, but the embedding of (the )?llama.* has 101 rows"):
                call()
    assert known_ids(torch.empty(0, dtype=torch.long), model).numel() == 0
