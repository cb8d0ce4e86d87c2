"""Needle in a haystack: what a prompt holds, what counts as found, and the program with its records and pictures."""

import csv
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from common import ROOT, error_line, every

from corpora.json_files import with_sum
from eval import needle
from eval.__main__ import main
from eval.generation import Generation
from eval.needle import PUBLISHED_KEYS, Cell, Grid, drawn_keys, found, look_for, prompt_ids, published_length
from eval.runs import all_records
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.kv_cache import KIVI, PerHead
from quantization.runs.opening import load_tokenizer

POSITIONS = 1024
LENGTHS = (400, 600)  # of the tiny tokenizer, one token a character
SMALL = ("--lengths", "400,600", "--depths", "0,100", "--keys", "2", "--max-new-tokens", "4")


@pytest.fixture
def model(intactkv_root: Path, tiny_checkpoint) -> Path:
    """A tiny checkpoint in its own zoo, with room for a needle."""
    return tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=POSITIONS)


@pytest.fixture
def program(run_main):
    """program(arguments…) -> (exit code, stdout, stderr) of `eval needle`, run in this process."""
    return partial(run_main, main, "needle")


def record_of(program, *arguments):
    code, out, err = program(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


# prompts --------------------------------------------------------------------------------------------------------------


def check_prompt(tokenizer, lead, cell: Cell) -> list[int]:
    """The laws of a prompt: the key twice and in one line, at its depth ± one line, the length ± 1 %."""
    ids, key = prompt_ids(tokenizer, lead, Grid((cell.length,), (cell.depth,), (cell.key,)), cell)
    assert ids[: len(lead)] == list(lead)
    text = tokenizer.decode(ids[len(lead) :], clean_up_tokenization_spaces=False)
    assert text.count(cell.key) == 2
    _, *lines, question = text.split("\n")  # behind the instruction
    (at,) = [i for i, line in enumerate(lines) if cell.key in line]
    assert abs(at - cell.depth / 100 * (len(lines) - 1)) <= 1
    assert 0.99 * cell.length <= len(ids) <= cell.length
    assert not question.endswith(" ")
    assert tokenizer.decode(key, clean_up_tokenization_spaces=False) == f" {cell.key}"
    return ids


@every("length", [800, 1500])
@every("depth", [0, 10, 33, 50, 99, 100])
def test_a_prompt_has_its_needle_at_its_depth_and_its_length_in_tokens(length, depth, tiny_tokenizer):
    check_prompt(tiny_tokenizer(), [1], Cell(length, depth, "47x291"))


@every("length", [256, 300, 777, 2048])
@every("depth", [0, 25, 50, 75, 100])
def test_also_in_a_vocabulary_of_words_and_behind_a_longer_prefix(length, depth, smollm2):
    tokenizer = load_tokenizer(smollm2)
    for key in ("47x291", *drawn_keys(2, seed=3)):
        check_prompt(tokenizer, [1, 4093, 198], Cell(length, depth, key))


def test_prompts_of_all_depths_differ_only_in_the_order_of_their_lines(tiny_tokenizer):
    texts = [check_prompt(tiny_tokenizer(), [1], Cell(1000, depth, "47x291")) for depth in (0, 50, 100)]
    assert len({tuple(ids) for ids in texts}) == 3
    assert len({tuple(sorted(ids)) for ids in texts}) == 1


def test_the_published_prompt_has_as_many_lines_on_both_sides_and_ends_in_a_space(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    grid = Grid((10**6,), (50,), PUBLISHED_KEYS, lines=14)
    for cell in grid.cells():
        ids, key = prompt_ids(tokenizer, [1], grid, cell)
        text = tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False)
        _, *lines, question = text.split("\n")
        assert [cell.key in line for line in lines] == [False] * 7 + [True] + [False] * 7
        assert question.endswith(" ")
        assert tokenizer.decode(key) == cell.key
        assert len(ids) == published_length(tokenizer, [1], 14)  # here all keys have six tokens


def test_keys_are_drawn_in_the_pattern_of_the_published_ones():
    pattern = re.compile(r"(?=.{6}$)[1-9]\d*[a-z]\d+")
    keys = drawn_keys(200, seed=0)
    assert all(pattern.fullmatch(key) for key in (*keys, *PUBLISHED_KEYS))
    assert len(set(keys)) == 200
    assert keys[:5] == drawn_keys(5, seed=0) != drawn_keys(5, seed=1)


def test_only_the_exact_key_is_found():
    for answer in ("590p37", " 590p37.", "It is 590p37, I think", "(590p37)", "590p37\n590p37"):
        assert found("590p37", answer)
    for answer in ("594p37", "5940. The", "590p37x", "1590p37", "590p3", "590P37", "590 p37", ""):
        assert not found("590p37", answer)


# answers --------------------------------------------------------------------------------------------------------------


def test_the_score_is_the_log_probability_of_the_key_behind_the_prompt(tiny_model, tiny_tokenizer):
    """Against the plain formula in float64 over the whole text, without any cache."""
    model, tokenizer = tiny_model("llama", max_position_embeddings=POSITIONS), tiny_tokenizer()
    grid = Grid((400,), (50,), ("47x291",))
    (cell,) = grid.cells()
    (row,) = look_for(attach(model, None), tokenizer, Generation((2,), 0), [1], grid, [cell], 4)
    ids, key = prompt_ids(tokenizer, [1], grid, cell)
    with torch.no_grad():
        logits = model(torch.tensor([ids + key])).logits[0].double()
    chosen = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, torch.tensor(key)[:, None])
    assert row["log_likelihood"] == pytest.approx(float(chosen.sum()), abs=1e-4)  # float32 in another order
    first = int(logits[len(ids) - 1].argmax())
    assert row["answer"].startswith(tokenizer.decode([first]))
    assert (row["tokens"], row["quantized"]) == (len(ids), 0.0)


