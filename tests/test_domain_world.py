import numpy as np
import pytest
import torch

from rec.domain_world import DOMAINS, ITEM_SIZE, QUERY_SIZE, RATES, DomainWorld, Shares
from rec.schema import ConfigError


def test_rows_are_a_function_of_seed_and_stream() -> None:
    a, b = DomainWorld(3).rows(300, stream=0), DomainWorld(3, domain_input=True).rows(300, stream=0)
    assert torch.equal(a.dense, b.dense[:, : QUERY_SIZE + ITEM_SIZE]) and torch.equal(a.labels, b.labels)
    assert torch.equal(b.dense[:, QUERY_SIZE + ITEM_SIZE :].argmax(1), a.domain_id)
    assert not torch.equal(a.dense, DomainWorld(3).rows(300, stream=1).dense)
    for rows, world in ((a, DomainWorld(3)), (b, DomainWorld(3, domain_input=True))):
        assert rows.dense.shape[1] == world.data.num_dense


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_are_the_teacher_s_and_have_its_rates(seed: int) -> None:
    world = DomainWorld(seed)
    rows = world.rows(100_000, stream=0)
    assert torch.equal(rows.labels, rows.truth) and (rows.weights == 1).all()
    assert all(task.teacher for task in world.data.tasks.values())
    np.testing.assert_allclose(rows.truth.mean(0).numpy(), list(RATES.values()), rtol=0.04)
    np.testing.assert_allclose(rows.domain_id.bincount().numpy() / 100_000, list(DOMAINS.values()), atol=0.006)
    logits = torch.logit(rows.truth) - world.bias[rows.domain_id]
    assert logits.std().item() == pytest.approx(1.4, rel=0.03)


def test_logits_are_the_formula_s() -> None:
    world, rows = DomainWorld(2), DomainWorld(2).balanced().rows(40, stream=0)
    for b in range(40):
        q, v, d = rows.dense[b : b + 1, :QUERY_SIZE], rows.dense[b : b + 1, QUERY_SIZE:], int(rows.domain_id[b])
        for t in range(len(RATES)):
            common, domain, task = world.common(q)[0, 0], world.domains(q)[0, d], world.tasks(q)[0, t]
            query = world.scale[0] * common + world.scale[1] * domain + world.scale[2] * task
            logit = float((query * world.item(v)[0, 0]).sum() + world.bias[d, t])
            assert rows.truth[b, t].item() == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)


def test_balanced_rows_are_of_the_same_world() -> None:
    world = DomainWorld(1)
    rows = world.balanced().rows(40_000, stream=1)
    np.testing.assert_allclose(rows.domain_id.bincount().numpy() / 40_000, 0.25, atol=0.01)
    torch.testing.assert_close(rows.truth, torch.sigmoid(world.logits(rows.dense, rows.domain_id)))
    assert world.traffic[0] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("shares", "domains", "tasks"),
    [
        (Shares(common=1, domain=0, task=0), 1.0, 1.0),
        (Shares(common=1, domain=1, task=0), 0.5, 1.0),
        (Shares(common=1, domain=0, task=2), 1.0, 0.2),
        (Shares(common=0, domain=1, task=0), 0.0, 1.0),
    ],
)
def test_shares_say_what_domains_and_tasks_have_in_common(shares: Shares, domains: float, tasks: float) -> None:
    of_domains, of_tasks = [], []
    for seed in range(4):
        world = DomainWorld(seed, shares=shares)
        dense = world.rows(5000, stream=0).dense
        logits = np.stack([world.logits(dense, torch.full((5000,), d)).double().numpy() for d in range(len(DOMAINS))])
        of_domains.append(np.corrcoef(logits[:, :, 0])[np.triu_indices(len(DOMAINS), 1)].mean())
        of_tasks.append(np.corrcoef(logits[0].T)[0, 1])
    # the share of the variance, but for what random networks happen to have in common
    assert np.mean(of_domains) == pytest.approx(domains, abs=0.12)
    assert np.mean(of_tasks) == pytest.approx(tasks, abs=0.15)


def test_tasks_weigh_nothing_where_they_do_not_exist() -> None:
    world = DomainWorld(0, exists={"conversion": ["home", "shopping"]})
    rows = world.balanced().rows(2000, stream=0)
    assert (rows.weights[:, 0] == 1).all()
    for row in range(2000):
        assert rows.weights[row, 1] == (list(DOMAINS)[rows.domain_id[row]] in ("home", "shopping"))
    assert world.data.tasks["click"].domains is None
    assert world.data.tasks["conversion"].domains == ["home", "shopping"]
    rows = world.rows(100_000, stream=0)
    counted = rows.weights[:, 1] > 0
    assert rows.truth[counted, 1].mean().item() == pytest.approx(0.05, rel=0.04)


@pytest.mark.parametrize(
    ("exists", "match"),
    [
        ({"conversoin": ["home"]}, "task 'conversoin'; did you mean 'conversion'"),
        ({"click": ["hom"]}, "domain 'hom'; did you mean 'home'"),
        ({"click": []}, "no domain for task 'click'"),
    ],
)
def test_bad_domains_are_refused(exists: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DomainWorld(0, exists=exists)
