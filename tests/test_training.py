"""The training loop of block-wise methods: best state, schedule, what happens to numbers that are none."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from corpora.conversations import conversations
from corpora.errors import UserError
from intactkv.calibrate import Training
from intactkv.trainable import PrefixTraining
from intactkv.training import (
    Descent,
    Group,
    Schedule,
    every,
    in_order,
    matrices_decay,
    mean_loss,
    split_samples,
    spread,
    train,
)
from quantization.programs.train import held_out_pieces

TARGETS = torch.tensor([1.0, 2.0, 3.0, 4.0])


def squared(x: Tensor) -> Callable[[int], Tensor]:
    return lambda i: (x - TARGETS[i]).square().sum()


def trained(
    groups: list[Group],
    loss: Callable[[int], Tensor],
    training: range,
    held_out: range,
    schedule: Schedule,
    batch: int = 1,
) -> Descent:
    return train(groups, schedule, in_order(loss, training, batch), lambda: mean_loss(loss, held_out), "block 3")


def test_the_loss_falls_and_the_best_held_out_state_is_restored() -> None:
    x = torch.zeros(1)
    descent = trained([Group([x], 0.1)], squared(x), range(4), range(3, 4), Schedule(200, spread(10, 200)))
    assert descent.held_out[0] == 16.0
    assert len(descent.held_out) == 11
    assert float((x - 4).square()) == pytest.approx(min(descent.held_out))
    assert min(descent.held_out) < 16.0
    assert not x.requires_grad
    assert x.grad is None


def test_a_start_that_nothing_beats_is_kept() -> None:
    x = torch.full((1,), 4.0)  # the held-out optimum; the training samples pull it away
    descent = trained([Group([x], 0.1)], squared(x), range(1), range(3, 4), Schedule(20, spread(10, 20)))
    assert (descent.best_step, min(descent.held_out), float(x)) == (0, 0.0, 4.0)


def test_it_is_adamw_on_the_mean_of_a_batch_with_a_cosine() -> None:
    x, y = torch.zeros(1), torch.zeros(1, requires_grad=True)
    schedule = Schedule(7, every(1, 7), last_rate=0.1, clip=0.5)
    trained([Group([x], 0.3)], squared(x), range(3), range(1), schedule, batch=2)
    optimizer = torch.optim.AdamW([y], lr=0.3, weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7, eta_min=0.03)
    states = [0.0]
    for step in range(7):
        optimizer.zero_grad()
        torch.stack([(y - TARGETS[(2 * step + i) % 3]).square().sum() for i in range(2)]).mean().backward()
        torch.nn.utils.clip_grad_norm_([y], 0.5)
        optimizer.step()
        cosine.step()
        states.append(float(y))
    best = min(states, key=lambda value: (value - 1) ** 2)
    assert float(x) == pytest.approx(best, rel=1e-5)


def test_groups_have_their_own_rates() -> None:
    x, y = torch.zeros(1), torch.zeros(1)

    def loss(i: int) -> Tensor:
        return (x - 1).square().sum() + (y - 1).square().sum()

    trained([Group([x], 0.1), Group([y], 0.01)], loss, range(1), range(1), Schedule(1, every(1, 1)))
    assert float(x) == pytest.approx(0.1, rel=1e-4)
    assert float(y) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_in_one_line_and_the_best_state(bad: float) -> None:
    x = torch.zeros(1)
    seen: list[int] = []

    def loss(i: int) -> Tensor:
        seen.append(i)
        return (x - 1).square().sum() * (bad if len(seen) > 9 else 1.0)

    with pytest.raises(UserError, match="smaller learning rate"):
        trained([Group([x], 0.01)], loss, range(1), range(1), Schedule(50, every(1, 50)))
    assert 0 < float(x) < 0.06
    with pytest.raises(UserError, match="the loss of block 3 is"):
        trained([Group([x], 0.01)], loss, range(1), range(1), Schedule(1, every(1, 1)))


def test_the_last_samples_are_held_out() -> None:
    assert split_samples(16, 4, "x") == (range(12), range(12, 16))
    for held_out in (0, 16, 17):
        with pytest.raises(UserError, match="nothing to learn from"):
            split_samples(16, held_out, "x")


def test_matrices_decay_and_vectors_do_not() -> None:
    matrix, vector = torch.ones(1, 1), torch.ones(1)

    def loss(i: int) -> Tensor:  # no gradient, and lower for smaller matrices, so that the last state is kept
        return (matrix.detach() + 0 * matrix + 0 * vector).sum()

    trained(matrices_decay([matrix, vector], 0.1, 0.5), loss, range(1), range(1), Schedule(3, every(1, 3)))
    assert float(matrix) == pytest.approx((1 - 0.1 * 0.5) ** 3)
    assert float(vector) == 1.0


# The state of a killed run --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an error: the process is gone."""


def descended(state: Path, steps_to_take: int | None = None) -> Tensor:
    """Nine steps of two tensors, with a state behind every third; or so many steps, and then the kill."""
    x, y = torch.zeros(3), torch.zeros(2, 2)
    descent = Descent([Group([x, y], 0.1)], Schedule(9, every(3, 9)), "the prefix", made_of="this")

    def losses(step: int) -> Iterator[Tensor]:
        if step == steps_to_take:
            raise Killed
        yield ((x - 1).square().sum() + (y + step).square().sum()) / 2

    descent.run(losses, lambda: float((x - 0.4).square().sum()), state=state)
    return torch.cat([x, y.flatten(), descent.best[0], torch.tensor(descent.held_out)])