def test_the_answer_ends_where_the_model_ends_it_and_the_cache_is_quantized(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model("llama", max_position_embeddings=POSITIONS), tiny_tokenizer()
    grid = Grid((400,), (50,), ("47x291",))
    every_id = Generation(tuple(range(101)), 0)
    quantized = attach(model, None, PerHead(bits=2))
    (row,) = look_for(quantized, tokenizer, every_id, [1], grid, grid.cells(), 4)
    assert (row["answer"], row["found"], row["quantized"]) == ("", False, 1.0)


def test_bits_are_those_of_the_tokens_behind_the_prefix(tiny_model, tiny_tokenizer):
    """KIVI's newest tokens are exact, so its mean depends on how many there are."""
    model, tokenizer = tiny_model("llama", max_position_embeddings=POSITIONS), tiny_tokenizer()
    grid, policy, lead = Grid((400,), (50,), ("47x291",)), KIVI(2, 8, 8), [1, 5, 7]
    prefix = build_prefix(model, lead)
    (row,) = look_for(attach(model, prefix, policy), tokenizer, Generation((2,), 0), lead, grid, grid.cells(), 4)
    behind = row["tokens"] - 3
    exact = (behind % 8, 8)  # keys behind the last whole group; the newest values
    wanted = [(left * 16 + (behind - left) * (2 + 32 / 8)) / behind for left in exact]
    assert row["bits_per_element"] == pytest.approx(wanted)


@pytest.mark.slow
def test_the_real_model_finds_a_key_in_full_precision(smollm2, run_main, intactkv_root):
    code, out, err = run_main(main, "needle", "--model", smollm2, "--lengths", 256, "--depths", 50, "--keys", 1,
                              "--json")  # fmt: skip
    assert code == 0, err
    (row,) = json.loads(out)["results"]
    assert row["found"]
    assert row["log_likelihood"] > -3


# the program ----------------------------------------------------------------------------------------------------------


def test_a_run_prints_a_grid_and_leaves_a_record_of_every_question(program, model, intactkv_root):
    code, out, err = program("--model", model, *SMALL, "--kv-bits", 2, "--prefix", "bos")
    assert code == 0, err
    assert "| tokens | depth 0 % | depth 100 % |" in out
    assert "rounded of what attention read behind the prefix: 100.0%" in out
    (record,) = all_records("needle")
    results, settings = record["results"], record["settings"]
    assert {(row["length"], row["depth"]) for row in results} == {(400, 0), (400, 100), (600, 0), (600, 100)}
    assert {row["key"] for row in results} == set(settings["keys"]) == set(drawn_keys(2, 0))
    assert record["found"] == sum(row["found"] for row in results) / 8
    assert record["log_likelihood"] == pytest.approx(sum(row["log_likelihood"] for row in results) / 8)
    assert list((intactkv_root / "outputs" / "needle").iterdir()) == []
    again = record_of(program, "--model", model, *SMALL, "--kv-bits", 2, "--prefix", "bos")
    assert again["started"] == record["started"]


def test_a_run_that_quantizes_nothing_says_so(program, model):
    words = (
        "--model",
        model,
        *SMALL[:2],
        "--depths",
        50,
        "--keys",
        1,
        "--kv",
        "kivi",
        "--kv-bits",
        2,
        "--kv-group-size",
        16,
    )
    code, out, err = program(*words, "--set", "kv_cache.residual=1024")
    assert code == 0, err
    assert "none of what attention read was rounded" in out
    plain = record_of(program, *words[:-6])["results"]
    for row, exact in zip(all_records("needle")[0]["results"], plain, strict=True):
        assert (row["quantized"], row["answer"]) == (0.0, exact["answer"])
        assert row["log_likelihood"] == pytest.approx(exact["log_likelihood"], abs=1e-4)


def test_all_arms_see_the_same_tokens_and_full_precision_scores_them_alike(program, model):
    arms = {words: record_of(program, "--model", model, *SMALL, *words.split())["results"]
            for words in ("", "--prefix bos", "--prefix bos --vanilla")}  # fmt: skip
    plain, intact, vanilla = arms.values()
    assert plain == vanilla
    for row, other in zip(plain, intact, strict=True):
        assert {**row, "log_likelihood": 0} == {**other, "log_likelihood": 0}
        assert row["log_likelihood"] == pytest.approx(other["log_likelihood"], abs=1e-3)
    quantized = record_of(program, "--model", model, *SMALL, "--kv-bits", 2)["results"]
    assert [row["log_likelihood"] for row in quantized] != [row["log_likelihood"] for row in plain]


def test_a_killed_grid_goes_on_where_it_was_and_ends_alike(program, model, intactkv_root, monkeypatch):
    words = ("--model", model, *SMALL, "--recipe", "rtn", "--bits", 4, "--group-size", 32)
    whole = record_of(program, *words)
    asked = []

    def dying(*arguments, **keywords):
        for row in look_for(*arguments, **keywords):
            if len(asked) == 3:
                raise KeyboardInterrupt
            asked.append(row)
            yield row

    monkeypatch.setattr(needle, "look_for", dying)
    assert program(*words, "--force")[0] == 130
    (file,) = (intactkv_root / "outputs" / "needle").glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 3
    file.write_text(file.read_text() + '{"grid": "12')  # what a kill within a write leaves
    monkeypatch.undo()
    monkeypatch.setenv("INTACTKV_ROOT", str(intactkv_root))
    (stored,) = (intactkv_root / "outputs" / "runs").glob("needle-*.json")
    stored.unlink()
    again = record_of(program, *words)
    assert (again["answered_now"], again["results"]) == (5, whole["results"])
    assert not file.exists()


@pytest.mark.slow
def test_two_processes_share_the_questions_and_end_alike(program, model, intactkv_root):
    words = ["needle", "--model", str(model), *SMALL, "--device", "cpu", "--json"]
    alone = record_of(program, *words[1:-1])
    (stored,) = (intactkv_root / "outputs" / "runs").glob("needle-*.json")
    stored.unlink()
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "eval"]
    done = subprocess.run([*launched, *words], cwd=ROOT, env=os.environ | {"INTACTKV_ROOT": str(intactkv_root)},
                          capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    shared = json.loads(done.stdout)
    assert (shared["identity"], shared["results"]) == (alone["identity"], alone["results"])
    assert list((intactkv_root / "outputs" / "needle").iterdir()) == []


def test_a_result_that_was_changed_or_is_another_runs_is_refused(program, model, intactkv_root):
    words = ("--model", model, *SMALL)
    record = record_of(program, *words)
    (stored,) = (intactkv_root / "outputs" / "runs").glob("needle-*.json")
    stored.unlink()
    file = intactkv_root / "outputs" / "needle" / f"{record['identity']}.jsonl"
    row = record["results"][0]
    ours = {"grid": record["identity"], **row}
    for line, said in (({**with_sum(ours), "found": True}, "its sum is another"),
                       (with_sum({**ours, "grid": "12345678"}), "a result of another run")):  # fmt: skip
        file.write_text(json.dumps(line) + "\n")
        code, _, err = program(*words)
        assert code == 2
        assert said in error_line(err)
    file.write_text(json.dumps(with_sum(ours)) + "\n")
    assert record_of(program, *words)["answered_now"] == 7


def test_the_five_published_keys_are_told_one_by_one(program, model):
    code, out, err = program("--model", model, "--published", "--units", 1, "--lines", 2)
    assert code == 0, err
    assert [line.split()[1] for line in out.splitlines() if line[2:8] in PUBLISHED_KEYS] == list(PUBLISHED_KEYS)
    record = record_of(program, "--model", model, "--published", "--units", 2, "--lines", 1)
    assert record["settings"]["lines"] == 4
    assert record["settings"]["max_new_tokens"] is None  # one more than the key has
    assert record["identity"] == all_records("needle")[-1]["identity"]  # the same text however it is counted


REFUSED = {
    "a length below the needle": (["--lengths", "100"], "--lengths 100: the needle with its question takes "),
    "a length beyond the positions": (["--lengths", "400,1020"], "--lengths 1020 with 16 new tokens: 1036 tokens"),
    "published text beyond them": (["--published"], "--units 5 --lines 127 with 7 new tokens"),
    "a depth beyond the text": (["--depths", "101"], "--depths: 101 is not allowed; give a whole number from 0 to 100"),
    "nothing in a list": (["--lengths", "400,"], "--lengths: '' is not allowed"),
    "no keys": (["--keys", "0"], "--keys: 0 is not allowed"),
    "a grid of the published keys": (["--published", "--depths", "3"], "--depths is of the grid"),
    "a seed, the default's, of the published keys": (["--published", "--text-seed", "0"], "--text-seed is of the grid"),
    "lines of a grid": (["--lines", "3"], "--lines counts the text of the published keys"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_is_refused_before_any_work(case, program, model, intactkv_root):
    words, said = REFUSED[case]
    code, out, err = program("--model", model, "--recipe", "rtn-w4", "--group-size", 32, *words)
    assert (code, out) == (2, "")
    assert said in error_line(err)
    assert not (intactkv_root / "modelzoo" / "quantized").exists()


def test_pictures_and_tables_show_the_numbers_of_the_records(program, run_main, model, intactkv_root, tmp_path):
    for words in ((), ("--kv-bits", "2"), ("--kv-bits", "2", "--prefix", "bos")):
        record_of(program, "--model", model, *SMALL, *words)
    records = all_records("needle")
    code, out, err = run_main(main, "plot", "needle", "--model", "tiny-llama", "--out", tmp_path / "n.png",
                              "--format", "svg", "--dpi", 40)  # fmt: skip
    assert code == 0, err
    drawn = (tmp_path / "n.svg").read_text()
    rows = list(csv.DictReader((tmp_path / "n.csv").open()))
    assert len(rows) == 3 * 4
    arms = ["full", "full, KV 2 per_head", "full, KV 2 per_head, IntactKV [B]"]
    assert [row["arm"] for row in rows[::4]] == arms
    assert all(arm in drawn for arm in arms[:2])
    for row in rows:
        (record,) = [record for record in records if record["identity"] == row["run"]]
        cell = [r for r in record["results"] if (str(r["length"]), str(r["depth"])) == (row["tokens"], row["depth"])]
        assert len(cell) == 2
        assert float(row["found"]) == sum(r["found"] for r in cell) / 2
        assert float(row["log-probability"]) == pytest.approx(sum(r["log_likelihood"] for r in cell) / 2, rel=1e-5)
    code, out, err = run_main(main, "table", "needle", "--model", "tiny-llama", "--format", "csv")
    assert code == 0, err
    assert [row["arm"] for row in csv.DictReader(out.splitlines())] == arms
    for words, said in (("table needle --window 3", "--window is no setting of needles"),
                        ("table needle --over-seeds", "--over-seeds is of calibration seeds"),
                        ("plot needle --model other", "holds no finished run that fits --model other"),
                        ("plot needle --model tiny-llama --lengths 7", "no finished run has")):  # fmt: skip
        code, _, err = run_main(main, *words.split())
        assert code == 2
        assert said in error_line(err)


def test_a_record_whose_results_do_not_agree_is_left_out(program, model, intactkv_root):
    record = record_of(program, "--model", model, *SMALL)
    (file,) = (intactkv_root / "outputs" / "runs").glob("needle-*.json")
    stored = {name: value for name, value in record.items() if name not in ("path", "sha256")}
    for change, said in (({"results": stored["results"][1:]}, "not those of its lengths"),
                         ({"found": 0.5}, "not that of its results")):  # fmt: skip
        file.write_text(json.dumps(with_sum({**stored, **change})))
        left_out: list[str] = []
        assert all_records("needle", left_out) == []
        assert said in left_out[0]
