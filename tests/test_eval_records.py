"""Run records and the tables made from them."""

import csv
import io
import json
import math
from typing import Any

import pytest

from eval.runs import record_of
from eval.tables.perplexities import perplexity_rows, render

SETTINGS: dict[str, Any] = {
    "model": "tiny-llama", "weights": "rtn-w4g64", "made_of": {"source": "abc"}, "recipe": {}, "kv": None,
    "prefix": {"label": "none", "ids": [], "file": None, "intact": False}, "dtype": "float32", "device": "cpu",
    "packed": False, "corpus": "sample", "text_sha256": "00", "tokens_sha256": "aa",
    "protocol": "intactkv", "window": 512, "limit": 8, "batch_size": 4,
}  # fmt: skip
KV4 = {"kind": "PerHead", "bits": 4, "convention": "minmax-asym"}
CHANGED: dict[str, Any] = {
    "model": "other", "weights": "rtn-w3g64", "made_of": {"source": "abd"}, "recipe": {"x": 1},
    "kv": KV4, "prefix": {"label": "[B]", "ids": [1], "file": None, "intact": True},
    "dtype": "bfloat16", "device": "cuda", "packed": True, "corpus": "c4", "text_sha256": "01", "tokens_sha256": "ab",
    "protocol": "gptq",
    "window": 2048, "limit": None, "batch_size": 1,
}  # fmt: skip


def figures(perplexity: float) -> dict[str, Any]:
    """What a run of two windows measures."""
    return {"perplexity": perplexity, "window_nll": [math.log(perplexity)] * 2, "windows": 2}


def test_a_finished_run_is_read_back_and_not_run_again(intactkv_root):
    calls = []

    def run() -> dict[str, Any]:
        calls.append(1)
        return figures(10.0 + len(calls))

    first = record_of("ppl", "tiny", SETTINGS, run)
    assert record_of("ppl", "tiny", SETTINGS, run) == first
    assert len(calls) == 1
    forced = record_of("ppl", "tiny", SETTINGS, run, force=True)
    assert forced["perplexity"] == 12.0
    assert record_of("ppl", "tiny", SETTINGS, run)["perplexity"] == 12.0


@pytest.mark.parametrize("field", SETTINGS)
def test_every_setting_is_part_of_the_identity(field, intactkv_root):
    one = record_of("ppl", "tiny", SETTINGS, lambda: figures(1.0))
    other = record_of("ppl", "tiny", SETTINGS | {field: CHANGED[field]}, lambda: figures(2.0))
    assert one["identity"] != other["identity"]
    assert other["perplexity"] == 2.0


def test_a_record_says_what_it_was_made_with(intactkv_root):
    record = record_of("ppl", "tiny", SETTINGS, lambda: figures(1.0))
    stored = json.loads((intactkv_root / "outputs" / "runs" / f"ppl-tiny-{record['identity']}.json").read_text())
    assert stored["settings"] == SETTINGS
    assert {"torch", "transformers", "commit", "processor", "cores"} <= stored["environment"].keys()


def test_a_run_that_dies_leaves_no_record(intactkv_root):
    def run() -> dict[str, float]:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        record_of("ppl", "tiny", SETTINGS, run)
    assert not list(intactkv_root.iterdir())  # nor an empty folder


def record(perplexity: float, started: str = "2026-01-01", **settings: Any) -> dict[str, Any]:
    nll = [math.log(perplexity) + shift for shift in (-0.3, 0.1, 0.2)]
    return {"settings": SETTINGS | settings, "identity": "x", "started": started, "perplexity": perplexity,
            "window_nll": nll}  # fmt: skip


BOS = {"label": "[B]", "ids": [1], "file": None, "intact": True}
PROMPT = {"label": "[P]", "ids": [1, 2], "file": None, "intact": True}
CAL = {"label": "[cal]", "ids": [1], "file": "c0ffee", "intact": True}  # --prefix cal.safetensors


