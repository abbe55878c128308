import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rec.id_world import HistoryWorld
from rec.schema import ConfigError
from rec.worlds import (
    LABELS,
    NUM_INPUTS,
    NUM_SEGMENTS,
    PLACEMENTS,
    SEGMENT_SCALE,
    SegmentWorld,
    TaskPair,
    World,
    take,
    take_ids,
)

ALL = list(LABELS)


def in_segment(inputs: torch.Tensor, segment: int) -> torch.Tensor:
    one_hot = torch.zeros(len(inputs), NUM_SEGMENTS)
    one_hot[:, segment % NUM_SEGMENTS] = SEGMENT_SCALE
    return torch.cat([inputs, one_hot], dim=1)


@pytest.mark.parametrize("world", [SegmentWorld(3, tasks=ALL), TaskPair(3, p=0.5)], ids=["segments", "pair"])
def test_rows_are_a_function_of_seed_and_stream(world: World) -> None:
    again = type(world)(3, **({"tasks": ALL} if isinstance(world, SegmentWorld) else {"p": 0.5}))
    for a, b in zip(world.batches(3, batch_size=50), again.batches(3, batch_size=50), strict=True):
        for name in ("dense", "labels", "weights", "domain_id", "row_id", "draws"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    other = world.rows(50, stream=1)
    assert not torch.equal(other.dense, world.rows(50, stream=0).dense)


def test_batches_continue_each_other() -> None:
    batches = list(SegmentWorld(0).batches(5, batch_size=3000))  # two to a block, the last block of one
    assert torch.equal(torch.cat([batch.row_id for batch in batches]), torch.arange(15_000))
    assert all(batch.num_rows == len(batch.dense) == batch.sparse_features.stride() == 3000 for batch in batches)
    assert len(torch.unique(torch.cat([batch.dense[:, 0] for batch in batches]))) == 15_000
    steps = [batch.draws[:, 1].unique() for batch in batches]
    assert all(len(step) == 1 for step in steps) and len(torch.cat(steps).unique()) == 5
    assert len(torch.cat([batch.draws[:, 0] for batch in batches]).unique()) == 15_000


def test_taken_rows_are_the_rows() -> None:
    rows = SegmentWorld(0).rows(10, stream=0)
    taken = take(rows, torch.tensor([7, 2]))
    assert taken.num_rows == taken.sparse_features.stride() == 2
    assert torch.equal(taken.dense, rows.dense[[7, 2]]) and taken.row_id.tolist() == [7, 2]


def test_taken_ids_are_the_rows_ids() -> None:
    lists = {"a": [[5], [], [6, 7], [8]], "b": [[], [1, 2, 3], [4], []], "c": [[9], [9], [9], [10]]}
    flat = [ids for rows in lists.values() for ids in rows]
    every = KeyedJaggedTensor(
        keys=list(lists),
        values=torch.tensor([i for ids in flat for i in ids]),
        lengths=torch.tensor([len(ids) for ids in flat], dtype=torch.int32),
    )
    for rows in ([2, 0, 0, 3], [1], []):
        taken = take_ids(every, torch.tensor(rows, dtype=torch.int64))
        assert taken.keys() == list(lists) and taken.stride() == len(rows)
        for key, of_key in lists.items():
            assert [ids.tolist() for ids in taken[key].to_dense()] == [of_key[row] for row in rows]


def test_batches_of_a_world_with_ids_are_its_rows() -> None:
    rows, start = HistoryWorld(0).rows(600, stream=0), 0
    for low, high in ((0, 200), (550, 600)):
        batch = take(rows, slice(low, high))
        assert batch.num_rows == high - low and torch.equal(batch.labels, rows.labels[low:high])
    for batch in HistoryWorld(0).batches(3, batch_size=200):
        histories = rows.sparse_features["history"].to_dense()[start : start + 200]
        assert [i.tolist() for i in batch.sparse_features["history"].to_dense()] == [i.tolist() for i in histories]
        assert torch.equal(batch.row_id, rows.row_id[start : start + 200]) and batch.dense.shape == (200, 0)
        torch.testing.assert_close(batch.truth, rows.truth[start : start + 200])
        start += 200


def test_purchases_follow_the_next_segment_s_clicks() -> None:
    world, inputs = SegmentWorld(5), torch.randn(40, NUM_INPUTS, generator=torch.Generator().manual_seed(9))
    for segment in range(NUM_SEGMENTS):
        purchase = world.latents(in_segment(inputs, segment))[:, 1]
        click = world.latents(in_segment(inputs, segment + 1))[:, 0]
        torch.testing.assert_close(purchase, click)


@pytest.mark.parametrize("seed", [0, 1])
def test_latents_have_the_correlations_that_were_asked_for(seed: int) -> None:
    world, inputs = (
        SegmentWorld(seed, tasks=ALL),
        torch.randn(100_000, NUM_INPUTS, generator=torch.Generator().manual_seed(9)),
    )
    for segment in range(NUM_SEGMENTS):
        latents = world.latents(in_segment(inputs, segment)).numpy().astype(np.float64)
        np.testing.assert_allclose(latents.mean(0), 0, atol=0.03)
        np.testing.assert_allclose(latents.std(0), 1, atol=0.03)
        correlation = np.corrcoef(latents.T)
        expected = [0, 1, 0.9, 0, -0.6]  # with the purchase
        np.testing.assert_allclose(correlation[1], expected, atol=0.03)


def test_labels_are_drawn_from_the_truth() -> None:
    rows = SegmentWorld(2, tasks=ALL).rows(200_000, stream=1)
    labels, truth, click = rows.labels.double(), rows.truth.double(), rows.labels[:, 0] > 0
    assert torch.equal(rows.weights[:, 0], torch.ones(200_000))
    for t in range(1, len(ALL)):
        assert torch.equal(rows.weights[:, t], click.float()) and not labels[~click, t].any()
    for t in range(len(ALL)):
        counted = rows.weights[:, t] > 0
        for third in truth[counted, t].argsort().chunk(3):  # rare, middling and frequent rows
            y, p = labels[counted, t][third], truth[counted, t][third]
            assert abs((y - p).sum()) < 4.5 * (p * (1 - p)).sum().sqrt()


def test_rates_are_those_asked_for() -> None:
    rows = SegmentWorld(1, rates={"click": 0.05, "purchase": 0.035}).rows(200_000, stream=0)
    click, purchase = rows.truth.double().T
    assert click.mean().item() == pytest.approx(0.05, rel=0.03)
    assert ((click * purchase).sum() / click.sum()).item() == pytest.approx(0.035, rel=0.05)
    usual = SegmentWorld(1).rows(200_000, stream=0).labels.mean(0)
    assert 4 < usual[0] / usual[1] < 6


def test_a_further_task_leaves_rows_and_labels_of_the_others_alone() -> None:
    few = SegmentWorld(4).rows(1000, stream=0)
    for task in ("add_to_cart", "favourite", "anti_favourite"):
        world = SegmentWorld(4, tasks=("click", "purchase", task), loss_weights={task: 0.3})
        more = world.rows(1000, stream=0)
        assert torch.equal(more.dense, few.dense) and torch.equal(more.labels[:, :2], few.labels)
        torch.testing.assert_close(more.truth[:, :2], few.truth)
        assert world.data.tasks[task].loss_weight == 0.3 and world.data.tasks[task].auxiliary


def test_placements_bend_the_logits_and_share_the_traffic() -> None:
    world, plain = SegmentWorld(6, placements=PLACEMENTS), SegmentWorld(6)
    rows = world.rows(50_000, stream=0)
    assert world.data.domains == list(PLACEMENTS) and rows.dense.shape[1] == plain.rows(1, stream=0).dense.shape[1]
    for place, placement in enumerate(PLACEMENTS.values()):
        here = rows.domain_id == place
        assert here.double().mean().item() == pytest.approx(placement.share, abs=0.01)
        z = plain.logits(rows.dense[here], torch.zeros(int(here.sum()), dtype=torch.int64))
        torch.testing.assert_close(rows.truth[here], torch.sigmoid(placement.slope * z + placement.offset))


def test_bad_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="'purchse'; did you mean 'purchase'"):
        SegmentWorld(0, tasks=("click", "purchse"))
    with pytest.raises(ConfigError, match="expected click first"):
        SegmentWorld(0, tasks=("purchase", "click"))


