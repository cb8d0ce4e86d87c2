"""Table 4 of the paper with our graded answers beside it: which runs have a place, and what their columns say."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from chats import CONTEXT, TEMPLATE, write_questions
from endpoint import Endpoint, serving

from eval.__main__ import main
from eval.tables.paper_tables import paper_tables
from eval.tables.render import Table
from intactkv.prefix import Prefix
from quantization.named import named_recipe
from quantization.recipes.recipe import describe

MODEL, JUDGE = "vicuna-v1.5-7b", "gpt-4-0125-preview"


def answers(sha: str, recipe: str = "fp16", *, arm: str = "", seed: int = 42, group: int = 128, bits: int | None = None,
            **others: Any) -> dict[str, Any]:  # fmt: skip
    """A record of `eval mtbench`; by itself one by the paper's protocol."""
    described = describe(named_recipe(recipe))
    made_of: dict[str, Any] = {"source": "abc"}
    if described["weights"] is not None:
        described["weights"]["grid"] |= {"group_size": group} | ({} if bits is None else {"bits": bits})
        made_of |= {"weights": described["weights"]}
    settings = {"model": MODEL, "weights": recipe, "made_of": made_of, "recipe": described, "kv": None, "seed": seed,
                "questions": "mt_bench", "questions_sha256": "q", "template": "vicuna_v1.1", "max_new_tokens": 1024,
                "dtype": "float16", "device": "cuda"} | others  # fmt: skip
    return {"task": "mtbench", "settings": settings, "answers_sha256": sha, "samples": 80, "arm": arm}


def graded(scores: dict[str, float | None], started: str = "2026-01-01", **others: Any) -> dict[str, Any]:
    """A record of `eval judge`: the score of every file of answers, by its content."""
    settings = {"judge": JUDGE, "mode": "single", "prompts_sha256": "p", "references_sha256": "r", "max_tokens": 2048,
                "answers_sha256": {f"file {sha}": sha for sha in scores}} | others  # fmt: skip
    counts = {"judgements": 160, "unscored": {"no rating": 3, "refused": 1, "failed": 0}}
    models = {f"file {sha}": {"score": score} | counts for sha, score in scores.items()}
    return {"task": "judge", "settings": settings, "models": models, "started": started}


def rows(table: Table) -> dict[str, list[str]]:
    return {str(row[0]): [str(cell) for cell in row[1:]] for row in table.rows}


RTN = [answers("a"), answers("b", "rtn-w3"), answers("c", "rtn-w3", arm="[P]"),
       answers("d", "rtn-w3", arm="[P] + Cal")]  # fmt: skip
GRADES = {"a": 5.0, "b": 4.0, "c": 4.5, "d": 4.75}


def test_published_ours_and_the_difference_stand_side_by_side():
    (table,) = paper_tables(4, [*RTN, graded(GRADES)], [MODEL])
    assert table.head == ("method", f"published {MODEL}", f"ours: {MODEL}, mt_bench, groups of 128",
                          f"difference {MODEL}")  # fmt: skip
    found = rows(table)
    assert found["FP16"] == ["5.31", "5.00", "-0.31"]
    assert found["RTN"] == ["4.34", "4.00", "-0.34"]
    assert found["RTN + IntactKV_[P]"] == ["4.72", "4.50", "-0.22"]
    assert found["RTN: change by [P]"][:2] == ["+0.38", "+0.50"]
    assert found["RTN + IntactKV_[P] + Cal"][1] == "4.75"
    assert found["RTN: change by [P] + Cal"][1] == "+0.75"
    assert found["AWQ"] == ["4.74", "None", "None"]
    assert f"{MODEL}: 16 of our 640 judgements hold no grade and count nowhere" in table.notes


def test_seeds_are_one_figure_and_the_newest_grade_of_an_answer_counts():
    seeds = [answers(f"s{seed}", "rtn-w3", seed=seed) for seed in (42, 43, 44)]
    first = graded({"s42": 1.0, "s43": 4.0, "s44": 5.0})
    (table,) = paper_tables(4, [*seeds, first, graded({"s42": 3.0}, "2026-01-02")], [MODEL])
    assert rows(table)["RTN"][1] == "4.00 ± 1.00 (3)"


@pytest.mark.parametrize("record", [
    answers("x", "rtn-w3", bits=4), answers("x", "rtn-w3", group=64), answers("x", "gptq-w3"),
    answers("x", "rtn-w3", arm="[B]"), answers("x", "rtn-w3", arm="[B] + Cal"), answers("x", arm="[P]"),
    answers("x", "rtn-w3", kv={"kind": "PerHead", "bits": 4}), answers("other content", "rtn-w3"),
])  # fmt: skip
def test_other_bits_groups_methods_prefixes_caches_and_files_have_no_place(record):
    (table,) = paper_tables(4, [record, graded({"x": 9.99})])
    assert not any("9.99" in cells for cells in rows(table).values())
    assert any("no judged run has a place" in note for note in table.notes)


