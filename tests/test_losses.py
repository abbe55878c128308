import math

import numpy as np
import pytest
import torch

from rec.losses import MultitaskLoss
from rec.schema import TaskConfig, TaskKind

TASKS = {
    "click": TaskConfig(label="click"),
    "purchase": TaskConfig(label="purchase", condition="click", loss_weight=0.5),
    "dwell": TaskConfig(label="dwell", kind=TaskKind.regression, loss_weight=2.0),
}


def batch(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 3, generator=generator, requires_grad=True)
    labels = (torch.rand(rows, 3, generator=generator) > 0.5).float()
    weights = torch.rand(rows, 3, generator=generator) * (torch.rand(rows, 3, generator=generator) > 0.3)
    return logits, labels, weights


def by_hand(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> list[float]:
    """Weighted means, one row after another."""
    means = []
    for t in range(3):
        total = 0.0
        for z, y, w in zip(logits[:, t], labels[:, t], weights[:, t], strict=True):
            p = 1 / (1 + math.exp(-z))
            total += w * ((z - y) ** 2 if t == 2 else -(y * math.log(p) + (1 - y) * math.log(1 - p)))
        means.append(total / weights[:, t].sum())
    return means


def test_is_the_weighted_mean_of_each_task() -> None:
    logits, labels, weights = batch(20)
    losses = MultitaskLoss(TASKS)(logits, labels, weights, weights.sum(0))
    expected = by_hand(logits.detach().double().numpy(), labels.numpy(), weights.double().numpy())
    assert losses.by_task.tolist() == pytest.approx(expected, rel=1e-5)
    assert losses.total.item() == pytest.approx(expected[0] + 0.5 * expected[1] + 2 * expected[2], rel=1e-5)


def test_shares_of_uneven_ranks_add_up_to_the_global_mean_and_its_gradient() -> None:
    logits, labels, weights = batch(20)
    loss = MultitaskLoss(TASKS)
    whole = loss(logits, labels, weights, weights.sum(0))
    (gradient,) = torch.autograd.grad(whole.total, logits)
    parts = [slice(0, 3), slice(3, 18), slice(18, 20)]
    shares = [loss(logits[p], labels[p], weights[p], weights.sum(0)) for p in parts]
    assert sum(share.total for share in shares).item() == pytest.approx(whole.total.item(), rel=1e-5)
    (summed,) = torch.autograd.grad(sum(share.total for share in shares), logits)
    torch.testing.assert_close(summed, gradient)


def test_an_all_masked_step_is_zero_with_zero_gradients() -> None:
    logits, labels, _ = batch(4)
    losses = MultitaskLoss(TASKS)(logits, labels, torch.zeros(4, 3), torch.zeros(3))
    losses.total.backward()
    assert losses.total.item() == 0 and losses.by_task.tolist() == [0, 0, 0]
    assert logits.grad is not None and logits.grad.abs().sum().item() == 0


def test_a_task_without_positives_and_a_batch_of_one_are_finite() -> None:
    losses = MultitaskLoss(TASKS)(
        torch.tensor([[40.0, -40.0, 1e4]]), torch.zeros(1, 3), torch.ones(1, 3), torch.ones(3)
    )
    assert losses.by_task.tolist() == pytest.approx([40.0, 0.0, 1e8])


def test_masked_rows_weigh_nothing_whatever_they_hold() -> None:
    logits, labels, weights = batch(6)
    garbage = labels.clone()
    garbage[weights == 0] = 1e30
    loss = MultitaskLoss(TASKS)
    assert (
        loss(logits, garbage, weights, weights.sum(0)).total.item()
        == loss(logits, labels, weights, weights.sum(0)).total.item()
    )
