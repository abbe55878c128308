from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from rec import arms
from rec.arms import (
    Arm,
    Trained,
    build,
    expected_auc,
    expected_aucs,
    gate_measures,
    measure,
    num_parameters,
    outputs_of,
    score_regression,
    train,
)
from rec.claims import STUDIES
from rec.experts import MMoEConfig, SharedBottomConfig
from rec.interaction import LowRankDCNv2Config
from rec.intervals import TaskRows
from rec.linear import LinearConfig, Route
from rec.losses import MultitaskLoss
from rec.worlds import EVERYWHERE, SegmentWorld, TaskPair


def untrained(arm: Arm, *, num_rows: int = 60) -> Trained:
    world = arm.world(0)
    model, rows = build(arm, world, seed=0), world.rows(num_rows, stream=1)
    return Trained("arm", world, model, rows, outputs_of(model, rows))


def test_expected_auc_is_the_chance_that_a_positive_outranks_a_negative() -> None:
    trained = untrained(Arm(SegmentWorld, MMoEConfig(layer_sizes=[4], num_experts=3)))
    click, purchase = trained.rows.truth.double().numpy().T
    for name, p, w, z in (
        ("click", click, np.ones(60), trained.outputs.logits[:, 0].numpy()),
        ("purchase", purchase, click, trained.outputs.logits[:, 1].numpy()),
    ):
        above = total = 0.0
        for i in range(60):
            for j in range(60):
                chance = w[i] * p[i] * w[j] * (1 - p[j])  # of i positive, j negative
                above += chance * (1.0 if z[i] > z[j] else 0.5 if z[i] == z[j] else 0.0)
                total += chance
        assert expected_aucs(trained)[name] == pytest.approx(above / total, abs=1e-9)


def test_gate_measures_are_of_the_mean_gates_of_click_and_purchase() -> None:
    def world(seed: int) -> SegmentWorld:
        return SegmentWorld(seed, tasks=("click", "purchase", "favourite"))

    trained = untrained(Arm(world, MMoEConfig(layer_sizes=[4], num_experts=3), gate_bias=3.0))
    click, purchase, _ = trained.outputs.gate_weights.numpy().astype(np.float64).mean(0)
    measured = gate_measures(trained)
    assert measured["experts click"] == pytest.approx(np.exp(-(click * np.log(click)).sum()), rel=1e-5)
    assert measured["largest purchase"] == pytest.approx(purchase.max(), rel=1e-5)
    assert measured["overlap"] == pytest.approx(sum(min(a, b) for a, b in zip(click, purchase, strict=True)), rel=1e-5)
    assert gate_measures(untrained(Arm(SegmentWorld, SharedBottomConfig(layer_sizes=[4])))) == {}


def test_squared_error_is_over_the_label_s_variance() -> None:
    trained = untrained(Arm(lambda seed: TaskPair(seed, p=0.5), SharedBottomConfig(layer_sizes=[4])))
    labels, preds = trained.rows.labels.numpy(), trained.outputs.logits.numpy()
    ratios = [((preds[:, k] - labels[:, k]) ** 2).mean() / labels[:, k].var(ddof=1) for k in range(2)]
    assert score_regression(trained)["arm"]["mse"] == pytest.approx(np.mean(ratios), rel=1e-5)


def test_few_rows_are_seen_once_an_epoch() -> None:
    study = replace(STUDIES["experts_sparse"], train_rows=100, batch_size=30)
    batches = list(islice(arms._batches(study, SegmentWorld(0), 8), 8))
    assert [batch.num_rows for batch in batches] == [30, 30, 30, 10] * 2
    first, second = (torch.cat([batch.row_id for batch in part]) for part in (batches[:4], batches[4:]))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100)) and not torch.equal(first, second)


def test_arms_learn() -> None:
    world = SegmentWorld(0)
    arm = Arm(SegmentWorld, MMoEConfig(layer_sizes=[8], num_experts=4))
    model = build(arm, world)
    train(model, world.batches(150, batch_size=1024), loss=MultitaskLoss(world.data.tasks), lr=5e-3)
    rows = world.rows(5000, stream=1)
    scores = expected_aucs(Trained("arm", world, model, rows, outputs_of(model, rows)))
    assert scores["click"] > 0.6 and scores["purchase"] > 0.6
    assert rows.domain_id.max() == 0 and world.placements == EVERYWHERE


def test_parts_are_further_stages_of_the_network() -> None:
    linear = LinearConfig(features=["inputs"], to=[Route.logits], exclusive=False)
    parts = {"linear": linear, "interaction": LowRankDCNv2Config(num_layers=3, low_rank=2)}
    plain, crossed = (build(Arm(SegmentWorld, SharedBottomConfig(), parts=p), SegmentWorld(0)) for p in ({}, parts))
    assert plain.linear.dense is None and crossed.linear.dense is not None
    assert num_parameters(plain.interaction) == 0 and len(crossed.interaction.W_kernels) == 3


def test_measures_without_a_meaning_are_nan() -> None:
    rows = TaskRows(np.zeros(3), labels=np.zeros(3), weights=np.ones(3), domain_id=np.zeros(3, dtype=np.int64))
    values = measure(rows, "logloss", "calibration")
    assert values["logloss"] == pytest.approx(np.log(2)) and np.isnan(values["calibration"])
    assert np.isnan(expected_auc(rows))