def killed(state: Path) -> dict[str, str]:
    """Leave a state of step 6; returns its metadata."""
    state.unlink(missing_ok=True)
    with pytest.raises(Killed):
        descended(state, 7)
    with safe_open(state, framework="pt") as file:
        return dict(file.metadata())


STATES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    "a sign": lambda _, tensors: tensors["0.now"].neg_(),
    "a moment": lambda _, tensors: tensors["1.first"].mul_(2),
    "two tensors exchanged": lambda _, t: t.update({"0.now": t["0.best"], "0.best": t["0.now"]}),
    "the step": lambda header, _: header.update(step=3),
    "a loss": lambda header, _: header["history"][0].update(held_out=0.0),
}
FORMS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = {
    "no step": (lambda h, _: h.pop("step"), "it has no 'step'"),
    "a step of another schedule": (lambda h, _: h.update(step=5), "does not fit the 2 tensors and 9 steps"),
    "a step behind the end": (lambda h, _: h.update(step=12), "does not fit"),
    "a negative step": (lambda h, _: h.update(step=-3), "its 'step' -3 is not"),
    "a word": (lambda h, _: h.update(step="6"), "its 'step' '6' is not"),
    "a best step without a loss": (lambda h, _: h.update(best_step=1), "does not fit"),
    "a row less": (lambda h, _: h["history"].pop(2), "does not fit"),
    "no history": (lambda h, _: h.update(history=[]), "does not fit"),
    "rows of words": (lambda h, _: h["history"][1].update(loss="x"), "'history.1.loss' 'x' is not"),
    "a tensor less": (lambda _, t: t.pop("1.best"), "does not fit"),
    "a tensor more": (lambda _, t: t.update({"2.now": torch.ones(1)}), "does not fit"),
    "another shape": (lambda _, t: t.update({"0.now": torch.ones(4)}), "does not fit"),
    "a scalar for all": (lambda _, t: t.update({"0.now": torch.ones(1)}), "does not fit"),
    "another dtype": (lambda _, t: t.update({"0.now": t["0.now"].half()}), "does not fit"),
    "not finite": (lambda _, t: t["1.second"].fill_(torch.inf), "'1.second' holds values that are not finite"),
    "another run": (lambda h, _: h.update(made_of="that"), "belongs to a run with other texts"),
}


def damaged(state: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object], *, summed: bool) -> None:
    metadata = killed(state)
    header, tensors = json.loads(metadata["run"]), load_file(state)
    if not summed:  # as runs of before left it
        del header["sha256"]
    change(header, tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, state, {"run": json.dumps(header)})


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = descended(tmp_path / "whole.safetensors")
    for summed in (True, False):
        damaged(tmp_path / "state.safetensors", lambda _header, _tensors: None, summed=summed)
        assert torch.equal(descended(tmp_path / "state.safetensors"), whole)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"whole.safetensors", "state.safetensors"}


@pytest.mark.parametrize("what", STATES)
def test_a_state_that_changed_between_kill_and_resume_is_refused(what: str, tmp_path: Path) -> None:
    damaged(state := tmp_path / "state.safetensors", STATES[what], summed=True)
    with pytest.raises(UserError, match=r"has changed since it was written.*delete it to train from the start"):
        descended(state)


@pytest.mark.parametrize("what", FORMS)
def test_a_state_that_no_run_wrote_is_refused(what: str, tmp_path: Path) -> None:
    change, words = FORMS[what]
    damaged(state := tmp_path / "state.safetensors", change, summed=False)
    with pytest.raises(UserError, match=f"{words}.*delete it to train from the start"):
        descended(state)


# What no training is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Training, PrefixTraining])
def test_numbers_that_no_training_has_are_refused_where_they_are_given(kind: type) -> None:
    kind(seed=-1, batch=1)
    bad: list[tuple[str, Any]] = [
        ("batch", 0), ("batch", -3), ("batch", 10**22), ("seed", 10**22), ("seed", -(10**22)), ("learning_rate", 0.0),
        ("learning_rate", -1.0), ("learning_rate", math.nan), ("learning_rate", math.inf),
    ]  # fmt: skip
    bad += [("steps", 0), ("steps", 10**22), ("evaluate_every", -1)] if kind is Training else [
        ("length", 0), ("epochs", -1), ("epochs", 10**22), ("kd_weight", math.inf), ("kd_weight", -1.0)
    ]  # fmt: skip
    for name, value in bad:
        with pytest.raises(UserError, match=rf"training {name} is .*; give"):
            kind(**{name: value})


def test_negative_counts_of_samples_are_refused_by_the_library() -> None:
    for count, held_out in ((-4, 1), (4, -1), (-4, -5)):
        with pytest.raises(UserError, match="nothing to learn from"):
            split_samples(count, held_out, "x")
    counts = {"max_length": 9, "min_assistant": 1, "seed": 1}
    with pytest.raises(UserError, match="conversations: samples is -3; give 0 or more"):
        conversations(None, "sample", samples=-3, held_out=1, **counts)
    with pytest.raises(UserError, match="conversations: held_out is -1"):
        conversations(None, "sharegpt", samples=3, held_out=-1, **counts)
    pieces = torch.arange(20).view(2, 10)
    for count in (0, -1):
        with pytest.raises(UserError, match=f"{count} pieces to hold out; give 1 or more"):
            held_out_pieces(pieces, pieces + 100, count)