@pytest.mark.parametrize("p", [1.0, 0.9, 0.5, 0.0, -1.0])
def test_weights_of_a_pair_are_unit_vectors_of_cosine_p(p: float) -> None:
    w = TaskPair(0, p=p).weights.double()
    torch.testing.assert_close(w.T @ w, torch.tensor([[1, p], [p, 1]], dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_pair_s_labels_are_the_paper_s_sum() -> None:
    world = TaskPair(1, p=0.3, num_inputs=7, num_sines=3)
    rows = world.rows(20_000, stream=0)
    for b in range(20):
        for k in range(2):
            linear = sum(float(world.weights[i, k] * rows.dense[b, i]) for i in range(7))
            sines = sum(np.sin(float(world.alpha[i]) * linear + float(world.beta[i])) for i in range(3))
            assert world.signal(rows.dense)[b, k].item() == pytest.approx(linear + sines, abs=1e-5)
    noise = (rows.labels - world.signal(rows.dense)).numpy()
    np.testing.assert_allclose(noise.std(0), 0.1, rtol=0.03)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.03


def test_labels_of_a_pair_correlate_as_published() -> None:
    # the figures of p = .9 and .5 depend on alpha and beta, which are drawn anew in every world
    for p, expected, tolerance in ((1.0, 0.995, 0.01), (0.9, 0.784, 0.08), (0.5, 0.284, 0.08), (0.0, 0.0, 0.02)):
        labels = [TaskPair(seed, p=p).rows(5000, stream=0).labels.T.numpy() for seed in range(20)]
        assert np.mean([np.corrcoef(y)[0, 1] for y in labels]) == pytest.approx(expected, abs=tolerance)
