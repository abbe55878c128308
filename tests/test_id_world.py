from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import OneHotEncoder
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rec.features import Batch
from rec.id_world import (
    HOPS,
    NUM_DEEP,
    NUM_FIELDS,
    NUM_LINEAR,
    HistoryStrengths,
    HistoryWorld,
    Hops,
    HopWorld,
    IdWorld,
    Inputs,
    Strengths,
    TaskForm,
)
from rec.schema import ConfigError

KINDS = (IdWorld, HistoryWorld)
PARTS = ("main", "pairwise", "linear", "crossed", "deep")


def id_rows(ids: list[list[int]]) -> Inputs:
    """Rows of these ids whose dense columns are all alike."""
    values = torch.tensor(ids)
    lengths = torch.ones(values.numel(), dtype=torch.int32)
    keys = [f"field_{f}" for f in range(NUM_FIELDS)]
    dense = torch.linspace(-1, 1, NUM_LINEAR + NUM_DEEP).expand(len(ids), -1)
    return Inputs(KeyedJaggedTensor(keys=keys, values=values.T.flatten(), lengths=lengths), dense)


def histories(items: list[int], lists: list[list[int]]) -> Inputs:
    """Rows of these candidates and histories, all of segment 0."""
    num, flat = len(items), [i for ids in lists for i in ids]
    lengths = [1] * num + [len(ids) for ids in lists] + [1] * num
    values = torch.tensor(items + flat + [0] * num)
    ids = KeyedJaggedTensor(
        keys=["item", "history", "segment"], values=values, lengths=torch.tensor(lengths, dtype=torch.int32)
    )
    return Inputs(ids, torch.zeros(num, 0))


