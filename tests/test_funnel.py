import math

import numpy as np
import pytest
import torch

from rec.funnel import Funnel, imputation_towers, log_complement, needed_towers, tower_of
from rec.schema import ConfigError, DataConfig, Debias, FeatureConfig, FeatureKind, TaskConfig, TaskKind

ESM2 = {
    "click": TaskConfig(label="click"),
    "cart": TaskConfig(label="cart", product="click"),
    "buy": TaskConfig(label="buy", product="click", via="cart"),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_esmm_and_esm2_are_products_of_probabilities() -> None:
    towers = torch.randn(50, 4) * 3
    probabilities = Funnel(ESM2)(towers).sigmoid()
    assert tower_of(ESM2) == [0, 1, 2, 2]
    for (click, cart, with_cart, without), found in zip(towers.tolist(), probabilities.tolist(), strict=True):
        y1, y2, y3, y4 = (sigmoid(z) for z in (click, cart, with_cart, without))
        assert found == pytest.approx([y1, y1 * y2, y1 * (y2 * y3 + (1 - y2) * y4)], rel=1e-4)
        assert found[1] <= found[0] and found[2] <= found[0]


def test_a_chain_of_three_hops_and_a_way_without_product() -> None:
    tasks = {
        "buy": TaskConfig(label="buy", product="cart"),  # in any order
        "cart": TaskConfig(label="cart", product="click"),
        "click": TaskConfig(label="click"),
        "wish": TaskConfig(label="wish", condition="click"),
        "gift": TaskConfig(label="gift", condition="click", via="wish"),
    }
    towers = torch.randn(20, 6)
    found = Funnel(tasks)(towers).sigmoid().double().numpy()
    p = towers.double().sigmoid().numpy()
    expected = [p[:, 0] * p[:, 1] * p[:, 2], p[:, 1] * p[:, 2], p[:, 2], p[:, 3]]
    expected.append(p[:, 3] * p[:, 4] + (1 - p[:, 3]) * p[:, 5])
    np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=1e-4)


@pytest.mark.parametrize("scale", [-60.0, -30.0, 15.0, 60.0])
def test_extremes_keep_their_digits_and_finite_gradients(scale: float) -> None:
    towers = torch.full((1, 4), scale, requires_grad=True)
    logits = Funnel(ESM2)(towers)
    exact_log_p = 2 * -np.logaddexp(0, -np.float64(scale))
    expected = exact_log_p - np.log(-np.expm1(exact_log_p))
    assert logits[0, 1].item() == pytest.approx(expected, rel=1e-3)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 0.0, 1.0]])).backward()
    assert torch.isfinite(towers.grad).all() and towers.grad.abs().sum() > 0


def test_log_complement_against_float64() -> None:
    log_p = -torch.logspace(-6, 1.5, 200)
    expected = np.log1p(-np.exp(log_p.double().numpy()))
    np.testing.assert_allclose(log_complement(log_p).numpy(), expected, rtol=2e-5, atol=1e-30)


def test_sampling_is_corrected_outside_training_alone() -> None:
    tasks = {
        "click": TaskConfig(label="click", negatives_kept=0.1, positive_weight=3.0),
        "buy": TaskConfig(label="buy"),
    }
    funnel, towers = Funnel(tasks), torch.randn(9, 2)
    assert torch.equal(funnel.train()(towers), towers)
    p = towers[:, 0].sigmoid()
    seen = p / (p + (1 - p))  # of odds that the loss saw: 3 times, and 10 times, the log's
    odds = seen / (1 - seen) / 3 * 0.1
    torch.testing.assert_close(funnel.eval()(towers)[:, 0].sigmoid(), odds / (1 + odds))
    torch.testing.assert_close(funnel(towers)[:, 1], towers[:, 1])


DR = {
    "click": TaskConfig(label="click"),
    "like": TaskConfig(label="like", condition="click", debias=Debias.dr, auxiliary=True),
    "cart": TaskConfig(label="cart", product="click", debias=Debias.dr),
    "buy": TaskConfig(label="buy", product="click", via="cart"),
    "pay": TaskConfig(label="pay", condition="click", debias=Debias.ips),
}


def test_imputation_towers_come_last_and_no_logit_reads_them() -> None:
    assert tower_of(DR) == [0, 1, 2, 3, 4, 3, 1, 2]
    assert imputation_towers(DR) == {1: 6, 2: 7}
    towers = torch.randn(30, 8, requires_grad=True)
    for funnel in (Funnel(DR).train(), Funnel(DR).eval()):
        logits = funnel(towers)
        (gradient,) = torch.autograd.grad(logits.sum(), towers)
        assert logits.shape == (30, 5)
        assert (gradient[:, 6:] == 0).all() and (gradient[:, :6] != 0).any(dim=0).all()
    without = {name: TaskConfig(label=task.label, product=task.product, via=task.via) for name, task in DR.items()}
    assert torch.equal(Funnel(without)(towers[:, :6]), Funnel(DR)(towers))


def test_towers_without_a_product_are_cut_to_the_tasks() -> None:
    tasks = {name: DR[name] for name in ("click", "like", "pay")}
    towers = torch.randn(9, 4)
    assert torch.equal(Funnel(tasks)(towers), towers[:, :3])
    assert torch.equal(Funnel(tasks)(towers[:, :3]), towers[:, :3])


def test_what_serving_needs_gives_the_same_logits() -> None:
    towers, needed = torch.randn(30, 8), ["click", "cart", "buy"]
    kept = needed_towers(DR, needed)
    assert kept == [0, 2, 3, 5]
    served = Funnel({name: DR[name] for name in needed}, outputs=["buy", "click"]).eval()
    torch.testing.assert_close(served(towers[:, kept]), Funnel(DR).eval()(towers)[:, [3, 0]])


def data(**tasks: TaskConfig) -> DataConfig:
    return DataConfig(name="x", path="x", features={"a": FeatureConfig(kind=FeatureKind.dense)}, tasks=tasks)


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({"a": TaskConfig(label="a", product="b")}, "data.tasks.a.product is 'b', expected another binary task"),
        ({"a": TaskConfig(label="a", via="a")}, "data.tasks.a.via is 'a', expected another binary task"),
        (
            {"a": TaskConfig(label="a", product="b"), "b": TaskConfig(label="b", product="a")},
            "product and via lead back to it",
        ),
        (
            {"a": TaskConfig(label="a", product="b"), "b": TaskConfig(label="b", negatives_kept=0.1)},
            "must be 1 on it and on b",
        ),
        (
            {"a": TaskConfig(label="a", via="b"), "b": TaskConfig(label="b", product="c"), "c": TaskConfig(label="c")},
            "has another product or condition",
        ),
        (
            {"a": TaskConfig(label="a", product="b"), "b": TaskConfig(label="b", kind=TaskKind.regression)},
            "expected another binary task",
        ),
        ({"a": TaskConfig(label="a", auxiliary=True)}, "every task of data.tasks is auxiliary"),
    ],
)
def test_bad_funnels_are_refused(tasks: dict[str, TaskConfig], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        data(**tasks)


@pytest.mark.parametrize(
    "settings",
    [
        {"condition": "b", "product": "b"},
        {"kind": TaskKind.regression, "positive_weight": 2.0},
        {"kind": TaskKind.regression, "via": "b"},
        {"negatives_kept": 0.0},
    ],
)
def test_bad_tasks_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError):
        TaskConfig(label="a", **settings)
