import math
from typing import ClassVar

import numpy as np
import pytest
import torch

from rec.funnel import Funnel, tower_of
from rec.losses import MultitaskLoss
from rec.schema import Debias, Scale, TaskConfig, TaskKind

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


# --- teachers, orders, debiased steps: against loops over rows ---

KINDS = {
    "click": TaskConfig(label="click"),
    "buy_ips": TaskConfig(label="buy", condition="click", debias=Debias.ips, loss_weight=0.7, propensity_floor=0.3),
    "buy_dr": TaskConfig(label="buy", condition="click", debias=Debias.dr, debias_weight=0.5, propensity_floor=0.3),
    "pay_ips": TaskConfig(label="pay", product="click", debias=Debias.ips, debias_weight=0.4, at_most="buy_ips"),
    "pay_dr": TaskConfig(label="pay", product="click", debias=Debias.dr, debias_weight=2.0, loss_weight=0.3),
    "cart": TaskConfig(label="cart", product="click"),
    "order": TaskConfig(label="pay", product="click", via="cart", at_most="cart", at_most_of=Scale.log),
    "teacher": TaskConfig(label="p", teacher=True, align=0.8, at_most="click", at_most_of=Scale.log, loss_weight=3.0),
    "sampled": TaskConfig(label="like", negatives_kept=0.2, positive_weight=3.0, at_most="teacher", at_most_weight=2.0),
    "dwell": TaskConfig(label="dwell", kind=TaskKind.regression),
}
NAMES = list(KINDS)
STEPS = {"buy_ips": None, "buy_dr": 11, "pay_ips": None, "pay_dr": 12}  # task -> its imputation tower
EXACT = {"rel": 2e-5, "abs": 1e-7}


