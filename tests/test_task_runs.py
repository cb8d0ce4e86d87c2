"""What the tasks of one run make together, and what is said of prompts that were not read whole."""

import json
import logging

import pytest

from corpora.errors import UserError
from eval.tasks import task_runner
from eval.tasks.lm_tasks import _joined, _scores, load_tasks, task_runs


def test_a_metric_is_the_mean_over_the_questions_of_those_tasks_that_have_it():
    """Members of GLUE score differently: 100 questions have a correlation, 300 others an accuracy."""
    members = {
        "cola": _scores({"alias": "cola", "mcc,none": 0.5, "mcc_stderr,none": 0.04}),
        "sst2": _scores({"acc,none": 0.9, "acc_stderr,none": 0.02}),
        "mnli": _scores({"acc,none": 0.6, "acc_stderr,none": 0.03}),
    }
    joined = _joined(members, {"cola": 100, "sst2": 100, "mnli": 200})
    assert joined["metrics"] == pytest.approx({"mcc": 0.5, "acc": 0.7})
    assert joined["stderr"] == pytest.approx({"mcc": 0.04, "acc": ((0.02 / 3) ** 2 + (0.03 * 2 / 3) ** 2) ** 0.5})


def test_a_filter_is_part_of_a_metrics_name():
    result = {"exact_match,strict-match": 0.2, "exact_match_stderr,strict-match": 0.1, "exact_match,flexible": 0.3}
    assert _scores(result) == ({"exact_match,strict-match": 0.2, "exact_match,flexible": 0.3},
                               {"exact_match,strict-match": 0.1})  # fmt: skip
    assert _joined({"a": _scores(result)}, {"a": 5})["stderr"] == {"exact_match,strict-match": 0.1}


def test_bigbench_is_big_bench_hard():
    """The published page names no task; its value fits `bbh`, the harness' 27 tasks with three worked examples."""
    runs = task_runs(["bigbench", "bbh"])
    assert [run.name for run in runs] == ["bbh"]
    assert len(runs[0].leaves) == 27
    assert all(name.startswith("bbh_cot_fewshot_") for name, _ in runs[0].leaves)


def test_a_task_whose_package_is_missing_names_it(monkeypatch):
    def needs_it(_path, resolve_func=True):
        if not resolve_func:
            return {}
        raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")

    monkeypatch.setattr("eval.tasks.lm_tasks.load_yaml", needs_it)
    (run,) = task_runs(["piqa"])
    with pytest.raises(UserError, match="the task piqa needs the package 'langdetect'"):
        load_tasks(run, "sample", None)


def test_prompts_that_were_not_read_whole_are_told(caplog):
    whole = {"rows": {"rows": 9, "behind_prefix": 9, "truncated": 0}, "prompts": {"fewer_examples": 0, "cut": 0}}
    with caplog.at_level(logging.WARNING):
        task_runner._report_cuts("mmlu", whole)
        assert not caplog.messages
        task_runner._report_cuts("mmlu", whole | {"rows": whole["rows"] | {"truncated": 2}})
        task_runner._report_cuts("mmlu", whole | {"prompts": {"fewer_examples": 3, "cut": 1}})
    first, second = caplog.messages
    assert "2 of 9 rows were too long" in first
    assert "3 prompts show fewer examples" in second
    assert "1 questions were cut" in second


def test_a_long_prompt_of_the_program_is_told(intactkv_root, tiny_checkpoint, monkeypatch, caplog):
    """64 positions, questions of about 90 characters: every row is cut, each pass once, and stderr says so."""
    from eval.__main__ import main

    model = tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=64)
    rows = [{"goal": "jar " * 22, "sol1": "ab", "sol2": "cd", "label": 0} for _ in range(3)]
    folder = intactkv_root / "datasets" / "sample-tasks" / "piqa"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.argv", ["eval", "tasks", "--tasks", "piqa", "--data", "sample", "--model", str(model)])
    with caplog.at_level(logging.WARNING):
        main()
    # The three questions are one text; its two answers of two tokens are read in two passes.
    assert [m for m in caplog.messages if "2 of 2 rows were too long" in m]
