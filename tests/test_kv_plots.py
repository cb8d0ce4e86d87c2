"""The figures of KV policies: what stands in them is what the cache holds, and what records say."""

import csv
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from corpora.errors import Parser
from eval.programs import plot, ppl
from intactkv.attach import attach
from quantization.kv_cache import PerHead
from quantization.kv_cache.per_head import WholeRange


@pytest.fixture
def program(run_main):
    """program(command, options…) -> (exit code, stdout, stderr), run in this process."""

    def main(part) -> None:
        top: ArgumentParser = Parser(prog="eval")
        part.add(top.add_subparsers(dest="command", required=True))
        part.run(top.parse_args())

    return lambda part, *arguments: run_main(partial(main, part), part.__name__.split(".")[-1], *arguments)


@pytest.fixture
def model(intactkv_root, tiny_checkpoint) -> Path:
    return tiny_checkpoint(intactkv_root / "modelzoo", "llama")


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_the_grids_error_is_that_of_the_keys_and_values_of_the_plain_cache(program, model, text, intactkv_root):
    out = intactkv_root / "figures"
    code, _, stderr = program(plot, "kv-grid", "--model", model, "--kv", "per_head", "--kv-bits", 3, "--corpus", text,
                              "--tokens", 24, "--layers", "0,2", "--out", out, "--format", "svg")  # fmt: skip
    assert code == 0, stderr
    assert len(list(out.glob("*.svg"))) == 2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from corpora.text import evaluation_stream, protocol

    dense = AutoModelForCausalLM.from_pretrained(model)
    stream = evaluation_stream(
        AutoTokenizer.from_pretrained(model), str(text), window=24, protocol=protocol("intactkv")
    )
    cache = attach(dense, None).new_cache()
    with torch.no_grad():
        attach(dense, None).feed(stream.windows(1)[:, :24], cache=cache)
    (table,) = out.glob("*layer0.csv")
    for name, states in zip(("keys, after RoPE", "values"), cache.intact_layers[0].held, strict=True):
        policy = PerHead(3)
        rounding = WholeRange(policy, policy.grid)
        from intactkv.rope import Places

        error = (rounding.numbers(states, Places(0, 24)) - states).abs()[0].transpose(0, 1).flatten(1).mean(0)
        told = torch.tensor([float(row["mean error"]) for row in rows_of(table) if row["tensor"] == name])
        assert_close(told, error, rtol=1e-2, atol=1e-3)


def test_a_full_precision_cache_has_no_error_to_draw(program, model, text):
    code, stdout, stderr = program(plot, "kv-grid", "--model", model, "--corpus", text, "--tokens", 24)
    assert (code, stdout) == (2, "")
    assert "the KV cache has full precision" in stderr.splitlines()[-1]


def test_perplexities_stand_over_the_bits_that_records_say(program, model, text, intactkv_root):
    measured = ("--model", model, "--corpus", text, "--window", 24, "--limit", 2)
    assert program(plot, "kv-bits", "--model", "tiny-llama")[0] == 2  # there are no runs
    kivi = ("--kv", "kivi", "--kv-bits", 2, "--kv-group-size", 8, "--set", "kv_cache.residual=8")
    for kv in ((), ("--kv", "per_head", "--kv-bits", 2), ("--kv", "per_head", "--kv-bits", 4), kivi,
               (*kivi, "--set", "kv_cache.prefill=final")):  # fmt: skip
        for prefix in ("none", "bos"):
            code, _, stderr = program(ppl, *measured, *kv, "--prefix", prefix)
            assert code == 0, stderr
    code, stdout, stderr = program(plot, "kv-bits", "--model", "tiny-llama", "--format", "svg")
    assert code == 0, stderr
    (table,) = [Path(line) for line in stdout.splitlines() if line.endswith(".csv")]
    found = {(row["KV"], row["prefix"]): float(row["bits an element"]) for row in rows_of(table)}
    tokens, exact = 23, 23 - 16  # keys: two blocks of 8 are closed; values: the newest 8 are exact
    keys = (16 * (2 + 32 / 8) + exact * 16) / tokens
    values = (15 * (2 + 32 / 8) + 8 * 16) / tokens
    assert found == {
        ("16", "none"): 16,
        **{(f"{bits} per_head", prefix): bits + 64 / 16 for bits in (2, 4) for prefix in ("none", "[B]")},
        **{(f"2g8 kivi residual8{prefill}", prefix): pytest.approx((keys + values) / 2, abs=1e-3)
           for prefill in ("", " final") for prefix in ("none", "[B]")},
    }  # fmt: skip
    lines = {(row["policy"], row["prefix"]) for row in rows_of(table)}  # one for every policy, whatever its bits
    assert {policy for policy, _ in lines} == {"16", "per_head", "g8 kivi residual8", "g8 kivi residual8 final"}