def test_both_arms_of_a_setting_share_a_row(intactkv_root):
    rows = perplexity_rows([
        record(20.0), record(15.0, prefix=BOS),
        record(22.0, prefix=PROMPT | {"intact": False}, tokens_sha256="p"),
        record(11.0, prefix=PROMPT, tokens_sha256="p"),
        record(30.0, kv=KV4), record(31.0, kv={"kind": "PerHead", "bits": 4}),
    ])  # fmt: skip
    assert [(r.kv, r.prefix, r.vanilla.perplexity, r.intact.perplexity, r.intact.change) for r in rows] == [
        ("16", "[B]", 20.0, 15.0, pytest.approx(-0.25)),
        ("16", "[P]", 22.0, 11.0, pytest.approx(-0.5)),
        ("4 per_head", "[B]", 30.0, None, None),
        ("4 per_head intactkv-asym", "[B]", 31.0, None, None),  # of the range that held 0
    ]


@pytest.mark.parametrize("newest_first", [False, True])
def test_every_intact_prefix_has_a_row_of_its_own_beside_the_vanilla_run_of_its_tokens(newest_first):
    records = [
        record(9.0), record(8.6, prefix=BOS), record(8.1, prefix=CAL),
        record(7.2, prefix=CAL | {"label": "[more]", "file": "decaf"}),
        record(8.0, prefix=PROMPT | {"intact": False}, tokens_sha256="p"),
        record(6.0, prefix=PROMPT, tokens_sha256="p"),
    ]  # fmt: skip
    rows = perplexity_rows(records[::-1] if newest_first else records)
    found = {r.prefix: (r.weights, r.vanilla.perplexity, r.intact.perplexity, r.intact.change) for r in rows}
    assert len(rows) == len(found)
    weights = SETTINGS["weights"]
    assert found == {
        "[B]": (weights, 9.0, 8.6, pytest.approx(-0.4 / 9)),
        "[cal]": (weights, 9.0, 8.1, pytest.approx(-0.1)),
        "[more]": (weights, 9.0, 7.2, pytest.approx(-0.2)),
        "[P]": (weights, 8.0, 6.0, pytest.approx(-0.25)),
    }


def test_the_vanilla_run_of_a_file_is_that_of_its_tokens():
    rows = perplexity_rows([record(9.0, prefix=CAL | {"intact": False}), record(8.1, prefix=BOS)])
    assert [(r.prefix, r.vanilla.perplexity, r.intact.perplexity) for r in rows] == [("[B]", 9.0, 8.1)]


def test_two_files_of_one_name_are_told_apart():
    for label in ("[cal]", "[B]"):  # bare [B] beside B.safetensors, too
        one, other = CAL | {"label": label}, CAL | {"label": label, "file": "decaf" if label == "[cal]" else None}
        rows = perplexity_rows([record(9.0), record(8.1, prefix=one), record(7.2, prefix=other)])
        assert [(r.prefix, r.vanilla.perplexity, r.intact.perplexity) for r in rows] == [
            (label, 9.0, 8.1),
            (label, 9.0, 7.2),
        ]
        assert len({r.weights for r in rows}) == 2


@pytest.mark.parametrize("field", ["protocol", "window", "limit", "dtype", "device"])
def test_figures_of_different_protocols_never_share_a_table(field):
    text = render(perplexity_rows([record(20.0), record(21.0, **{field: CHANGED[field]})]), "markdown")
    assert text.count("Perplexity (") == 2
    first, second = text.split("\n\nPerplexity (")
    assert ("20.00" in first) != ("20.00" in second)


def test_a_gptq_run_without_a_prefix_is_not_the_vanilla_arm_of_bos():
    rows = perplexity_rows(
        [record(20.0, protocol="gptq"), record(15.0, protocol="gptq", prefix=BOS, tokens_sha256="bb")]
    )
    assert [(r.prefix, r.vanilla.perplexity, r.intact.perplexity) for r in rows] == [
        ("none", 20.0, None),
        ("[B]", None, 15.0),
    ]


