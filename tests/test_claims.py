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
    expected_aucs,
    gate_measures,
    num_parameters,
    outputs_of,
    run_arm,
    score_regression,
    train,
)
from rec.claims import MIXED, STUDIES
from rec.experts import MMoEConfig, SharedBottomConfig
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


@pytest.mark.parametrize("study", ["experts", "experts_sparse"])
def test_networks_of_the_experts_study_are_of_one_size(study: str) -> None:
    sizes = {name: num_parameters(build(arm, arm.world(0))) for name, arm in STUDIES[study].arms().items()}
    assert len(sizes) == 4 and max(sizes.values()) < 1.01 * min(sizes.values())
    assert sum(expert.num for expert in MIXED) == 8


def test_paper_s_networks_have_the_paper_s_size() -> None:
    arms = STUDIES["mmoe_paper"].arms()
    assert len(arms) == 12
    bottom = build(arms["p = 0.5 / shared bottom"], TaskPair(0, p=0.5))
    mixture = build(arms["p = 0.5 / MMoE"], TaskPair(0, p=0.5))
    weights = 100 * 16 * 8 + 16 * 8 * 2  # as the paper counts: experts' and towers' first layer, no biases
    assert round(weights / (100 + 8 * 2)) == 113 == bottom.experts.bottom.weights[0].shape[-1]
    stack = mixture.experts.experts.stacks[0]
    assert stack.weights[0].numel() + mixture.towers.towers.weights[0].numel() == weights


def test_collapse_starts_from_the_same_steep_gates_in_every_arm() -> None:
    arms, world = STUDIES["collapse"].arms(), SegmentWorld(0)
    gated = [build(arm, world, seed=7) for name, arm in arms.items() if name != "shared bottom"]
    biases = [model.experts.gates.logits.biases[-1] for model in gated]
    assert len(biases) == 6 and all(torch.equal(bias, biases[0]) for bias in biases)
    many = [build(arms["temperature 1"], world, seed=seed).experts.gates.logits.biases[-1] for seed in range(40)]
    assert torch.cat(many).std().item() == pytest.approx(6.0, rel=0.15)
    assert not torch.equal(many[0], many[1])


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


def test_one_platt_scaling_hides_what_one_a_placement_mends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "EVALUATION_ROWS", 20_000)
    lines = run_arm(STUDIES["platt"], "MMoE", world=0, steps=60)
    raw, one, own = (lines[f"click / {name}"] for name in ("raw", "one Platt scaling", "one a placement"))
    assert own["field_ece"] < 0.4 * one["field_ece"] and own["logloss"] < one["logloss"]
    assert one["ece"] < 0.5 * one["field_ece"] and abs(one["calibration foot"] - 1) > 0.2
    for place in ("top", "side", "foot"):
        assert abs(own[f"calibration {place}"] - 1) < 0.07
        assert raw[f"auc {place}"] == pytest.approx(own[f"auc {place}"], abs=1e-6)  # the order within is kept
