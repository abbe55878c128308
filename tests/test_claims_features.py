from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch

from rec import arms, id_world
from rec.arms import Trained, build, outputs_of, run_arm
from rec.claims_features import NUM_IDS, ROUTES, STUDIES, UnseenLinear, hop_logits, score_hops
from rec.id_world import NUM_LINEAR, IdWorld, TaskForm
from rec.schema import Debias

SMALL_STUDIES = [name for name in STUDIES if not name.endswith("_sparse")]


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "EVALUATION_ROWS", 400)
    monkeypatch.setattr(id_world, "CALIBRATION_ROWS", 2000)


def untrained(study: str, arm: str, *, num_rows: int = 40) -> Trained:
    """An arm whose towers answer at random, more boldly than a fresh network."""
    of = STUDIES[study].arms()[arm]
    world = of.world(0)
    model, rows = build(of, world, seed=0), world.rows(num_rows, stream=1)
    outputs = outputs_of(model, rows)
    towers = torch.randn(outputs.towers.shape, generator=torch.Generator().manual_seed(3)) * 2
    return Trained(arm, world, model, rows, replace(outputs, towers=towers, logits=model.funnel(towers)))


def sigmoid(z: float) -> float:
    return 1 / (1 + exp(-z))


def loop_auc(scores: list[float], chances: list[float], weights: list[float]) -> float:
    above = total = 0.0
    for s, p, w in zip(scores, chances, weights, strict=True):
        for other, q, v in zip(scores, chances, weights, strict=True):
            pair = w * p * v * (1 - q)
            total += pair
            above += pair * (1.0 if s > other else 0.5 if s == other else 0.0)
    return above / total


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_builds_and_runs(name: str) -> None:
    rows = 150 if name.endswith("_sparse") else None
    study = replace(STUDIES[name], batch_size=64, train_rows=rows)
    for arm in study.arms():
        (line, scores), *more = run_arm(study, arm, world=0, steps=2).items()
        assert line == arm and not more and set(study.compared) <= scores.keys()
        assert all(np.isfinite(value) for value in scores.values())
    assert set(study.lower_is_better) <= set(study.compared)


def test_sparse_studies_have_the_same_arms_on_more_ids_and_fewer_rows() -> None:
    for name in SMALL_STUDIES:
        if f"{name}_sparse" not in STUDIES:
            continue
        plenty, sparse = STUDIES[name], STUDIES[f"{name}_sparse"]
        assert list(plenty.arms()) == list(sparse.arms())
        assert plenty.train_rows is None and sparse.train_rows == 200_000
        assert sparse.steps == 2 * -(
            -200_000 // sparse.batch_size
        )  # two epochs, with the short batch at the end of each
        for study, num in ((plenty, NUM_IDS[False]), (sparse, NUM_IDS[True])):
            for arm in study.arms().values():
                assert {table.num_embeddings for table in arm.world(0).data.tables.values()} == {num}


# ---- scores


@pytest.mark.parametrize("arm", ["condition", "product"])
def test_hops_are_scored_as_loops_would(arm: str) -> None:
    trained = untrained("hops", arm)
    found, truth = score_hops(trained)[arm], trained.world.step_truth(trained.rows).tolist()
    towers = trained.outputs.towers.tolist()
    ones = [1.0] * len(truth)
    for hop, name in enumerate(("click", "second_click", "order")):
        before = [float(np.prod(row[:hop])) for row in truth]
        expected = loop_auc([row[hop] for row in towers], [row[hop] for row in truth], before)
        assert found[name] == pytest.approx(expected, abs=1e-6)
        if hop:
            said = [float(np.prod([sigmoid(z) for z in row[: hop + 1]])) for row in towers]
            whole = [float(np.prod(row[: hop + 1])) for row in truth]
            assert found[f"{name} of all"] == pytest.approx(loop_auc(said, whole, ones), abs=1e-6)
    assert "click of all" not in found and found["above click"] == 0


@pytest.mark.parametrize("arm", ["condition", "direct", "product", "condition, ips", "product, dr"])
def test_unclicked_rows_are_scored_as_loops_would(arm: str) -> None:
    trained = untrained("entire_space", arm)
    found, truth = score_hops(trained)[arm], trained.world.step_truth(trained.rows).tolist()
    loss = weight = said = true = above = 0.0
    for (first, second, *_), (click, step) in zip(trained.outputs.towers.tolist(), truth, strict=True):
        p = sigmoid(second)
        if arm == "direct":  # its second number is of both hops
            above += p > sigmoid(first)
            p = min(p / sigmoid(first), exp(-1e-6))
        w = 1 - click
        loss -= w * (step * log(p) + (1 - step) * log(1 - p))
        said, true, weight = said + w * p, true + w * step, weight + w
    assert found["unclicked logloss"] == pytest.approx(loss / weight, rel=1e-5)
    assert found["unclicked calibration"] == pytest.approx(said / true, rel=1e-5)
    assert found["unclicked bias"] == pytest.approx(abs(said / true - 1), rel=1e-4)
    assert found["above click"] == pytest.approx(above / len(truth)) and (above > 0) == (arm == "direct")


