"""Tables of conversations, needles and latencies: what is published agrees with itself, what is run fills the cells."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import lutgemm
from corpora.errors import UserError
from corpora.json_files import with_sum
from eval.__main__ import main as eval_main
from eval.chat import PROMPTS
from eval.needle import PUBLISHED_KEYS, found, published_length
from eval.runs import record_at
from eval.tables.asked import LINE, NEEDLE, UNITS, cells_of
from eval.tables.beside import paper_table
from eval.tables.compare import filled, value_of
from eval.tables.declared import ALONE, Scope
from eval.tables.ledger import keep
from eval.tables.papers import PAPERS
from eval.tables.render import render
from quantization.runs.opening import load_tokenizer

CHATS = [paper for name, paper in PAPERS.items() if name.endswith("-chat")]
NEEDLES = [PAPERS["kivi-needle"], PAPERS["kvquant-needle"]]
LATENCY = PAPERS["lutgemm-latency"]
MICROSECONDS = {"cuBLAS": 40.0, "W3": 20.0, "LUT4": 25.0, "LUT3": 16.0}


def test_every_conversation_asks_a_question_that_the_chat_knows() -> None:
    assert len(CHATS) == 7
    asked = [measure.item for paper in CHATS for measure in paper.measures]
    assert set(asked) == set(PROMPTS)
    assert len(asked) == len(CHATS)


@pytest.mark.parametrize("paper", NEEDLES, ids=lambda paper: paper.name)
def test_a_published_share_is_that_of_its_answers(paper: Any) -> None:
    *keys, share = paper.measures
    assert tuple(measure.metric for measure in keys) == PUBLISHED_KEYS
    for row in paper.rows:
        for *answers, percent in row.published.values():
            assert percent == 100 * sum(map(found, PUBLISHED_KEYS, answers)) / len(keys)
    assert all(row.published for row in paper.rows if row.arm == ALONE)
    assert paper.value(paper.rows[0], "llama-3.1-instruct-8b", share) == 80.0


def test_a_reduced_needle_fits_the_window_that_it_was_asked_for(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    for window in (400, 512, 1024, 2048, 8192):
        (cell, *_) = cells_of(PAPERS["kivi-needle"], smollm2, Scope(window=window))
        words = cell.runs[0].words
        lines = UNITS * int(words[words.index("--lines") + 1])
        length = published_length(tokenizer, [1], lines)
        assert length + 16 <= window
        assert length > window - UNITS * LINE - NEEDLE


def test_published_speedups_are_those_of_the_published_milliseconds() -> None:
    for row in LATENCY.rows:
        half, *others = (LATENCY.value(row, "no-model", measure) for measure in LATENCY.measures)
        times, speedups = others[:3], others[3:]
        for milliseconds, speedup in zip(times, speedups, strict=True):
            assert speedup == pytest.approx(half / milliseconds, abs=0.0051)  # two decimals


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, intactkv_root: Path) -> Callable[..., Any]:
    """record(*arguments) of the benchmark, on a GPU that is only said to be there."""

    def measured(out: int, channels: int, *_: Any) -> dict[str, Any]:
        scale = 1.0 if out > channels else 2.0  # which of the two a cell shows
        return {name: {"us": scale * us, "speedup": 40.0 / us} for name, us in MICROSECONDS.items()}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(torch, "device", lambda name: name)
    monkeypatch.setattr(lutgemm, "find_spec", lambda name: name)
    monkeypatch.setattr(lutgemm, "version", lambda name: "3.0")
    monkeypatch.setattr(lutgemm, "bandwidth", lambda device: 1e12)
    monkeypatch.setattr(lutgemm, "measure", measured)
    return measured


def test_latencies_leave_a_record_that_fills_the_row_of_its_shape(
    on_a_gpu: Any, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    run = cells_of(LATENCY, Path("no-model"))[0].runs[0]
    code, out, err = run_main(lutgemm.main, *run.words, "--json", "--device", "auto")
    assert code == 0, err
    record = json.loads(out)
    assert record_at(Path(record["path"])) == record
    assert json.loads(run_main(lutgemm.main, *run.words, "--json")[1]) == record
    values = [value_of(record, measure) for measure in LATENCY.measures]
    assert values == pytest.approx([0.04, 0.02, 0.025, 0.016, 2.0, 1.6, 2.5])
    keep(run, {"program": "latency", "model": "no-model", "item": "", "command": [], "seconds": 1.0,
               "finished": "2026-01-01", "record": Path(record["path"]).name})  # fmt: skip
    first = {one.measure.metric: one for one in filled(LATENCY, Path("no-model")) if one.row == LATENCY.rows[0]}
    assert first["LUT4 ms"].difference is None  # another card
    assert "a card" in " ".join(first["LUT4 ms"].departs)
    assert first["LUT4 speedup"].difference == pytest.approx(1.6 - 0.96)
    text = render(paper_table(LATENCY, filled(LATENCY, Path("no-model"))), "csv")
    assert "0.02419" in text
    assert "n/a" not in text.splitlines()[1]
    for words in (("table", "lutgemm-latency"), ("table", "lutgemm-latency", "--model", "llama-2-7b")):
        code, out, err = run_main(eval_main, *words)
        assert code == 0, err
        assert out.count("0.02500") == 1  # of LUT-GEMM, 4 bits


def test_a_table_of_no_model_is_run_shown_and_reported_without_one(
    intactkv_root: Path, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    page = intactkv_root / "report.html"
    code, _, err = run_main(eval_main, "report", "lutgemm-latency", "--out", page)
    assert code == 0, err
    assert "12288 × 49152" in page.read_text()
    code, out, err = run_main(eval_main, "reproduce", "lutgemm-latency", "--device", "cpu")
    assert code == 0
    assert "need a GPU: their cells stay n/a" in err
    assert out.count("0.02419") == 1
    assert "0 failed" in err
    assert run_main(eval_main, "table", "lutgemm-latency")[1] == out
    code, out, err = run_main(eval_main, "reproduce", "lutgemm-latency", "--dry-run")
    assert code == 0
    assert "no-model" not in out  # a name of ours, no model of theirs
    assert "| –" in out


def test_latencies_of_other_shapes_than_were_asked_are_no_record(
    on_a_gpu: Any, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    record = json.loads(run_main(lutgemm.main, "--shapes", "512x2048", "--json")[1])
    path, _ = Path(record.pop("path")), record.pop("sha256")
    path.write_text(json.dumps(with_sum(record | {"products": record["products"][:1]})))
    with pytest.raises(UserError, match="its products are not those of its shapes"):
        record_at(path)


def test_without_a_gpu_there_is_no_latency_and_that_is_said(run_main: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run_main(lutgemm.main, "--json", "--device", "cpu")
    assert (code, out) == (2, "")
    assert "needs a CUDA device and Triton" in err
    assert run_main(lutgemm.main, "--device", "cpu")[0] == 0
    code, _, err = run_main(lutgemm.main, "--shapes", "512x2047")
    assert code == 2
    assert "512x2047 is not in the published table" in err