def test_settings_that_no_column_shows_are_told_apart():
    clipped = {"source": "abc", "weights": {"grid": {"clip_search": True}}}
    rows = perplexity_rows([record(20.0), record(15.0, prefix=BOS), record(18.0, made_of=clipped)])
    assert [(r.vanilla.perplexity, r.intact.perplexity) for r in rows] == [(20.0, 15.0), (18.0, None)]
    assert len({r.weights for r in rows}) == 2


def behind(perplexity: float, **changes: Any) -> dict[str, Any]:
    """A run of weights that were calibrated behind [BOS]."""
    made_of = SETTINGS["made_of"] | {"calibrate_behind_prefix": True, "prefix": [1]} | changes
    return record(perplexity, prefix=BOS, made_of=made_of, weights=f"{SETTINGS['weights']}-behind")


def test_weights_calibrated_behind_the_prefix_are_a_third_arm_of_their_row():
    plain = SETTINGS["made_of"] | {"calibrate_behind_prefix": False}
    rows = perplexity_rows([record(20.0, made_of=plain), record(15.0, prefix=BOS, made_of=plain), behind(10.0)])
    assert [(r.weights, r.vanilla.perplexity, r.intact.perplexity, r.behind.perplexity) for r in rows] == [
        (SETTINGS["weights"], 20.0, 15.0, 10.0)
    ]
    assert rows[0].behind.change == pytest.approx(-0.5)
    text = render(rows, "markdown")
    assert "calibrated behind" in text
    assert "-50.0%" in text
    assert "calibrated behind" not in render(perplexity_rows([record(20.0)]), "markdown")


def test_weights_calibrated_behind_a_file_stand_in_the_row_of_that_file():
    file = behind(7.0)
    file["settings"]["prefix"] = CAL
    rows = perplexity_rows([record(10.0), record(9.0, prefix=BOS), behind(8.0), file])
    assert [(r.prefix, r.vanilla.perplexity, r.intact.perplexity, r.behind.perplexity) for r in rows] == [
        ("[B]", 10.0, 9.0, 8.0),
        ("[cal]", 10.0, None, 7.0),
    ]
    assert [r.behind.change for r in rows] == pytest.approx([-0.2, -0.3])


def test_weights_of_other_calibration_text_are_no_arm_of_the_row():
    rows = perplexity_rows([record(20.0), behind(10.0, segments="others")])
    assert len(rows) == 2


STATIC = {"kind": "StaticPerHead", "bits": 4, "convention": "intactkv-asym", "rotate_keys": False}


def ranges(perplexity: float, seed: int, behind: bool = False, **settings: Any) -> dict[str, Any]:
    """A run with a KV cache that was calibrated on the text that a seed drew."""
    made_of = {"kv": STATIC, "weights": SETTINGS["made_of"], "text": {"files": ["a"]},
               "calibration": {"corpus": "c4", "seed": seed}} | ({"prefix": [1]} if behind else {})  # fmt: skip
    return record(perplexity, kv=STATIC, kv_made_of=made_of, **settings)


def test_a_cache_of_other_text_is_another_row_and_one_behind_the_prefix_the_third_arm():
    records = [ranges(50.0, 1), ranges(40.0, 1, prefix=BOS), ranges(30.0, 1, True, prefix=BOS), ranges(60.0, 2),
               ranges(36.0, 2, True, prefix=BOS)]  # fmt: skip
    rows = perplexity_rows(records)
    assert [(r.vanilla.perplexity, r.intact.perplexity, r.behind.perplexity) for r in rows] == [
        (50.0, 40.0, 30.0),
        (60.0, None, 36.0),
    ]
    (row,) = perplexity_rows(records, over_seeds=True)
    assert (row.vanilla.perplexity, row.intact.perplexity, row.behind.perplexity) == pytest.approx((55, 40, 33))
    assert row.behind.change == pytest.approx(-0.4)


