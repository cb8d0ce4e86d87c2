"""The program `python -m eval stats` and its script, from the outside."""

import csv
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from common import FOXES, ROOT, refusals

from eval.__main__ import main
from eval.inside.reports import compact, decoded, encoded, mean_sqnr

RTN = ("--recipe", "rtn-w4", "--group-size", 32)
KINDS = {
    "linears": RTN,
    "distance": (*RTN, "--kv-bits", 4, "--prefix", "bos"),
    "kv": ("--kv-bits", 4, "--prefix", "bos"),
    "pivots": (),
}


@pytest.fixture
def model(intactkv_root, tiny_checkpoint) -> Path:
    """A tiny dense checkpoint in its own zoo."""
    return tiny_checkpoint(intactkv_root / "modelzoo", "llama")


@pytest.fixture
def program(run_main):
    """program(arguments…) -> (exit code, stdout, stderr) of `python -m eval stats`, run in this process."""
    return partial(run_main, main, "stats")


@pytest.fixture
def stats(program, model, text):
    """stats(kind, options…) -> the record, of two windows of 64 tokens of the text."""

    def call(kind: str, *options: object) -> dict:
        code, out, err = program(
            kind, "--model", model, "--corpus", text, "--window", 64, "--limit", 2, *options, "--json"
        )
        assert code == 0, err
        return decoded(json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")))

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_leaves_a_table_a_figure_and_one_record(kind, program, stats, model, text, intactkv_root):
    record = stats(kind, *KINDS[kind])
    out = intactkv_root / "outputs" / "stats"
    weights = {"linears": "rtn-w4g32", "distance": "rtn-w4g32-kv4__bos", "kv": "full-kv4__bos", "pivots": "full"}[kind]
    stem = f"tiny-llama__{kind}__{weights}__{record['identity']}"
    expected = {f"{stem}.csv", *(f"{stem}__figure.{ending}" for ending in ("png", "pdf", "csv"))}
    assert {path.name for path in out.iterdir()} - {f"{stem}__tokens.csv"} == expected
    assert (out / f"{stem}__figure.png").read_bytes().startswith(b"\x89PNG")
    with (out / f"{stem}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["rows"])
    for written, row in zip(rows, record["rows"], strict=True):
        for key, value in row.items():
            assert written[key] == str(value)  # full precision
    assert len(list((intactkv_root / "outputs" / "runs").glob(f"stats-{kind}-*.json"))) == 1
    # Asked again, the record is read back, and what is written comes out the same.
    before = (out / f"{stem}__figure.csv").read_bytes()
    shutil.rmtree(out)
    assert stats(kind, *KINDS[kind])["started"] == record["started"]
    assert (out / f"{stem}__figure.csv").read_bytes() == before
    code, table, _ = program(kind, "--model", model, "--corpus", text, "--window", 64, "--limit", 2, *KINDS[kind])
    assert code == 0
    assert "some text.txt: 2 × 64 tokens" in table
    assert len(list((intactkv_root / "outputs" / "runs").iterdir())) == 1


def test_runs_with_different_settings_keep_their_own_files(stats, text, intactkv_root):
    (intactkv_root / "other").mkdir()
    other = intactkv_root / "other" / text.name
    other.write_text(FOXES.upper())
    more = ((), ("--window", 32), ("--limit", 1), ("--corpus", other), ("--protocol", "gptq"),
            ("--set", "weights.grid.convention=gptq-sym"))  # fmt: skip
    records = [stats("linears", *RTN, *options) for options in more]
    out = intactkv_root / "outputs" / "stats"
    assert len({path.name for path in out.glob("*__figure.csv")}) == len(more)
    for record in records:
        weights = "rtn-w4g32" if record is not records[-1] else "rtn-w4g32-gptq-sym"
        (table,) = out.glob(f"tiny-llama__linears__{weights}__{record['identity']}.csv")
        assert [row["sqnr_w"] for row in csv.DictReader(table.open())] == [str(r["sqnr_w"]) for r in record["rows"]]


def test_a_prefix_puts_both_arms_side_by_side(stats, program, model, text):
    for kind in ("distance", "kv"):
        record = stats(kind, *RTN, "--prefix", "bos")
        assert list(record["means"]) == list(record["logits"]) == ["vanilla", "intact"]
        assert list(stats(kind, *RTN, "--prefix", "bos", "--vanilla")["means"]) == ["vanilla"]
        alone = stats(kind, *RTN)  # [BOS] stands in front of every window, too
        assert alone["logits"]["vanilla"] == record["logits"]["vanilla"]
    _, table, _ = program(
        "kv", "--model", model, "--corpus", text, "--window", 64, "--limit", 2, *RTN, "--prefix", "bos"
    )
    assert "K rest, vanilla" in table
    assert "K rest, intact" in table


def test_an_intact_arm_measures_only_tokens_that_the_linears_process(stats):
    vanilla, intact = stats("linears", *RTN), stats("linears", *RTN, "--prefix", "bos")
    assert (vanilla["arm"], intact["arm"]) == ("vanilla", "intact")
    assert [row["sqnr_w"] for row in vanilla["rows"]] == [row["sqnr_w"] for row in intact["rows"]]
    assert all(v["mean_x"] != i["mean_x"] for v, i in zip(vanilla["rows"], intact["rows"], strict=True))


def test_fewer_bits_have_lower_means(stats):
    means = [
        stats("linears", "--recipe", "rtn", "--bits", bits, "--group-size", 32)["means"]["all"] for bits in (8, 4, 2)
    ]
    assert [m["sqnr_o"] for m in means] == sorted((m["sqnr_o"] for m in means), reverse=True)


def test_a_quantized_directory_gives_the_figures_of_its_recipe_packed_or_not(stats, program, text, intactkv_root):
    expected = stats("linears", *RTN)["rows"]
    (place,) = (
        path for path in (intactkv_root / "modelzoo" / "quantized" / "tiny-llama").glob("rtn*") if path.is_dir()
    )
    for packed in ((), ("--kernel", "unpack")):
        code, out, _ = program(
            "linears", "--model", place, "--corpus", text, "--window", 64, "--limit", 2, *packed, "--json"
        )
        assert code == 0
        assert decoded(json.loads(out))["rows"] == expected


def test_rescaled_weights_are_compared_with_the_rescaled_twin(stats, model, text):
    """AWQ's weights are far from the checkpoint's, but near to their twin's; and the twin is the same function."""
    options = ("--recipe", "awq-w4", "--group-size", 32, "--calibration", text, "--calibration-samples", 8,
               "--calibration-length", 32, "--set", "calibration.draw=segments")  # fmt: skip
    assert stats("linears", *options)["means"]["all"]["sqnr_w"] > 15
    awq, rtn = (stats("distance", *recipe)["logits"]["vanilla"]["kl"] for recipe in (options, RTN))
    assert awq < 2 * rtn


def test_every_row_is_printed_on_request(program, model, text):
    common = ("linears", "--model", model, "--corpus", text, "--window", 64, "--limit", 2, *RTN)
    summary, full = (program(*common, *more)[1] for more in ((), ("--full",)))
    assert "The 10 linears with the largest own error" in summary
    assert "sqnr_x |" not in summary
    assert full.count("self_attn.q_proj") == 3
    assert "sqnr_x |" in full


def test_the_windows_of_the_distance_are_drawn_with_a_seed(stats):
    first, again, other = (stats("distance", *RTN, *more) for more in ((), ("--text-seed", 1234), ("--text-seed", 5)))
    assert first["identity"] == again["identity"]
    assert first["settings"]["tokens_sha256"] != other["settings"]["tokens_sha256"]


def test_the_plain_protocol_puts_nothing_in_front(stats):
    record = stats("linears", *RTN, "--protocol", "gptq")
    assert record["settings"]["lead"] == []
    assert record["tokens"] == 2 * 64


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("linears",), "quantizes none"),
        (("pivots", "--kv-bits", 4), "add --kv none"),
        (("kv", "--corpus", "no-such-corpus"), "neither a file nor a known corpus"),
        (("kv", "--window", 5000, "--limit", 1), "less than one window"),
        (("distance", "--window", 5000), "a segment takes 5000"),
        (("kv", "--window", 300, "--limit", 1), "256 positions"),
        (("kv", "--window", 2), "--window: 2 is not allowed; give a whole number from 3"),
        (("kv", "--limit", 0), "--limit: 0 is not allowed"),
        (("kv", "--vanilla"), "--vanilla compares"),
        (("kv", "--out", "x.txt"), "give a file that ends in .csv"),
        (("nothing",), "invalid choice"),
        (("kv", "--text-seed", 3), "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line(options, named, program, model, text):
    corpus = () if "--corpus" in options else ("--corpus", text)
    code, _, err = program(options[0], "--model", model, *corpus, *options[1:])
    assert code == 2
    assert named in err
    assert len(err.strip().splitlines()) == 1


def test_a_quantized_checkpoint_without_its_dense_source_is_refused(stats, program, text, intactkv_root, model):
    stats("linears", *RTN)
    (place,) = (
        path for path in (intactkv_root / "modelzoo" / "quantized" / "tiny-llama").glob("rtn*") if path.is_dir()
    )
    shutil.rmtree(model)
    for kind in ("linears", "distance", "kv"):
        code, _, err = program(kind, "--model", place, "--corpus", text, "--window", 64, "--limit", 2, "--force")
        assert code == 2
        assert "the dense full-precision model" in err.strip().splitlines()[-1]


def test_help_does_not_wait_for_torch():
    code = ("import sys; sys.argv = ['eval', 'stats', 'kv', '--help']\nfrom eval.__main__ import main\n"
            "try: main()\nexcept SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--kv-bits" in done.stdout


def test_figures_are_compact_and_survive_the_record():
    assert [compact(x) for x in (0.0, 12.3456, 123456.0, 0.00012346, 0.000012345, -1e-9, float("inf"), 7)] == [
        "0", "12.35", "123456", "0.0001235", "1.23e-05", "-1.00e-09", "inf", "7",
    ]  # fmt: skip
    figures = {"a": [float("inf"), 1.5, None], "b": {"c": float("-inf"), "text": "'inf'"}}
    assert decoded(json.loads(json.dumps(encoded(figures), allow_nan=False))) == figures
    assert mean_sqnr([float("inf"), 10.0, 20.0, float("nan")]) == 15.0
    assert mean_sqnr([float("inf")] * 2) == float("inf")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("smollm2", "135m", "rtn", "3"), "got 4 of 5"), (("smollm2", "135m", "rtn", "3", "gpu"), "device 'gpu'"),
     (("no-such", "7b", "rtn", "3", "cpu"), "no-such-7b is")],
)  # fmt: skip
def test_the_script_refuses_in_one_line(arguments, named):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("scripts/setup.sh has not made .venv")
    done = subprocess.run(["bash", "scripts/eval/stats.sh", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"INTACTKV_ROOT": str(ROOT)}, check=False)  # fmt: skip
    assert done.returncode == 2
    assert len(refusals(done.stderr)) == 1, done.stderr
    assert named in done.stderr