def assert_same(a: Batch, b: Batch) -> None:
    for name in ("dense", "row_id", "draws"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.sparse_features.keys() == b.sparse_features.keys()
    assert torch.equal(a.sparse_features.values(), b.sparse_features.values())
    assert torch.equal(a.sparse_features.lengths(), b.sparse_features.lengths())


def assert_calibrated(labels: torch.Tensor, chances: torch.Tensor) -> None:
    """Of rare, middling and frequent rows, as many are positive as their chances say."""
    for part in chances.argsort().chunk(5):
        y, p = labels[part].double(), chances[part].double()
        assert abs((y - p).sum()) < 4.5 * (p * (1 - p)).sum().sqrt()


# ---- hops


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_a_function_of_the_seed_whatever_the_tasks(kind: type[HopWorld]) -> None:
    first = kind(3).rows(500, stream=0)
    assert_same(first, kind(3).rows(500, stream=0))
    for form in TaskForm:
        more = kind(3, hops=Hops(num=3, form=form)).rows(500, stream=0)
        assert_same(first, more)
        assert torch.equal(more.labels[:, :2], first.labels)
        torch.testing.assert_close(more.truth[:, 0], first.truth[:, 0])
    other = kind(3).rows(500, stream=1).sparse_features.values()
    assert other.shape != first.sparse_features.values().shape or not other.equal(first.sparse_features.values())


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_drawn_from_the_truth_of_each_form(kind: type[HopWorld]) -> None:
    for form in TaskForm:
        world = kind(1, hops=Hops(num=3, form=form))
        rows = world.rows(60_000, stream=1)
        steps, reached = world.step_truth(rows), torch.ones(60_000, dtype=torch.bool)
        for hop in range(3):
            counted = reached if form is TaskForm.conditional else torch.ones_like(reached)
            assert torch.equal(rows.weights[:, hop] > 0, counted)
            expected = steps[:, hop] if form is TaskForm.conditional else steps[:, : hop + 1].prod(dim=1)
            torch.testing.assert_close(rows.truth[:, hop], expected)
            assert_calibrated(rows.labels[counted, hop], rows.truth[counted, hop])
            assert not rows.labels[~reached, hop].any()
            reached = reached & (rows.labels[:, hop] > 0)


def test_tasks_say_what_their_form_means() -> None:
    conditional, entire, direct = (IdWorld(0, hops=Hops(num=3, form=form)).data.tasks for form in TaskForm)
    assert list(conditional) == list(entire) == list(direct) == list(HOPS)
    assert [task.condition for task in conditional.values()] == [None, "click", "second_click"]
    assert [task.product for task in entire.values()] == [None, "click", "second_click"]
    assert not any(task.condition or task.product for task in direct.values())
    # a product's column is of its own step; a direct task's truth is made of the steps' columns
    assert entire["order"].truth == conditional["order"].truth == "true_order"
    assert direct["order"].truth == "true_click * true_second_click * true_order"
    weighed = Hops(loss_weights=(0.95, 0.05))
    assert [task.loss_weight for task in IdWorld(0, hops=weighed).data.tasks.values()] == [0.95, 0.05]


@pytest.mark.parametrize("kind", KINDS)
def test_rates_are_those_asked_for_given_the_hop_before(kind: type[HopWorld]) -> None:
    world = kind(2, hops=Hops(num=3, rates=(0.1, 0.4, 0.25)))
    steps = world.step_truth(world.rows(100_000, stream=0)).double()
    before = torch.ones(100_000, dtype=torch.float64)
    for hop, rate in enumerate((0.1, 0.4, 0.25)):
        assert ((before * steps[:, hop]).sum() / before.sum()).item() == pytest.approx(rate, rel=0.04)
        before = before * steps[:, hop]


def test_clicked_rows_are_likelier_to_go_on_only_where_hops_are_alike() -> None:
    def means(alike: float) -> tuple[float, float]:
        world = IdWorld(0, hops=Hops(alike=alike))
        rows = world.rows(50_000, stream=0)
        second, click = world.step_truth(rows)[:, 1], rows.labels[:, 0] > 0
        return second[click].mean().item(), second[~click].mean().item()

    clicked, others = means(0.8)
    assert clicked > others + 0.08
    clicked, others = means(0.0)
    assert clicked == pytest.approx(others, abs=0.015)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"num": 4}, "num of a world's hops is 4"),
        ({"num": 3, "rates": (0.1, 0.2)}, "rates of a world's hops are .0.1, 0.2., expected one for each of 3"),
        ({"rates": (0.0, 0.2)}, "lowest rate of a world's hops is 0.0"),
        ({"rates": (0.2, 1.0)}, "highest rate of a world's hops is 1.0"),
        ({"alike": -0.1}, "alike of a world's hops is -0.1"),
    ],
)
def test_bad_hops_are_refused(wrong: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Hops(**wrong)


# ---- fields


@pytest.mark.parametrize("zipf", [0.0, 1.0])
def test_a_batch_has_one_id_a_field_of_the_share_asked_for(zipf: float) -> None:
    world = IdWorld(0, num_ids=50, zipf=zipf)
    rows = world.rows(40_000, stream=0)
    ids = rows.sparse_features
    assert ids.keys() == list(world.data.sparse_features) and (ids.lengths() == 1).all()
    assert rows.dense.shape[1] == world.data.num_dense == NUM_LINEAR + NUM_DEEP
    share = np.arange(1, 51.0) ** -zipf
    for key in ids.keys():  # noqa: SIM118, a KeyedJaggedTensor is no mapping
        counts = ids[key].values().bincount(minlength=world.data.tables[key].num_embeddings).numpy()
        np.testing.assert_allclose(counts / 40_000, share / share.sum(), atol=0.012)


def test_parts_have_their_strengths_and_are_uncorrelated() -> None:
    strengths = Strengths(main=0.5, pairwise=0.8, linear=0.3, crossed=0.6, deep=0.4)
    world = IdWorld(4, strengths=strengths, zipf=0.7)
    parts = world.parts(world.rows(60_000, stream=0)).double().numpy()
    for hop in range(2):
        np.testing.assert_allclose(parts[:, hop].std(0), [getattr(strengths, name) for name in PARTS], rtol=0.03)
        np.testing.assert_allclose(parts[:, hop].mean(0), 0, atol=0.03)
        np.testing.assert_allclose(np.corrcoef(parts[:, hop].T), np.eye(5), atol=0.03)
    for place in range(5):
        assert np.corrcoef(parts[:, 0, place], parts[:, 1, place])[0, 1] == pytest.approx(0.6, abs=0.03)


def test_pairwise_part_is_the_sum_over_pairs() -> None:
    world = IdWorld(1, num_ids=7)
    inputs = id_rows(torch.randint(7, (30, NUM_FIELDS), generator=torch.Generator().manual_seed(0)).tolist())
    ids, function = inputs.sparse_features.values().view(NUM_FIELDS, -1).T, world.functions[0]
    found = world.parts(inputs)[:, 0, 1]
    for row in range(30):
        vectors = [function.table[f, ids[row, f], 1:] for f in range(NUM_FIELDS)]
        total = sum(float(a @ b) for a, b in combinations(vectors, 2))
        expected = (total - float(world.mean[0, 1])) * float(world.unmix[1, 0, 0])
        assert found[row].item() == pytest.approx(expected, abs=1e-4)


def test_two_ids_interact_only_in_the_pairwise_part() -> None:
    square = id_rows([[a, b] + [0] * (NUM_FIELDS - 2) for a in (1, 2) for b in (3, 4)])
    for pairwise in (0.0, 0.7):
        parts = IdWorld(0, strengths=Strengths(pairwise=pairwise)).parts(square)[:, 0].double()
        contrast = parts[0] - parts[1] - parts[2] + parts[3]
        assert contrast[[0, 2, 3, 4]].abs().max() < 1e-5
        assert (contrast[1].abs() > 0.05) == (pairwise > 0)


def test_nothing_additive_explains_the_pairwise_part() -> None:
    world = IdWorld(2, num_ids=10, zipf=1.0)
    rows = world.rows(20_000, stream=0)
    one_hot = OneHotEncoder().fit_transform(rows.sparse_features.values().view(NUM_FIELDS, -1).T.numpy())
    main, pairwise = world.parts(rows)[:, 0, :2].T.double().numpy()
    assert LinearRegression().fit(one_hot, main).score(one_hot, main) > 0.999
    assert LinearRegression().fit(one_hot, pairwise).score(one_hot, pairwise) < 0.03


def test_a_linear_feature_counts_more_or_less_with_the_deep_ones() -> None:
    world = IdWorld(0)
    rows = world.rows(2, stream=0)
    rows.sparse_features = id_rows([[0] * NUM_FIELDS] * 2).sparse_features

    def slope() -> torch.Tensor:
        start = world.parts(rows)[:, 0]
        rows.dense[:, 0] += 1
        return world.parts(rows)[:, 0] - start

    change = slope()
    torch.testing.assert_close(change[0, 2], change[1, 2])
    assert (change[0, 3] - change[1, 3]).abs() > 0.01 and (change[:, [0, 1, 4]].abs() < 1e-5).all()
    torch.testing.assert_close(slope(), change)


def test_derived_linear_features_tell_nothing_new() -> None:
    dense = IdWorld(0, derived=True).rows(20_000, stream=0).dense.double().numpy()
    linear, deep = dense[:, :NUM_LINEAR], dense[:, NUM_LINEAR:]
    assert LinearRegression().fit(deep, linear).score(deep, linear) > 0.999999
    np.testing.assert_allclose(np.cov(linear.T), np.eye(NUM_LINEAR), atol=0.05)
    dense = IdWorld(0).rows(20_000, stream=0).dense.numpy()
    assert LinearRegression().fit(dense[:, NUM_LINEAR:], dense[:, 0]).score(dense[:, NUM_LINEAR:], dense[:, 0]) < 0.01


# ---- histories


def test_histories_of_the_same_mean_differ_in_relevance() -> None:
    world = HistoryWorld(0)
    east, west, north, south = 0, 1, 2, 3
    world.positions[:4, :] = 0
    world.positions[:4, :2] = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    along, across = histories([east, east], [[east, west], [north, south]]), [[east, west], [north, south]]
    means = [world.positions[ids].mean(dim=0) for ids in across]
    torch.testing.assert_close(means[0], means[1])
    chances = world.step_truth(along)[:, 0]
    assert chances[0] > chances[1] + 0.1
    # and it is the candidate that makes the difference
    turned = world.step_truth(histories([north, north], across))[:, 0]
    assert turned[1] > turned[0] + 0.1


def test_relevance_is_that_of_loops() -> None:
    for dependent in (True, False):
        world = HistoryWorld(1, candidate_dependent=dependent)
        ids = world.rows(200, stream=0).sparse_features
        item = ids["item"].values()
        found = world.relevance(item, ids["history"])
        for row, history in enumerate(ids["history"].to_dense()):
            places = world.positions[history].double()
            near = places @ (world.positions[item[row]] if dependent else world.direction).double()
            expected = 0.0 if not len(near) else near.max() if dependent else near.mean()
            assert found[row].item() == pytest.approx(float(expected), abs=1e-5)


def test_the_control_knows_no_candidate() -> None:
    strengths = HistoryStrengths(item=0.0)
    world = HistoryWorld(0, candidate_dependent=False, strengths=strengths)
    chances = world.step_truth(histories([7, 50, 93], [[3, 4, 60]] * 3))
    torch.testing.assert_close(chances[0], chances[1])
    near = HistoryWorld(0, strengths=strengths).step_truth(histories([3, 50], [[3, 4, 60]] * 2))
    assert near[0, 0] > near[1, 0] + 0.05


def test_histories_have_the_lengths_asked_for() -> None:
    world = HistoryWorld(0, max_length=5, empty=0.25)
    rows = world.rows(40_000, stream=0)
    lengths = rows.sparse_features["history"].lengths()
    np.testing.assert_allclose(lengths.bincount().numpy() / 40_000, [0.25] + [0.15] * 5, atol=0.012)
    features = world.data.features
    assert features["history"].max_length == 5 and world.data.table_of("history") == world.data.table_of("item")
    assert rows.sparse_features.keys() == list(world.data.sparse_features) == ["item", "history", "segment"]
    for key in ("item", "history", "segment"):
        values = rows.sparse_features[key].values()
        assert values.min() >= 0 and values.max() == world.data.tables[world.data.table_of(key)].num_embeddings - 1
    logits = torch.logit(world.step_truth(rows)[lengths == 0, 0])
    assert logits.std() == pytest.approx(np.hypot(0.3, 0.3), rel=0.3)  # items and segments alone


@pytest.mark.parametrize("wrong", [{"empty": 1.5}, {"max_length": 0}])
def test_bad_histories_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} of a HistoryWorld is"):
        HistoryWorld(0, **wrong)
