"""Tables of tasks: accuracies of finished runs and of one run, and the average over question answering."""

import pytest
from test_tables import BOS, CAL, PROMPT, seven, task

from eval.tables.render import Figure, signed
from eval.tables.tasks import QA_METRICS, averages, run_tables, task_tables


def test_the_average_takes_the_metric_of_each_task_and_needs_all_seven():
    values = {"openbookqa": (0.30, 0.40), "winogrande": (0.70, None), "arc_challenge": (0.41, 0.45),
              "arc_easy": (0.75, 0.71), "boolq": (0.78, None), "hellaswag": (0.56, 0.74),
              "lambada_openai": (0.71, None)}  # fmt: skip
    records = {name: task(name, acc, acc_norm=norm) for name, (acc, norm) in values.items()}
    assert averages(records) == {
        "QA average": pytest.approx((40 + 70 + 45 + 71 + 78 + 74 + 71) / 7),
        "mean of plain acc": pytest.approx((30 + 70 + 41 + 75 + 78 + 56 + 71) / 7),
    }
    for name in values:
        assert averages({key: record for key, record in records.items() if key != name}) == {}


# Rows of published tables, in the order of their columns, with the average that is printed behind them.
PUBLISHED = {
    "CSQA of 6": (
        ("boolq", "arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande"),
        [
            ((84.16, 51.96, 81.82, 59.12, 79.87, 73.95), 71.81),
            ((80.09, 49.15, 79.04, 56.14, 77.69, 72.30), 69.07),
            ((84.07, 52.05, 82.00, 59.10, 80.03, 74.11), 71.89),
            ((83.21, 51.71, 81.86, 59.10, 79.82, 73.88), 71.60),
        ],
    ),
    "CSQA of 5": (
        ("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge"),
        [
            ((74.11, 80.03, 59.1, 82, 52.05), 69.46),
            ((73.56, 80.09, 58.51, 80.77, 50.68), 68.72),
            ((66.38, 75.19, 51.80, 68.52, 36.18), 59.61),
        ],
    ),
    "CSQA of 4": (
        ("boolq", "arc_challenge", "piqa", "winogrande"),
        [
            ((84.16, 51.96, 79.87, 73.95), 72.49),
            ((82.41, 49.32, 79.00, 71.74), 70.62),
            ((47.58, 27.82, 69.15, 56.35), 50.23),
        ],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_averages_of_published_tables_come_out_as_printed(name):
    tasks, rows = PUBLISHED[name]
    for figures, average in rows:
        records = {task_name: task(task_name, acc / 100) for task_name, acc in zip(tasks, figures, strict=True)}
        for record in records.values():
            record["metrics"]["acc_norm"] = 0.0  # plain acc counts
        assert averages(records)[name] == pytest.approx(average, abs=0.006)
        for missing in tasks:
            assert name not in averages({key: record for key, record in records.items() if key != missing})


def test_prefixquant_averages_acc_norm_too_where_there_is_one():
    values = {"winogrande": (0.7, None), "piqa": (0.8, 0.81), "hellaswag": (0.6, 0.79), "arc_easy": (0.8, 0.78),
              "arc_challenge": (0.5, 0.53)}  # fmt: skip
    means = averages({name: task(name, acc, acc_norm=norm) for name, (acc, norm) in values.items()})
    assert means == {"CSQA of 5": pytest.approx(68), "CSQA of 5, normed": pytest.approx((70 + 81 + 79 + 78 + 53) / 5)}


def test_an_average_has_a_column_where_all_its_tasks_have_one():
    tasks = ("boolq", "arc_challenge", "piqa", "winogrande")
    records = [task(name, 0.5, "rtn-w3") for name in tasks] + [task("boolq", 0.6, "rtn-w3", prefix=BOS)]
    (table,) = task_tables(records)
    assert table.head[5:] == (*(f"{name} acc" for name in sorted(tasks)), "CSQA of 4")
    assert [str(row[-1]) for row in table.rows] == ["50.00", "None", "None"]
    assert any(
        note.startswith("CSQA of 4: plain mean of boolq acc, arc_challenge acc, piqa acc") for note in table.notes
    )
    (one,) = task_tables(records[:3])
    assert one.head[5:] == tuple(f"{name} acc" for name in sorted(tasks[:3]))
    (run,) = run_tables(records[:4])
    assert [str(cell) for cell in run.rows[-1][:3]] == ["CSQA of 4", "", "50.00"]


def test_vanilla_stands_above_intactkv_with_the_change_in_points():
    records = [
        task("arc_easy", 0.50, "rtn-w3", acc_norm=0.40),
        task("arc_easy", 0.55, "rtn-w3", acc_norm=0.38, prefix=BOS),
    ]
    (table,) = task_tables(records)
    arms = {row[4]: [str(cell) for cell in row[5:]] for row in table.rows}
    assert arms == {
        "vanilla": ["50.00", "40.00"],
        "IntactKV": ["55.00", "38.00"],
        "IntactKV − vanilla": ["+5.00", "-2.00"],
    }


@pytest.mark.parametrize("field", [{"protocol": "hendrycks"}, {"fewshot": 5}, {"data": "sample"}, {"limit": 8},
                                   {"dtype": "float32"}, {"device": "cpu"}])  # fmt: skip
def test_tasks_of_different_protocols_shots_data_or_limits_share_no_table(field):
    tables = task_tables([task("boolq", 0.5, "rtn-w3"), task("boolq", 0.6, "rtn-w3", prefix=BOS, **field)])
    assert len(tables) == 2
    assert not any(isinstance(cell, Figure) and cell.form is signed for t in tables for row in t.rows for cell in row)


def test_other_data_of_one_name_get_a_column_of_their_own():
    (table,) = task_tables([task("boolq", 0.5), task("boolq", 0.7, data_sha256="0123456789ab")])
    assert table.head[5:7] == ("boolq 01234567 acc", "boolq data of  acc")
    assert [str(cell) for cell in table.rows[0][5:7]] == ["70.00", "50.00"]


def test_a_run_without_bos_is_a_setting_of_its_own():
    (table,) = task_tables([task("boolq", 0.5, lead=[]), task("boolq", 0.6, prefix=BOS)])
    assert [(row[3], row[4]) for row in table.rows if isinstance(row[5], Figure)] == [
        ("none", "vanilla"),
        ("[B]", "IntactKV"),
    ]


VANILLA = {"intact": False}


def test_every_intact_prefix_has_lines_of_its_own_below_the_vanilla_run_of_its_tokens():
    records = [task("boolq", 0.50, "rtn-w3"), task("boolq", 0.55, "rtn-w3", prefix=BOS),
               task("boolq", 0.60, "rtn-w3", prefix=CAL), task("boolq", 0.90, "rtn-w3", prefix=PROMPT, lead=[1, 2]),
               task("boolq", 0.70, "rtn-w3", prefix=PROMPT | VANILLA, lead=[1, 2])]  # fmt: skip
    for ordered in (records, records[::-1]):
        (table,) = task_tables(ordered)
        lines = {(row[3], row[4]): str(row[5]) for row in table.rows}
        assert len(table.rows) == len(lines) == 9
        assert lines == {
            ("[B]", "vanilla"): "50.00", ("[B]", "IntactKV"): "55.00", ("[B]", "IntactKV − vanilla"): "+5.00",
            ("[cal]", "vanilla"): "50.00", ("[cal]", "IntactKV"): "60.00", ("[cal]", "IntactKV − vanilla"): "+10.00",
            ("[P]", "vanilla"): "70.00", ("[P]", "IntactKV"): "90.00", ("[P]", "IntactKV − vanilla"): "+20.00",
        }  # fmt: skip


def test_the_vanilla_run_of_a_file_is_that_of_its_tokens():
    records = [task("boolq", 0.50, "rtn-w3", prefix=CAL | VANILLA), task("boolq", 0.55, "rtn-w3", prefix=BOS)]
    (table,) = task_tables(records)
    assert [(row[3], row[4], str(row[5])) for row in table.rows] == [
        ("[B]", "vanilla", "50.00"), ("[B]", "IntactKV", "55.00"), ("[B]", "IntactKV − vanilla", "+5.00"),
    ]  # fmt: skip


def test_two_files_of_one_name_are_told_apart():
    records = [task("boolq", 0.50), task("boolq", 0.55, prefix=CAL),
               task("boolq", 0.60, prefix=CAL | {"file": "decaf"})]  # fmt: skip
    (table,) = task_tables(records)
    assert [str(row[5]) for row in table.rows if row[4] == "IntactKV"] == ["55.00", "60.00"]
    assert len({row[1] for row in table.rows}) == 2


def test_weights_calibrated_behind_a_file_stand_with_that_file():
    records = [task("boolq", 0.50, "gptq-w3", seed=0), task("boolq", 0.55, "gptq-w3", seed=0, prefix=BOS),
               task("boolq", 0.65, "gptq-w3", seed=0, prefix=CAL)]  # fmt: skip
    records[2]["settings"]["made_of"] |= {"calibrate_behind_prefix": True, "prefix": [1]}
    (table,) = task_tables(records)
    assert [(row[3], row[4], str(row[5])) for row in table.rows if row[4] != "vanilla"] == [
        ("[B]", "IntactKV", "55.00"), ("[B]", "IntactKV − vanilla", "+5.00"),
        ("[cal]", "calibrated behind", "65.00"), ("[cal]", "calibrated behind − vanilla", "+15.00"),
    ]  # fmt: skip


def test_seeds_of_tasks_become_a_mean():
    records = [task("boolq", acc, "gptq-w3", seed=seed) for seed, acc in enumerate((0.5, 0.6, 0.7))]
    (table,) = task_tables(records, over_seeds=True)
    assert [str(row[5]) for row in table.rows] == ["60.00 ± 10.00 (3)"]
    assert len(task_tables(records)[0].rows) == 3


def test_a_perplexity_among_the_metrics_is_no_percentage_and_mmlu_shows_its_categories():
    record = task("lambada_openai", 0.5)
    record["metrics"] = {"perplexity": 4.3, "acc": 0.5}
    (table,) = task_tables([record])
    assert [str(cell) for cell in table.rows[0][5:7]] == ["4.30", "50.00"]
    (table,) = task_tables([task("mmlu", 0.5) | {"groups": {"STEM": 0.25, "STEM: physics": 0.1}}])
    assert table.head[5:] == ("mmlu acc", "mmlu STEM")
    assert str(table.rows[0][6]) == "25.00"


def test_what_was_rounded_is_said_of_every_arm_and_of_all_weights():
    kv = {"kv": {"kind": "KIVI", "bits": 2, "group_size": 32, "residual": 128, "prefill": "exact"}}
    runs = [task("boolq", 0.5, "rtn-w3", **kv), task("boolq", 0.6, "rtn-w3", prefix=BOS, **kv),
            task("boolq", 0.6, "rtn-w4", **kv), task("boolq", 0.7, "rtn-w4")]  # fmt: skip
    for record, share in zip(runs, (0.25, 0.5, 0.75), strict=False):
        record["kv_cache"] = {"rounded": share, "bits_per_element": [3.0, 3.0], "tokens": 100}
    (table,) = task_tables(runs)
    said = [note for note in table.notes if note.startswith("KV cache")]
    weights = {words[0]: words[1] for words in [("3", table.rows[0][1]), ("4", table.rows[-1][1])]}
    assert len(said) == 3
    for share, number, arm in (("25.0", "3", "vanilla"), ("50.0", "3", "IntactKV"), ("75.0", "4", "vanilla")):
        (note,) = (note for note in said if f"boolq {share} %" in note)
        assert note.startswith("KV cache 2g32 kivi, ")
        assert weights[number] in note
        assert f", {arm}:" in note
    (table,) = run_tables(runs[:1])
    assert table.notes == ("KV cache 2g32 kivi: rounded of what attention read: boolq 25.0 %",)


def test_one_run_shows_every_metric_once_and_the_averages_of_all_seven():
    (table,) = run_tables([*seven(0.25, 0.5), task("gsm8k", 0.125)])
    rows = {(row[0], row[1]): [str(cell) for cell in row[2:]] for row in table.rows}
    assert rows[("hellaswag", "acc")] == ["25.00", "1.00", "10042", "12"]
    assert rows[("gsm8k", "acc")] == ["12.50", "1.00", "1319", "12"]
    assert rows[("QA average", "")][0] == f"{(4 * 50 + 3 * 25) / 7:.2f}"
    assert len(table.rows) == 7 + 4 + 1 + 2  # acc of all, acc_norm of four, gsm8k, two averages
    assert len(run_tables([task("gsm8k", 0.1), task("mmlu", 0.2)])) == 2  # protocols do not share a table
    assert len(run_tables(seven(0.1, 0.2)[:6])[0].rows) == 6 + sum(
        metric == "acc_norm" for metric in list(QA_METRICS.values())[:6]
    )