@pytest.mark.parametrize(("changed", "judged", "named"), [
    ({"questions": "sample"}, {}, "questions"), ({"max_new_tokens": 128}, {}, "tokens of a turn"),
    ({}, {"judge": "other"}, "judge"),
    ({}, {"endpoint": "http://localhost:8000/v1"}, "judge"), ({"model": "vicuna-v1.5-33b"}, {}, "model"),
])  # fmt: skip
def test_no_difference_is_taken_to_scores_that_were_made_otherwise(changed, judged, named):
    record = answers("x", "rtn-w3", **changed)
    (table,) = paper_tables(4, [record, graded({"x": 4.0}, **judged)])
    assert any(cell == "4.00" for cell in rows(table)["RTN"])
    assert not any(head.startswith("difference") for head in table.head)
    assert any(f"{named} other than the paper's" in note for note in table.notes)


def test_grades_of_different_judges_share_no_column():
    local = graded({"b": 2.0}, "2026-01-09", judge="local-small")
    (table,) = paper_tables(4, [*RTN, graded({"a": 5.0}), local, graded({"c": 4.5})], [MODEL])
    assert [rows(table)[m][1] for m in ("FP16", "RTN", "RTN + IntactKV_[P]")] == ["5.00", "None", "4.50"]
    assert any("also finished" in note and "graded by local-small" in note for note in table.notes)
    (table,) = paper_tables(4, [*RTN, local], [MODEL])
    assert rows(table)["RTN"][1] == "2.00"
    assert any("a local judge shows the flow" in note for note in table.notes)


def test_comparisons_are_no_grades():
    (table,) = paper_tables(4, [*RTN, graded({"b": 9.99}, mode="pair")])
    assert not any("9.99" in cells for cells in rows(table).values())


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as server:
        yield server


def test_from_answers_to_the_table(run_main, intactkv_root, tiny_checkpoint, tiny_tokenizer, endpoint, monkeypatch):
    """Answers of all arms of a tiny model, graded by a server, stand in the table of the program."""
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    model = tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=CONTEXT, intermediate_size=128)
    tiny_tokenizer(chat_template=TEMPLATE).save_pretrained(model)
    model = model.rename(model.with_name("smollm2-tiny"))  # its groups are of 64
    data = intactkv_root / "data"
    data.mkdir()
    asked = write_questions(data / "question.jsonl")
    names = [f"single{reference}-v1{turn}" for reference in ("", "-math") for turn in ("", "-multi-turn")]
    prompts = [{"name": name, "system_prompt": "s", "prompt_template": "rate"} for name in names]
    (data / "judge_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (data / "reference_answer").mkdir()
    program = partial(run_main, main)
    common = ("mtbench", "--model", model, "--questions", asked, "--max-new-tokens", 4, "--recipe", "rtn-w3", "--json")
    files = []
    for words in (("--recipe", "fp16"), ("--prefix", "none"), ("--prefix", "prompt"), ("--prefix", "cal.safetensors")):
        if words[1] == "cal.safetensors":
            (intact,) = (intactkv_root / "modelzoo" / "prefixes").rglob("prompt-*.safetensors")
            trained = intactkv_root / "cal.safetensors"
            replace(Prefix.load(intact), calibrated={"steps": 1}).save(trained)
            words = ("--prefix", trained)
        code, out, err = program(*common, *words)
        assert code == 0, err
        files.append(json.loads(out)["answers"])
    references = data / "reference_answer" / "r.jsonl"
    ids = [json.loads(line)["question_id"] for line in asked.read_text().splitlines()]
    given = [{"question_id": number, "choices": [{"turns": ["a", "b"]}]} for number in ids]
    references.write_text("".join(json.dumps(row) + "\n" for row in given))
    code, _, err = program("judge", "--answers", *files, "--questions", asked, "--judge-model", "j",
                           "--base-url", endpoint.url)  # fmt: skip
    assert code == 0, err
    code, out, err = program("table", "4", "--model", "smollm2-tiny")
    assert code == 0, err
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    last = {row[0]: row[-1] for row in cells}
    for row in ("FP16", "RTN", "RTN + IntactKV_[P]", "RTN + IntactKV_[P] + Cal"):
        assert last[row] == "7.00"
    assert last["AWQ"] == "n/a"
    assert last["method"] == "ours: smollm2-tiny, question.jsonl, groups of 64"