def rows_of(rows: int = 40, *, scale: float = 1.5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Towers' logits, labels and weights as the encoder makes them: a step has weight in clicked rows, some masked besides."""
    rng = np.random.default_rng(seed)
    towers = rng.normal(size=(rows, len(tower_of(KINDS)))) * scale
    labels = rng.integers(0, 2, (rows, len(KINDS))).astype(float)
    weights = rng.random((rows, len(KINDS))) * (rng.random((rows, len(KINDS))) > 0.25)
    click = labels[:, 0]
    labels[:, NAMES.index("teacher")] = rng.choice([0, 1, 1e-20, 0.5, 0.07], rows)
    for name, task in KINDS.items():
        if task.product:
            labels[:, NAMES.index(name)] *= click
        if task.condition:
            weights[:, NAMES.index(name)] *= click
    parts = {"towers": towers, "labels": labels, "weights": weights}
    return {name: torch.from_numpy(x).float() for name, x in parts.items()}


def losses_of(rows: dict[str, torch.Tensor], part: slice = slice(None), tasks: dict[str, TaskConfig] = KINDS):
    """The losses of some of the rows, and the towers' logits, of which they can be differentiated."""
    towers = rows["towers"][part].clone().requires_grad_()
    logits = Funnel(tasks).train()(towers)
    found = MultitaskLoss(tasks)(
        logits, rows["labels"][part], rows["weights"][part], rows["weights"].sum(0), towers=towers
    )
    return found, towers


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def entropy(y: float, p: float) -> float:
    """Cross-entropy of p to y."""
    return -sum(a * math.log(b) for a, b in ((y, p), (1 - y, 1 - p)) if a > 0)


def row_loss(task: TaskConfig, z: float, p: dict[str, float], name: str, y: float) -> float:
    if task.kind is TaskKind.regression:
        return (z - y) ** 2
    odds = p[name] / (1 - p[name]) * (task.positive_weight / task.negatives_kept)  # p is of the log's odds
    loss = entropy(y, odds / (1 + odds)) * (task.positive_weight if y == 1 else 1)
    if task.teacher:
        loss -= entropy(y, y)
        loss += task.align * abs(math.log(p[name]) - math.log(max(y, 1e-12))) if y > 0 else 0
    if task.at_most:
        above = math.log(p[name] / p[task.at_most]) if task.at_most_of is Scale.log else p[name] - p[task.at_most]
        loss += task.at_most_weight * max(0.0, above)
    return loss


def step_risk(task: TaskConfig, name: str, z: list[float], y: float, o: float) -> float:
    e, r = entropy(y, sigmoid(z[NAMES.index(name)])), max(task.propensity_floor, sigmoid(z[0]))
    if task.debias is Debias.ips:
        return o * e / r
    imputed = math.log1p(math.exp(z[STEPS[name]]))
    return imputed + o * (e - imputed) / r + o * (e - imputed) ** 2 / r


def loop_losses(towers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> list[float]:
    sums, steps = dict.fromkeys(NAMES, 0.0), dict.fromkeys(STEPS, 0.0)
    for z, labels_, weights_ in zip(towers.tolist(), labels.tolist(), weights.tolist(), strict=True):
        y, w = dict(zip(NAMES, labels_, strict=True)), dict(zip(NAMES, weights_, strict=True))
        p = {name: sigmoid(z[t] + KINDS[name].correction) for t, name in enumerate(NAMES)}
        p |= {name: p[name] * p["click"] for name in ("pay_ips", "pay_dr", "cart")}
        with_cart, without = sigmoid(z[NAMES.index("order")]), sigmoid(z[10])
        cart = sigmoid(z[NAMES.index("cart")])
        p["order"] = p["click"] * (cart * with_cart + (1 - cart) * without)
        for t, (name, task) in enumerate(KINDS.items()):
            if w[name] > 0:
                sums[name] += w[name] * row_loss(task, z[t], p, name, y[name])
            if name in STEPS and w["click"] > 0 and not (y["click"] == 1 and w[name] == 0):
                steps[name] += w["click"] * step_risk(task, name, z, y[name], y["click"])
    total = dict(zip(NAMES, weights.sum(0), strict=True))
    means = {name: sums[name] / total[name] for name in NAMES}
    for name, risk in steps.items():
        own = 0.0 if KINDS[name].condition else means[name]
        means[name] = own + KINDS[name].debias_weight * risk / total["click"]
    return list(means.values())


class TestTerms:
    def test_equal_loops_over_rows(self) -> None:
        rows = rows_of()
        losses, _ = losses_of(rows)
        expected = loop_losses(*(x.double().numpy() for x in rows.values()))
        assert losses.by_task.tolist() == pytest.approx(expected, **EXACT)
        loss_weights = [task.loss_weight for task in KINDS.values()]
        assert losses.weighted.tolist() == pytest.approx(np.multiply(loss_weights, expected).tolist(), **EXACT)
        assert losses.total.item() == pytest.approx(np.dot(loss_weights, expected), rel=2e-5)

    def test_uneven_shares_add_up_to_the_whole_and_its_gradient(self) -> None:
        rows = rows_of()
        whole, towers = losses_of(rows)
        (gradient,) = torch.autograd.grad(whole.total, towers)
        shares, parts = zip(*(losses_of(rows, part) for part in (slice(0, 3), slice(3, 40))), strict=True)
        torch.testing.assert_close(sum(share.by_task for share in shares), whole.by_task)
        gradients = [torch.autograd.grad(s.total, z)[0] for s, z in zip(shares, parts, strict=True)]
        torch.testing.assert_close(torch.cat(gradients), gradient)

    def test_rows_of_weight_0_have_no_gradient_and_no_say(self) -> None:
        rows = rows_of()
        rows["weights"][::3] = 0
        losses, towers = losses_of(rows)
        (gradient,) = torch.autograd.grad(losses.total, towers)
        assert (gradient[::3] == 0).all() and (gradient[1::3] != 0).any(dim=1).all()
        garbage = {name: x.clone() for name, x in rows.items()}
        garbage["labels"][::3], garbage["towers"][::3] = math.nan, 1e4
        again, towers = losses_of(garbage)
        assert torch.equal(again.by_task, losses.by_task)
        assert torch.equal(torch.autograd.grad(again.total, towers)[0], gradient)

    def test_no_rows_at_all(self) -> None:
        rows = rows_of()
        rows["weights"][:] = 0
        losses, towers = losses_of(rows)
        assert losses.by_task.tolist() == [0.0] * len(KINDS)
        assert (torch.autograd.grad(losses.total, towers)[0] == 0).all()

    @pytest.mark.parametrize("scale", [60.0, 1e4])
    def test_extreme_logits_give_finite_losses_and_gradients(self, scale: float) -> None:
        rows = rows_of(200, scale=scale)
        losses, towers = losses_of(rows)
        (gradient,) = torch.autograd.grad(losses.total, towers)
        assert losses.by_task.isfinite().all() and gradient.isfinite().all() and (gradient != 0).any()


class TestTeacher:
    def test_is_kl_with_the_gradient_of_cross_entropy(self) -> None:
        labels = torch.tensor([[0.0], [1.0], [0.3], [1e-6]]).repeat(5, 1)
        logits = torch.randn(20, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
        weights = torch.rand(20, 1) + 0.1
        gradients = []
        for teacher in (False, True):
            loss = MultitaskLoss({"p": TaskConfig(label="p", teacher=teacher)})
            gradients += torch.autograd.grad(loss(logits, labels, weights, weights.sum(0)).total, logits)
        torch.testing.assert_close(gradients[1], gradients[0])

    def test_a_perfect_student_has_no_loss(self) -> None:
        labels = torch.tensor([[1e-6], [0.02], [0.5], [0.999]])
        tasks = {"p": TaskConfig(label="p", teacher=True, align=2.0)}
        losses = MultitaskLoss(tasks)(labels.logit(), labels, torch.ones(4, 1), torch.tensor([4.0]))
        assert losses.total.item() == pytest.approx(0, abs=2e-5)
        worse = MultitaskLoss(tasks)(labels.logit() + 0.1, labels, torch.ones(4, 1), torch.tensor([4.0]))
        assert worse.total.item() > 0.05


class TestAtMost:
    @pytest.mark.parametrize("scale", list(Scale), ids=lambda scale: scale.name)
    def test_moves_both_where_it_is_broken_and_none_where_it_holds(self, scale: Scale) -> None:
        tasks = {
            "a": TaskConfig(label="a"),
            "b": TaskConfig(label="b", at_most="a", at_most_of=scale, at_most_weight=10.0),
        }
        logits = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]], requires_grad=True)
        labels, weights = torch.full((3, 2), 0.5), torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
        gradients = []
        for chosen in (tasks, {"a": tasks["a"], "b": TaskConfig(label="b")}):
            total = MultitaskLoss(chosen)(logits, labels, weights, torch.tensor([4.0, 2.0])).total
            gradients.append(torch.autograd.grad(total, logits)[0])
        added = gradients[0] - gradients[1]
        p = logits[0].detach().sigmoid()
        slopes = p * (1 - p) if scale is Scale.probability else 1 - p
        torch.testing.assert_close(added[0], 10.0 / 2 * slopes * torch.tensor([-1.0, 1.0]))
        assert (added[1:] == 0).all()  # the order holds; the row does not count for the task that it is asked of


