from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from rec import arms, claims_domains
from rec.arms import EVALUATION, TRAIN, Arm, Trained, build, num_parameters, outputs_of, run_arm
from rec.claims_domains import FROZEN, NEW, STUDIES, Lessons, add_domain, log_maes, score_domains, two_towers
from rec.domain_world import DOMAINS, ITEM_SIZE, QUERY_SIZE, RATES
from rec.experts import SharedBottomConfig
from rec.features import Batch
from rec.model import Ranker
from rec.worlds import take

EVERY_ARM = [(study, arm) for study in STUDIES for arm in STUDIES[study].arms()]


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(arms, "EVALUATION_ROWS", 400)
    monkeypatch.setattr(claims_domains, "NEW_ROWS", (20, 40, 60))
    monkeypatch.setattr(claims_domains, "NEW_EPOCHS", 1)
    return


def untrained(study: str, name: str, *, seed: int = 0) -> Ranker:
    arm = STUDIES[study].arms()[name]
    return build(arm, arm.world(seed), seed=seed)


def squared(logits: Tensor, rows: Batch) -> Tensor:
    return (logits - rows.labels).square().sum()


@pytest.mark.parametrize(("study", "arm"), EVERY_ARM)
def test_every_arm_runs(study: str, arm: str) -> None:
    lines = run_arm(replace(STUDIES[study], train_rows=300, batch_size=100), arm, world=1, steps=2)
    assert arm in lines and all(np.isfinite(list(scores.values())).all() for scores in lines.values())
    assert all(set(STUDIES[study].compared) <= set(scores) for scores in lines.values())
    added = [scores for line, scores in lines.items() if ", then" in line]
    if (study, arm) == ("unseen_domain", "MTMD"):
        assert [scores["items moved"] > 0 for scores in added] == [False, False, False, True]
    else:
        assert not added


@pytest.mark.parametrize("study", ["domains", "unseen_domain"])
def test_networks_are_of_one_size(study: str) -> None:
    sizes = {arm: num_parameters(untrained(study, arm)) for arm in STUDIES[study].arms() if ", with it" not in arm}
    for arm, size in sizes.items():
        if arm == "separate models":
            assert size > sizes["MTMD"]
        else:
            assert size == pytest.approx(sizes["MTMD"], rel=0.02)


def test_log_mae_is_of_each_domain_and_task() -> None:
    world = Lessons(0)
    model, rows = untrained("domains", "STAR"), world.rows(200, stream=EVALUATION)
    trained = Trained("STAR", world, model, rows, outputs_of(model, rows))
    errors = np.zeros((len(DOMAINS), len(RATES)))
    for d in range(len(DOMAINS)):
        for t in range(len(RATES)):
            of_rows = []
            for row in range(200):
                if rows.domain_id[row] == d:
                    z, p = float(trained.outputs.logits[row, t]), float(rows.truth[row, t])
                    of_rows.append(abs(np.log(1 / (1 + np.exp(-z))) - np.log(p)))
            errors[d, t] = np.mean(of_rows)
    (scores,) = score_domains(trained).values()
    for d, domain in enumerate(DOMAINS):
        assert scores[domain] == pytest.approx(errors[d].mean(), rel=1e-5)
        for t, task in enumerate(RATES):
            assert scores[f"{domain} {task}"] == pytest.approx(errors[d, t], rel=1e-5)
    assert scores["mean"] == pytest.approx(errors.mean(), rel=1e-5)
    weighted = 0.7 * errors[0] + 0.2 * errors[1] + 0.08 * errors[2] + 0.02 * errors[3]
    assert scores["traffic"] == pytest.approx(weighted.mean(), rel=1e-5)
    rows.domain_id[rows.domain_id == NEW] = -1
    np.testing.assert_allclose(log_maes(trained.outputs.logits, rows), errors, rtol=1e-5)


def test_lessons_are_of_the_traffic_and_scores_of_all_domains_alike() -> None:
    world = Lessons(3)
    taught, scored = (world.rows(20_000, stream=stream) for stream in (TRAIN, EVALUATION))
    np.testing.assert_allclose(taught.domain_id.bincount() / 20_000, list(DOMAINS.values()), atol=0.01)
    np.testing.assert_allclose(scored.domain_id.bincount() / 20_000, 0.25, atol=0.01)