def test_costs_are_shown_where_they_are_asked_for_and_known():
    cost = {"bits_per_weight": 3.5, "seconds": 61.4, "peak_memory_mb": 900.2}
    rows = perplexity_rows([record(20.0) | {"quantization": cost}, record(18.0, kv={"kind": "PerHead", "bits": 4})])
    assert "bits per weight" not in render(rows, "markdown")
    lines = render(rows, "markdown", costs=True).splitlines()
    assert [cell.strip() for cell in lines[4].split("|")[-4:-1]] == ["3.50", "61", "900"]
    assert [cell.strip() for cell in lines[5].split("|")[-4:-1]] == ["n/a"] * 3


def test_the_error_of_a_change_comes_from_paired_windows():
    vanilla, intact = record(20.0), record(15.0, prefix=BOS)
    (row,) = perplexity_rows([vanilla, intact])
    assert row.intact.error == pytest.approx(0, abs=1e-12)  # the windows differ much, the arms by the same in each
    intact["window_nll"] = [a + d for a, d in zip(vanilla["window_nll"], (-0.4, -0.2, -0.3), strict=True)]
    (row,) = perplexity_rows([vanilla, intact])
    assert row.intact.error == pytest.approx(0.75 * 0.1 / 3**0.5)


def test_files_of_one_name_and_another_text_do_not_meet():
    rows = perplexity_rows([record(20.0), record(15.0, prefix=BOS, tokens_sha256="bb")])
    assert [(r.vanilla.perplexity, r.intact.perplexity) for r in rows] == [(20.0, None), (None, 15.0)]


def test_the_newest_of_two_runs_of_a_cell_counts(intactkv_root):
    rows = perplexity_rows([record(20.0), record(19.0, "2026-01-02", batch_size=1)])
    assert [r.vanilla.perplexity for r in rows] == [19.0]