@pytest.fixture
def of_smollm2(smollm2, intactkv_root, program):
    """stats of the real model: (kind, options…) -> record, of one window of 128 tokens of the sample."""
    for name in ("datasets/sample", "modelzoo/smollm2"):
        (intactkv_root / name).parent.mkdir(exist_ok=True)
        (intactkv_root / name).symlink_to(ROOT / name)

    def call(kind: str, *options: object) -> dict:
        code, out, err = program(kind, "--model", smollm2, "--window", 128, "--limit", 1, *options, "--json")
        assert code == 0, err
        return decoded(json.loads(out))

    return call


@pytest.mark.slow
def test_the_start_token_of_smollm2_is_its_pivot(of_smollm2):
    record = of_smollm2("pivots")
    (pivot,) = record["pivots"]
    assert (pivot["position"], pivot["text"]) == (0, "'<|im_start|>'")
    assert pivot["largest"] > 20_000
    assert pivot["attention_mass"] > 0.3  # an even share of 128 positions is below 0.05
    rows = record["rows"]
    assert rows[11]["hessian_share_mlp.down_proj"] > 0.9  # where the massive activation is written
    assert max(row["v_pivots"] / row["v_rest"] for row in rows[12:27]) < 0.5  # sinks have short values


@pytest.mark.slow
def test_on_smollm2_more_bits_are_nearer_and_intact_pivots_exact(of_smollm2):
    three, four = (of_smollm2("distance", "--recipe", f"rtn-w{bits}") for bits in (3, 4))
    assert four["logits"]["vanilla"]["kl"] < 0.5 * three["logits"]["vanilla"]["kl"]
    for curve in ("own_sqnr", "input_sqnr", "output_sqnr"):
        # A bit is worth 6 dB; the error that accumulates saturates where little is left of the signal.
        assert four["means"]["vanilla"][curve] > three["means"]["vanilla"][curve] + 3
    kv = of_smollm2("kv", "--kv-bits", 4, "--prefix", "bos")
    assert kv["means"]["intact"]["pivots"]["k_sqnr"] == float("inf")
    assert kv["means"]["intact"]["rest"]["attention_sqnr"] > kv["means"]["vanilla"]["rest"]["attention_sqnr"]
