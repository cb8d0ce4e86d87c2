"""The training loop of block-wise methods: best state, schedule, what happens to numbers that are none."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from corpora.errors import UserError
from quantization.tuning.training import Schedule, split_samples, train

TARGETS = torch.tensor([1.0, 2.0, 3.0, 4.0])


def squared(x: Tensor) -> Callable[[int], Tensor]:
    return lambda i: (x - TARGETS[i]).square().sum()


def test_the_loss_falls_and_the_best_held_out_state_is_restored() -> None:
    x = torch.zeros(1)
    outcome = train([([x], 0.1)], squared(x), range(4), range(3, 4), Schedule(200, batch=1, clip=None), "x")
    assert outcome.before == 16.0
    assert outcome.after == min(value for _, value in outcome.curve) < 16.0
    assert float((x - 4).square()) == pytest.approx(outcome.after)
    assert not x.requires_grad
    assert x.grad is None


def test_a_start_that_nothing_beats_is_kept() -> None:
    x = torch.full((1,), 4.0)  # the held-out optimum; the training samples pull it away
    outcome = train([([x], 0.1)], squared(x), range(1), range(3, 4), Schedule(20, batch=1), "x")
    assert (outcome.best_step, outcome.after, float(x)) == (0, 0.0, 4.0)


def test_it_is_adamw_on_the_mean_of_a_batch_with_a_cosine() -> None:
    x, y = torch.zeros(1), torch.zeros(1, requires_grad=True)
    schedule = Schedule(7, batch=2, final=10, clip=0.5, evaluations=7)
    train([([x], 0.3)], squared(x), range(3), range(1), schedule, "x")
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

    train([([x], 0.1), ([y], 0.01)], loss, range(1), range(1), Schedule(1, batch=1), "x")
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
        train([([x], 0.01)], loss, range(1), range(1), Schedule(50, batch=1, evaluations=50), "block 3")
    assert 0 < float(x) < 0.06
    with pytest.raises(UserError, match="block 3 on held-out text"):
        train([([x], 0.01)], loss, range(1), range(1), Schedule(1), "block 3")


def test_the_last_samples_are_held_out() -> None:
    assert split_samples(16, 4, "x") == (range(12), range(12, 16))
    for held_out in (0, 16, 17):
        with pytest.raises(UserError, match="nothing to learn from"):
            split_samples(16, held_out, "x")


def test_matrices_decay_and_vectors_do_not() -> None:
    matrix, vector = torch.ones(1, 1), torch.ones(1)

    def loss(i: int) -> Tensor:  # no gradient, and lower for smaller matrices, so that the last state is kept
        return (matrix.detach() + 0 * matrix + 0 * vector).sum()

    train([([matrix, vector], 0.1)], loss, range(1), range(1), Schedule(3, batch=1, weight_decay=0.5), "x")
    assert float(matrix) == pytest.approx((1 - 0.1 * 0.5) ** 3)
    assert float(vector) == 1.0