def test_products_say_what_their_network_says() -> None:
    """The logits that the losses see are of the chances that are scored."""
    for study, arm in (("hops", "product"), ("entire_space", "direct"), ("entire_space", "product, dr")):
        trained = untrained(study, arm)
        said = hop_logits(trained).log_chances.exp()
        torch.testing.assert_close(said, trained.outputs.logits.double().sigmoid(), rtol=1e-5, atol=1e-7)


# ---- arms


def test_unseen_linear_features_change_nothing_else() -> None:
    seen, unseen = (kind(1, num_ids=20).rows(200, stream=0) for kind in (IdWorld, UnseenLinear))
    assert (unseen.dense[:, :NUM_LINEAR] == 0).all() and (seen.dense[:, :NUM_LINEAR] != 0).all()
    assert torch.equal(seen.dense[:, NUM_LINEAR:], unseen.dense[:, NUM_LINEAR:])
    for name in ("labels", "truth", "weights", "row_id"):
        assert torch.equal(getattr(seen, name), getattr(unseen, name))
    assert torch.equal(seen.sparse_features.values(), unseen.sparse_features.values())


def test_linear_arms_read_linear_features_where_they_say() -> None:
    arms = STUDIES["linear"].arms()
    width = {name: build(arm, arm.world(0)).inputs.out_features for name, arm in arms.items() if "new" in name}
    apart = {f"new / {route}" for route in ROUTES}
    assert {name for name in width if width[name] < max(width.values())} == apart
    assert {max(width.values()) - width[name] for name in apart} == {NUM_LINEAR}
    for route, to in ROUTES.items():
        assert arms[f"new / {route}"].parts["linear"].to == to and arms[f"new / {route}"].parts["linear"].exclusive
    assert not arms["new / v1 and deep part"].parts["linear"].exclusive
    assert all((arm.world(0).basis is not None) == name.startswith("derived") for name, arm in arms.items())


def test_machines_of_every_kind_start_from_the_same_logits() -> None:
    arms = STUDIES["fm"].arms()
    assert len(arms) == 12
    world = arms["v4 / none"].world(0)
    rows = world.rows(50, stream=1)
    models = {kind: build(arms[f"v4 / {kind}"], world) for kind in ("none", "shared", "shared, scale", "per task")}
    for model in models.values():
        for table in model.embeddings.tables.parameters():
            table.data *= 30  # else products are too small to be seen
    logits = {kind: outputs_of(model, rows).logits for kind, model in models.items()}
    torch.testing.assert_close(logits["shared"], logits["shared, scale"])
    torch.testing.assert_close(logits["shared"], logits["per task"])
    added = logits["shared"] - logits["none"]
    torch.testing.assert_close(added[:, 0], added[:, 1], rtol=1e-4, atol=1e-6)
    assert added.abs().max() > 1e-3


def test_losses_are_those_that_the_arms_are_named_after() -> None:
    weights = {name: arm.world(0).data.tasks for name, arm in STUDIES["loss_weight"].arms().items()}
    for name, tasks in weights.items():
        assert tasks["click"].loss_weight == 1 and name == f"second click x {tasks['second_click'].loss_weight:g}"
    assert next(iter(weights)) == "second click x 1"  # which the others are compared with
    for name, arm in STUDIES["entire_space"].arms().items():
        world = arm.world(0)
        task, (form, _, debias) = world.data.tasks["second_click"], name.partition(", ")
        assert task.debias is (Debias[debias] if debias else Debias.none)
        assert (task.condition, task.product) == {
            "condition": ("click", None),
            "product": (None, "click"),
            "direct": (None, None),
        }[form]
        assert world.data.tasks["click"].debias is Debias.none
    assert {arm.world(0).hops.form for arm in STUDIES["fm"].arms().values()} == {TaskForm.direct}


def test_layers_are_as_many_as_the_arms_say() -> None:
    for name, arm in STUDIES["depth"].arms().items():
        assert name == f"{len(arm.experts.layer_sizes) + len(arm.tower_sizes) + 1} layers"


def test_half_of_the_histories_matter_by_the_candidate() -> None:
    arms = STUDIES["history"].arms()
    assert [arm.world(0).candidate_dependent for arm in arms.values()] == [True] * 4 + [False] * 4
    kinds = [arm.parts["histories"][0] for arm in arms.values()]
    assert [(kind.kind.name, kind.softmax) for kind in kinds[:4]] == [
        ("mean", False),
        ("din", False),
        ("din", True),
        ("transformer", False),
    ]
    assert kinds[:4] == kinds[4:]