def test_all_lessons_have_the_same_rows() -> None:
    whole, drawn = (Lessons(2, domain_input=True, drawn=drawn).rows(4000, stream=TRAIN) for drawn in (False, True))
    unseen = Lessons(2, domain_input=True, unseen=True).rows(4000, stream=TRAIN)
    last = whole.domain_id == NEW
    assert 40 < last.sum() < 120
    assert torch.equal(drawn.dense, whole.dense) and torch.equal(drawn.truth, whole.truth)
    assert set(drawn.labels.flatten().tolist()) == {0.0, 1.0}
    np.testing.assert_allclose(drawn.labels.mean(0), whole.truth.mean(0), atol=0.03)
    assert torch.equal(unseen.domain_id, torch.where(last, -1, whole.domain_id))
    assert torch.equal(unseen.weights[:, 0], (~last).float()) and (whole.weights == 1).all()
    plain, one_hot = QUERY_SIZE + ITEM_SIZE, torch.where(last, 0.0, 1.0)
    assert torch.equal(unseen.dense[:, :plain], whole.dense[:, :plain])
    assert torch.equal(unseen.dense[:, plain:].sum(1), one_hot)
    assert Lessons(2, unseen=True).data.domains == list(DOMAINS)[:NEW]


def test_losses_are_those_asked_for() -> None:
    for world, teacher, align in (
        (Lessons(0), True, 0),
        (Lessons(0, drawn=True), False, 0),
        (Lessons(0, align=0.3), True, 0.3),
    ):
        assert {(task.teacher, task.align) for task in world.data.tasks.values()} == {(teacher, align)}


def test_separate_models_are_rankers_of_one_domain() -> None:
    separate = untrained("domains", "separate models")
    with torch.no_grad():
        separate.towers.towers.weights[0].fill_(1.0)  # each model's logit, as it is
    rows = Lessons(0).rows(60, stream=EVALUATION)
    outputs = separate.train()(rows)
    alone = Arm(Lessons, SharedBottomConfig(layer_sizes=[claims_domains.WIDTH]), parts={"towers": two_towers()})
    for d in range(len(DOMAINS)):
        model, one = build(alone, Lessons(0)).train(), separate.experts.models[d]
        model.experts.load_state_dict(one.bottom.state_dict())
        towers = {name: value for name, value in one.towers.state_dict().items() if name != "domain_bias"}
        model.towers.load_state_dict(towers, strict=False)  # of the four domains' biases, all are 0
        here = take(rows, (rows.domain_id == d).nonzero().flatten())
        torch.testing.assert_close(model(here).logits, outputs.logits[rows.domain_id == d])


def test_rows_teach_the_model_of_their_domain_alone() -> None:
    separate = untrained("domains", "separate models").train()
    rows = Lessons(0).rows(60, stream=EVALUATION)
    for d in range(len(DOMAINS)):
        separate.zero_grad()
        here = take(rows, (rows.domain_id == d).nonzero().flatten())
        squared(separate(here).logits, here).backward()
        for other, model in enumerate(separate.experts.models):
            taught = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            assert taught == ({name for name, _ in model.named_parameters()} if other == d else set())
        scales = separate.towers.towers.weights[0].grad.squeeze(-1)  # [T, D]
        assert torch.equal(scales.any(dim=0), torch.arange(len(DOMAINS)) == d)


def test_a_domain_is_added_and_neither_items_nor_the_others_change() -> None:
    whole, unseen = Lessons(1), Lessons(1, unseen=True)
    model = build(STUDIES["unseen_domain"].arms()["MTMD"], unseen, seed=1)
    few = claims_domains._new_rows(whole)
    assert (few.domain_id == NEW).all() and few.num_rows > 60
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grown = add_domain(model, whole, take(few, slice(60)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows, old_rows = (world.rows(300, stream=EVALUATION) for world in (whole, unseen))
    assert torch.equal(claims_domains._items(grown, rows), claims_domains._items(model, old_rows))
    new, logits, old = rows.domain_id == NEW, outputs_of(grown, rows).logits, outputs_of(model, old_rows).logits
    torch.testing.assert_close(logits[~new], old[~new], rtol=1e-6, atol=1e-6)
    assert (logits[new] - old[new]).abs().min() > 0
    fresh = build(STUDIES["unseen_domain"].arms()["MTMD, with it from the start"], whole, seed=1)
    start, now = fresh.state_dict(), grown.state_dict()
    for name in ("towers.domain_bias", "experts.domain_experts.stacks.0.weights.0", "experts.gates.logits.biases.0"):
        own = slice(-(len(now[name]) // len(DOMAINS)), None)
        assert not torch.equal(now[name][own], start[name][own])


def test_what_is_frozen_is_what_the_experiment_freezes() -> None:
    file = Path(__file__).parent.parent / "conf" / "experiment" / "mtmd_new_domain.yaml"
    assert {*FROZEN} == {*yaml.safe_load(file.read_text())["optim"]["freeze"]} - {"embeddings.*"}
