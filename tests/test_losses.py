import math
from typing import ClassVar

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


class TestSampling:
    TASKS: ClassVar = {
        "click": TaskConfig(label="click", negatives_kept=0.2),
        "like": TaskConfig(label="like", positive_weight=3.0),
    }

    def test_leaves_out_negatives_at_their_rate_and_no_positives(self) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = (torch.rand(20_000, 2, generator=generator) > 0.5).float()
        draws = torch.randint(-(2**62), 2**62, (20_000, 2), generator=generator)
        weights = MultitaskLoss(self.TASKS).sampled(labels, torch.full((20_000, 2), 0.5), draws)
        assert (weights[labels[:, 0] == 1] == 0.5).all() and (weights[:, 1] == 0.5).all()
        kept = weights[labels[:, 0] == 0, 0] > 0
        assert kept.float().mean().item() == pytest.approx(0.2, abs=0.01)
        parts = [
            MultitaskLoss(self.TASKS).sampled(labels[p], weights[p], draws[p]) for p in (slice(0, 7), slice(7, 99))
        ]
        assert torch.equal(torch.cat(parts), weights[:99])

    def test_positives_weigh_more_in_the_numerator(self) -> None:
        logits, labels = torch.randn(30, 2), (torch.rand(30, 2) > 0.5).float()
        losses = MultitaskLoss(self.TASKS)(logits, labels, torch.ones(30, 2), torch.full((2,), 30.0))
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        expected = bce(logits[:, 1], labels[:, 1], pos_weight=torch.tensor(3.0))
        assert losses.by_task.tolist() == pytest.approx(
            [bce(logits[:, 0], labels[:, 0]).item(), expected.item()], rel=1e-5
        )

    def test_what_they_train_is_corrected_back_to_the_log_s_rate(self) -> None:
        """One logit for all rows, fitted: it ends at the odds that the correction takes back to the true rate."""
        tasks = {"click": TaskConfig(label="click", negatives_kept=0.2, positive_weight=3.0)}
        loss, generator = MultitaskLoss(tasks), torch.Generator().manual_seed(1)
        labels = (torch.rand(20_000, 1, generator=generator) < 0.1).float()
        draws = torch.randint(-(2**62), 2**62, (20_000, 2), generator=generator)
        weights = loss.sampled(labels, torch.ones_like(labels), draws)
        logit = torch.zeros(1, requires_grad=True)
        for _ in range(60):
            total = loss(logit.expand(len(labels), 1), labels, weights, weights.sum(0)).total
            (gradient,) = torch.autograd.grad(total, logit)
            logit = (logit - 3 * gradient).detach().requires_grad_()
        served = torch.sigmoid(logit + tasks["click"].correction)
        assert served.item() == pytest.approx(labels.mean().item(), rel=0.04)
