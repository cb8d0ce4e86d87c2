"""The trainable prefix: what gets a gradient, what the loss is, that it falls, and what is written in the end."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from common import ROOT, kill_training
from families import FAMILIES, plain_logits, random_ids
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from corpora.errors import UserError
from intactkv.attach import attach
from intactkv.prefix import Prefix, build_prefix
from intactkv.trainable import LAST_RATE, PrefixTraining, TrainedPrefix, starting_point, statistics, train_prefix
from intactkv.training import Schedule, every
from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.programs.train import held_out_pieces

BOS = 1
DISCRETE = (20, 33, BOS)
SHORT = PrefixTraining(length=4, learning_rate=2e-2, epochs=5)
TEXTS = torch.stack([random_ids(24, seed) for seed in range(6)])
HELD_OUT = torch.stack([random_ids(24, 50 + seed) for seed in range(3)])


def make(name: str, tiny_model):
    model_type, overrides = FAMILIES[name]
    return tiny_model(model_type, **overrides)


def trained(model, training: PrefixTraining = SHORT, ids=DISCRETE, **options) -> TrainedPrefix:
    return train_prefix(model, ids, BOS, TEXTS, HELD_OUT, training, **options)


def same_prefix(a: Prefix, b: Prefix) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip((a.ids, a.logits, *a.keys, *a.values), (b.ids, b.logits, *b.keys, *b.values),
                                          strict=True)
    )  # fmt: skip


# The start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "expected"), [
    (1, [9]), (2, [5, 9]), (3, [5, 6, 9]), (4, [5, 6, 5, 9]), (7, [5, 6, 5, 6, 5, 6, 9]),
])  # fmt: skip
def test_it_starts_from_the_discrete_prefix_repeated_or_cut_with_its_last_token_last(length, expected):
    table = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    named, first = starting_point(table, [5, 6, 9], PrefixTraining(length=length))
    assert named == expected
    assert torch.equal(first, table[expected])


def test_bos_alone_is_followed_by_vectors_near_the_mean_embedding():
    table = 3 * torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)) + 1
    named, first = starting_point(table.half(), [9], PrefixTraining(length=5))
    assert named == [9] * 5
    assert_close(first[0], table[9].half().float())
    away = first[1:] - table.mean(dim=0)
    assert float(away.std()) == pytest.approx(0.02 * float(table.std()), rel=0.2)
    assert len({float(row[0]) for row in first}) == 5  # no two are the same
    assert torch.equal(first, starting_point(table.half(), [9], PrefixTraining(length=5))[1])


# The loss -------------------------------------------------------------------------------------------------------------


def test_statistics_are_mean_square_and_variance_over_tokens_and_channels():
    outputs = [3 + 2 * torch.randn(5, 7, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    exact = [x.double().flatten() for x in outputs]
    assert statistics(outputs, "l2").tolist() == pytest.approx([float((x * x).mean()) for x in exact], rel=1e-5)
    centred = [float(((x - x.mean()) ** 2).mean()) for x in exact]
    assert statistics(outputs, "var").tolist() == pytest.approx(centred, rel=1e-5)


@torch.no_grad()
def outputs_by_subtraction(model, ids: Tensor, skipped: int, whole_block: bool) -> list[Tensor]:
    """What attention (or the block) adds to or leaves in the residual stream, from the streams in front and behind."""
    streams: list[Tensor] = []
    handles = []
    for block in model.model.layers:
        handles.append(block.register_forward_pre_hook(lambda _m, args: streams.append(args[0])))
        handles.append(
            block.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: streams.append(args[0]))
        )
    handles.append(model.model.norm.register_forward_pre_hook(lambda _m, args: streams.append(args[0])))
    model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    rows = [x[0, skipped:].double() for x in streams]
    return rows[2::2] if whole_block else [after - before for before, after in zip(rows[::2], rows[1::2], strict=False)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("changes", [
    {}, {"loss": "var"}, {"normalization": "none", "kd_weight": 0.0}, {"output": "block", "kd_weight": 0.25},
])  # fmt: skip
def test_the_loss_is_the_formula_of_its_docstring(tiny_model, family, changes):
    """In float64, on token ids instead of embeddings, from residual streams and plain logits."""
    model, training = make(family, tiny_model), replace(SHORT, epochs=0, **changes)

    def spread(x: Tensor) -> float:
        return float(x.square().mean() if training.loss == "l2" else x.var(correction=0))

    def layers(ids: Tensor, skipped: int) -> list[float]:
        return [spread(x) for x in outputs_by_subtraction(model, ids, skipped, training.output == "block")]

    lead = torch.tensor(DISCRETE)
    baseline = torch.tensor([layers(ids, 0) for ids in TEXTS]).mean(dim=0)
    ratios, divergences = [], []
    for ids in HELD_OUT:
        now = torch.tensor(layers(torch.cat([lead, ids]), len(lead)))
        ratios.append(float((now / baseline if training.normalization == "baseline" else now).mean()))
        ours = plain_logits(model, torch.cat([lead, ids]))[len(lead) :].double().log_softmax(dim=-1)
        truth = plain_logits(model, torch.cat([torch.tensor([BOS]), ids]))[1:].double().log_softmax(dim=-1)
        divergences.append(float((truth.exp() * (truth - ours)).sum(dim=-1).mean()))
    found = trained(model, training).discrete
    assert found.outputs == pytest.approx(sum(ratios) / 3, rel=1e-4)
    if training.kd_weight:
        assert found.divergence == pytest.approx(sum(divergences) / 3, rel=1e-4)
    assert found.loss == pytest.approx(found.outputs + training.kd_weight * found.divergence, rel=1e-6)


# The training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_held_out_loss_and_exports_as_many_positions_as_were_trained(tiny_model, family):
    model = make(family, tiny_model)
    outcome = trained(model)
    held_out = [row["held_out"] for row in outcome.history if "held_out" in row]
    assert [row["step"] for row in outcome.history if "held_out" in row] == [0, 2, 4, 6, 8]  # 6 texts, 4 a step
    assert min(held_out) < held_out[0]
    assert outcome.kept.loss == pytest.approx(min(held_out), rel=1e-5)
    assert outcome.kept.loss < outcome.discrete.loss
    assert outcome.best_step == max(row["step"] for row in outcome.history if row.get("held_out") == min(held_out))
    prefix = outcome.prefix
    assert len(prefix) == 4
    assert prefix.ids.tolist() == [20, 33, 20, BOS]
    assert {k.shape[2] for k in (*prefix.keys, *prefix.values)} == {4}


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "opt"])
def test_what_is_written_is_what_the_model_makes_of_the_trained_embeddings(tiny_model, family):
    model = make(family, tiny_model)
    outcome, text = trained(model), random_ids(20, 7)
    embedded = model.get_input_embeddings()(text)
    with torch.no_grad():
        whole = model(inputs_embeds=torch.cat([outcome.embeddings, embedded])[None], use_cache=False).logits[0]
    assert_close(outcome.prefix.logits, whole[:4], rtol=1e-4, atol=1e-4)
    assert_close(attach(model, outcome.prefix).feed(text[None]).logits[0], whole[4:], rtol=1e-4, atol=1e-4)
    assert not same_prefix(outcome.prefix, build_prefix(model, outcome.prefix.ids))


def test_only_the_prefix_gets_a_gradient_even_where_weights_ask_for_one(tiny_model):
    model = tiny_model("llama").requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows: list[dict[str, float]] = []
    outcome = trained(model, report=rows.append)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(row["gradient"] > 0 for row in rows[1:])
    assert rows == outcome.history
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("length", [2, 3, 8])
def test_with_no_epochs_it_is_the_discrete_prefix(tiny_model, length):
    model = tiny_model("llama")
    outcome = trained(model, replace(SHORT, epochs=0, length=length))
    assert same_prefix(outcome.prefix, build_prefix(model, DISCRETE))
    assert (outcome.best_step, outcome.history, outcome.kept) == (None, [], outcome.discrete)


def test_it_is_never_worse_than_the_discrete_prefix(tiny_model):
    model = tiny_model("llama")
    outcome = trained(model, replace(SHORT, length=3, learning_rate=1e3))
    assert min(row["held_out"] for row in outcome.history[1:] if "held_out" in row) > outcome.discrete.loss
    assert outcome.best_step is None
    assert same_prefix(outcome.prefix, build_prefix(model, DISCRETE))
    assert outcome.kept == outcome.discrete


def test_the_rate_falls_as_a_cosine_to_a_tenth():
    schedule = Schedule(10, every(10, 10), last_rate=LAST_RATE)
    rates = [2.0 * schedule.share(step) for step in range(11)]
    assert rates[0] == 2.0
    assert rates[5] == pytest.approx(1.1)
    assert rates[10] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("step", [2, 4])
def test_a_killed_run_ends_with_the_same_bits(tiny_model, tmp_path, step):
    model, state = tiny_model("llama"), tmp_path / "state.safetensors"
    whole = trained(model)

    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == step + 1:
            raise Killed

    with pytest.raises(Killed):
        trained(model, state=state, report=kill)
    resumed: list[dict[str, float]] = []
    again = trained(model, state=state, report=resumed.append)
    assert [int(row["step"]) for row in resumed] == list(range(step + 1, 9))
    assert same_prefix(again.prefix, whole.prefix)
    assert torch.equal(again.embeddings, whole.embeddings)
    assert [row["loss"] for row in again.history[1:]] == [row["loss"] for row in whole.history[1:]]
    with pytest.raises(UserError, match="belongs to a run with other texts"):
        trained(model, replace(SHORT, loss="var"), state=state)


def test_a_trained_prefix_belongs_to_every_quantized_form_of_the_model(tiny_model, tmp_path):
    model = tiny_model("llama")
    replace(trained(model).prefix, calibrated={"epochs": 3}).save(tmp_path / "p.safetensors")
    prefix = Prefix.load(tmp_path / "p.safetensors")
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.copy_(fake_quantize(weight, UniformGrid(4, 16)))
    assert attach(model, prefix).score(random_ids(10)[None]).isfinite().all()
    with pytest.raises(UserError, match="another model"):
        prefix.check(tiny_model("llama", seed=1))


def test_what_cannot_be_trained_is_refused(tiny_model, tmp_path):
    model = tiny_model("llama")
    with pytest.raises(UserError, match="prefix training length is 0; give 1"):
        PrefixTraining(length=0)
    with pytest.raises(UserError, match="learning_rate is 0"):
        PrefixTraining(learning_rate=0)
    with pytest.raises(UserError, match="'l3' is not known; choose l2 or var"):
        PrefixTraining(loss="l3")
    with pytest.raises(UserError, match="0 held out"):
        train_prefix(model, DISCRETE, BOS, TEXTS, HELD_OUT[:0], SHORT)
    with pytest.raises(UserError, match="training mode"):
        trained(tiny_model("llama").train())
    with pytest.raises(UserError, match="does not fit the model's sliding window of 4"):
        trained(tiny_model("mistral", sliding_window=4))
    model.lm_head.weight[50] = float("nan")
    with pytest.raises(UserError, match="logits that are not finite"):
        trained(model)


def test_held_out_pieces_overlap_no_piece_that_is_trained_on():
    text = torch.arange(1000)
    texts = torch.stack([text[0:100], text[300:400]])
    candidates = torch.stack([text[at : at + 100] for at in (60, 120, 340, 500, 210)])
    assert held_out_pieces(texts, candidates, 2)[:, 0].tolist() == [120, 500]
    assert held_out_pieces(texts, candidates[:1] + 9, 1)[0, 0] == 69  # 31 tokens that are the same are no overlap
    with pytest.raises(UserError, match="only 3 of 5 more pieces overlap none of the 2"):
        held_out_pieces(texts, candidates, 4)


# The program ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(intactkv_root, tiny_checkpoint) -> tuple[Path, Path]:
    """A tiny model and a text."""
    text = intactkv_root / "text.txt"
    text.write_text("\n".join(f"Line {i} of {i * i % 97} says that {i * 7 % 31} is {i % 13}." for i in range(400)))
    return tiny_checkpoint(intactkv_root / "modelzoo", "llama"), text


def arguments(checkpoint: tuple[Path, Path], out: Path) -> tuple[str, ...]:
    model, text = map(str, checkpoint)
    return ("train-prefix", "--model", model, "--corpus", text, "--samples", "6", "--held-out", "3", "--length", "40",
            "--prefix-len", "3", "--prefix-epochs", "4", "--prefix-lr", "0.02", "--prefix", f"auto:{text}",
            "--out", str(out))  # fmt: skip


@pytest.fixture
def program(run_main):
    def call(package: str, *arguments: object) -> tuple[int, str, str]:
        return run_main(import_module(f"{package}.__main__").main, *arguments)

    return call


def test_the_program_writes_a_prefix_that_every_recipe_takes(program, checkpoint, intactkv_root):
    out = intactkv_root / "trained.safetensors"
    code, said, errors = program("intactkv", *arguments(checkpoint, out))
    assert code == 0, errors
    prefix, (model, text) = Prefix.load(out), checkpoint
    assert prefix.calibrated is not None
    assert prefix.calibrated["embeddings"]["epochs"] == 4
    assert prefix.calibrated["for"]["prefix"]["label"] == "[A]"
    figures = prefix.calibrated["held_out"]
    assert figures["kept"]["loss"] <= figures["discrete"]["loss"]
    assert f"{figures['kept']['loss']:.4f}" in said
    assert load_file(out.with_suffix(".embeddings.safetensors"))["embeddings"].shape == (len(prefix), 64)
    rows = [json.loads(line) for line in out.with_suffix(".curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(7))  # 4 epochs of 6 pieces, 4 a step
    assert not out.with_suffix(".state.safetensors").exists()
    for recipe in (("--recipe", "rtn-w3", "--group-size", "32"), ("--recipe", "kv4")):
        call = ("ppl", "--model", model, "--corpus", text, "--window", 64, "--limit", 2, *recipe, "--json")
        code, said, errors = program("eval", *call, "--prefix", out)
        assert code == 0, errors
        record = json.loads(said)["settings"]["prefix"]
        assert (record["label"], record["ids"], record["intact"]) == ("[trained]", prefix.ids.tolist(), True)
    drawn = intactkv_root / "drawn.png"
    curve = out.with_suffix(".curve.jsonl")
    assert program("eval", "plot", "calibration", "--curves", curve, "--out", drawn)[0] == 0


def test_a_killed_program_goes_on_and_ends_with_the_same_bits(program, checkpoint, intactkv_root):
    """A real SIGKILL, once the first state is on disk."""
    environment = os.environ | {"INTACTKV_ROOT": str(intactkv_root), "OMP_NUM_THREADS": "1"}
    whole, killed = intactkv_root / "whole.safetensors", intactkv_root / "killed.safetensors"
    assert program("intactkv", *arguments(checkpoint, whole))[0] == 0
    kill_training(*arguments(checkpoint, killed))
    assert not killed.exists()
    command = [sys.executable, "-m", "intactkv", *arguments(checkpoint, killed)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert "going on from step" in done.stderr
    assert same_prefix(Prefix.load(whole), Prefix.load(killed))


@pytest.mark.parametrize(("changes", "named"), [
    (("--out", "trained.pt"), "a prefix file ends in .safetensors"),
    (("--prefix", "none"), "a trained prefix starts from a discrete one"),
    (("--prefix-len", "0"), "--prefix-len: 0 is not allowed"),
    (("--prefix-lr", "-1"), "--prefix-lr: -1 is not allowed; give a number above 0"),
    (("--samples", "0"), "--samples: 0 is not allowed"),
    (("--held-out", "0"), "--held-out: 0 is"),
    (("--length", "300"), "--length 300: 303 tokens with what stands in front do not fit"),
    (("--samples", "3000"), "give a longer text"),
    (("--corpus", "pile"), "calibration text of pile is missing"),
])  # fmt: skip
def test_a_mistake_is_one_line(program, checkpoint, intactkv_root, changes, named):
    out = intactkv_root / "trained.safetensors"
    code, said, errors = program("intactkv", *arguments(checkpoint, out), "--prefix", "bos", *changes)
    assert (code, said) == (2, "")
    assert named in errors.splitlines()[-1]
    assert not out.exists()