class TestDebias:
    @pytest.mark.parametrize("debias", [Debias.ips, Debias.dr], ids=lambda debias: debias.name)
    def test_the_propensity_gets_no_gradient(self, debias: Debias) -> None:
        tasks = {
            "click": TaskConfig(label="c", loss_weight=0),
            "buy": TaskConfig(label="b", condition="click", debias=debias),
        }
        rows = rows_of()
        rows = {"towers": rows["towers"][:, :3], "labels": rows["labels"][:, :2], "weights": rows["weights"][:, :2]}
        losses, towers = losses_of(rows, tasks=tasks)
        (gradient,) = torch.autograd.grad(losses.total, towers)
        assert (gradient[:, 0] == 0).all() and (gradient[:, 1] != 0).any()
        assert (gradient[:, 2] != 0).any() == (debias is Debias.dr)

    def test_imputation_learns_from_the_step_and_not_the_step_from_imputation(self) -> None:
        gradients = []
        for debias in (Debias.ips, Debias.dr):
            tasks = {
                "click": TaskConfig(label="c", loss_weight=0),
                "buy": TaskConfig(label="b", condition="click", debias=debias),
            }
            rows = rows_of()
            rows = {"towers": rows["towers"][:, :3], "labels": rows["labels"][:, :2], "weights": rows["weights"][:, :2]}
            losses, towers = losses_of(rows, tasks=tasks)
            gradients.append(torch.autograd.grad(losses.total, towers)[0][:, 1])
        torch.testing.assert_close(gradients[1], gradients[0])

    @pytest.mark.parametrize("debias", [Debias.ips, Debias.dr], ids=lambda debias: debias.name)
    def test_is_the_mean_over_all_rows_though_clicks_choose_the_easy_ones(self, debias: Debias) -> None:
        """With the true propensity, the estimate is right on average; the mean over clicked rows is not."""
        rng = np.random.default_rng(0)
        ease = rng.normal(size=200_000)
        z = np.stack([1.5 * ease - 0.5, 1 + ease, 0.5 - ease], axis=1)  # of click, of buying, of its imputed loss
        buy = rng.random(len(ease)) < 1 / (1 + np.exp(-2 * ease))
        click = rng.random(len(ease)) < 1 / (1 + np.exp(-z[:, 0]))
        e = np.logaddexp(0, np.where(buy, -z[:, 1], z[:, 1]))
        tasks = {
            "click": TaskConfig(label="c"),
            "buy": TaskConfig(label="b", condition="click", debias=debias, propensity_floor=1e-4),
        }
        labels = torch.from_numpy(np.stack([click, buy & click], axis=1)).float()
        weights = torch.from_numpy(np.stack([np.ones(len(ease)), click], axis=1)).float()
        towers = torch.from_numpy(z).float()
        found = MultitaskLoss(tasks)(towers[:, :2], labels, weights, weights.sum(0), towers=towers).by_task[1].item()
        if debias is Debias.dr:  # less the loss of the imputation itself
            found -= np.mean((e - np.logaddexp(0, z[:, 2])) ** 2)
        assert found == pytest.approx(e.mean(), rel=0.03)
        assert abs(e[click].mean() / e.mean() - 1) > 0.1

    def test_clicked_rows_without_a_label_are_left_out(self) -> None:
        tasks = {"click": TaskConfig(label="c"), "buy": TaskConfig(label="b", condition="click", debias=Debias.dr)}
        rows = rows_of()
        rows = {"towers": rows["towers"][:, :3], "labels": rows["labels"][:, :2], "weights": rows["weights"][:, :2]}
        unlabelled = (rows["labels"][:, 0] == 1) & (rows["weights"][:, 1] == 0) & (rows["weights"][:, 0] > 0)
        losses, towers = losses_of(rows, tasks=tasks)
        (gradient,) = torch.autograd.grad(losses.weighted[1], towers)
        assert unlabelled.any() and (gradient[unlabelled] == 0).all()