def test_csv_holds_what_the_markdown_shows():
    rows = perplexity_rows(
        [record(20.0), record(15.0, prefix=BOS), record(1234.5, weights="rtn-w2g64", made_of={"bits": 2})]
    )
    table = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert [(line["weights"], line["vanilla"], line["IntactKV"], line["change"]) for line in table] == [
        ("rtn-w4g64", "20", "15", "-0.25"),
        ("rtn-w2g64", "1234.5", "", ""),
    ]
    markdown = render(rows, "markdown")
    assert "| -25.0% |           0.0% |" in markdown
    assert "1.23e+03" in markdown
    assert "n/a" in markdown
    widths = {len(line) for line in markdown.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def seeded(perplexity: float, seed: int, segments: str = "", **settings: Any) -> dict[str, Any]:
    """A run of weights that were calibrated on the text that a seed drew."""
    made_of = {"source": "abc", "calibration": {"corpus": "c4", "seed": seed}, "segments": segments or f"text {seed}"}
    return record(perplexity, made_of=made_of, **settings)


def test_seeds_become_a_mean_and_changes_are_paired_by_seed():
    records = [seeded(20.0, 0), seeded(22.0, 1), seeded(27.0, 2), seeded(19.0, 0, prefix=BOS),
               seeded(16.5, 1, prefix=BOS)]  # fmt: skip
    assert len(perplexity_rows(records)) == 3
    (row,) = perplexity_rows(records, over_seeds=True)
    assert row.vanilla.figure is not None
    assert row.intact.relative is not None
    # Mean 23, deviations −3, −1, 4: variance 26 / 2. Changes −5 % and −25 %: mean −15 %, deviation 0.1 · √2.
    assert (row.vanilla.perplexity, row.vanilla.figure.runs) == (pytest.approx(23), 3)
    assert row.vanilla.figure.deviation == pytest.approx(13**0.5)
    assert row.intact.change == pytest.approx(-0.15)
    assert row.intact.relative.deviation == pytest.approx(0.1 * 2**0.5)
    text = render([row], "markdown")
    assert "23.00 ± 3.61 (3)" in text
    assert "-15.0% ± 14.1% (2)" in text
    (line,) = csv.DictReader(io.StringIO(render([row], "csv")))
    assert [line[name] for name in ("vanilla", "vanilla sd", "vanilla runs")] == ["23", "3.60555", "3"]


def test_seeds_of_one_text_are_joined_and_texts_are_told_apart_by_their_files():
    def of_file(perplexity: float, seed: int, file: str) -> dict[str, Any]:
        text = {"corpus": "c4", "files": [file], "tokenizer": "t", "start": 1}
        made_of = {"source": "abc", "calibration": {"corpus": "c4", "seed": seed}, "text": text}
        return record(perplexity, made_of=made_of)

    rows = perplexity_rows([of_file(20.0, 0, "a"), of_file(22.0, 1, "a"), of_file(30.0, 0, "b")], over_seeds=True)
    figures = [row.vanilla.figure for row in rows]
    assert [(figure.value, figure.runs) for figure in figures if figure is not None] == [(21.0, 2), (30.0, 1)]


def test_seeds_are_paired_for_every_intact_prefix():
    records = [seeded(20.0, 0), seeded(40.0, 1), seeded(19.0, 0, prefix=BOS), seeded(18.0, 0, prefix=CAL),
               seeded(32.0, 1, prefix=CAL)]  # fmt: skip
    rows = perplexity_rows(records, over_seeds=True)
    # [cal]: −10 % and −20 %; [B] has one seed.
    assert [(r.prefix, r.vanilla.perplexity, r.intact.perplexity, r.intact.change) for r in rows] == [
        ("[B]", 30.0, 19.0, pytest.approx(-0.05)),
        ("[cal]", 30.0, 25.0, pytest.approx(-0.15)),
    ]


def test_one_seed_shows_the_figure_alone_and_no_seed_meets_another_method():
    rows = perplexity_rows([seeded(20.0, 0), record(30.0)], over_seeds=True)
    assert [row.vanilla.perplexity for row in rows] == [20.0, 30.0]
    assert "±" not in render(rows, "markdown")


def test_the_newest_run_of_a_seed_counts():
    records = [seeded(20.0, 0), seeded(24.0, 1), seeded(22.0, 0, batch_size=1)]
    (row,) = perplexity_rows(records, over_seeds=True)
    assert row.vanilla.figure is not None
    assert (row.vanilla.perplexity, row.vanilla.figure.runs) == (pytest.approx(23), 2)


def test_other_text_under_the_same_seed_is_no_repetition():
    records = [seeded(20.0, 0, "one file"), seeded(24.0, 0, "another of its name"), seeded(22.0, 1)]
    assert len(perplexity_rows(records, over_seeds=True)) == 3


def test_other_text_under_the_same_seed_is_seen_across_tables():
    records = [seeded(20.0, 0, "one file"), seeded(24.0, 0, "another of its name", window=256), seeded(22.0, 1)]
    assert len(perplexity_rows(records, over_seeds=True)) == 3


def test_runs_that_differ_in_more_than_the_seed_stay_apart():
    other = {"source": "abc", "calibration": {"corpus": "pile", "seed": 1}, "segments": "text 1"}
    assert len(perplexity_rows([seeded(20.0, 0), record(24.0, made_of=other)], over_seeds=True)) == 2


def test_the_error_of_a_mean_over_seeds_comes_from_the_mean_differences_of_its_windows():
    records = [seeded(20.0, 0), seeded(20.0, 1), seeded(15.0, 0, prefix=BOS), seeded(15.0, 1, prefix=BOS)]
    for intact, differences in zip(records[2:], [(-0.5, -0.1, -0.3), (-0.3, -0.3, -0.3)], strict=True):
        pairs = zip(records[0]["window_nll"], differences, strict=True)
        intact["window_nll"] = [window + difference for window, difference in pairs]
    (row,) = perplexity_rows(records, over_seeds=True)
    assert row.intact.error == pytest.approx(0.75 * 0.1 / 3**0.5)  # mean differences −0.4, −0.2, −0.3
