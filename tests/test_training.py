"""The training loop of block-wise methods: best state, schedule, what happens to numbers that are none."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from corpora.errors import UserError
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
