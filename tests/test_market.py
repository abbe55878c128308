"""The simulated world against what it promises: its truth, its tasks' conflicts, its histories. The log is in memory."""

from collections import defaultdict, deque
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest

from rec.market import CHUNK_ROWS, PAGE, TASKS, Clock, Market
from rec.population import HISTORY_LENGTH, SEGMENTS, TEXT_SIZE, History, MarketConfig
from rec.simulate import chunks

SMALL = MarketConfig(
    num_users=800, num_queries=500, num_listings=3_000, num_shops=100, num_query_tokens=400, num_listing_tags=300
)
ROWS = 10 * CHUNK_ROWS


@pytest.fixture(scope="module")
def log() -> pa.Table:
    return pa.concat_tables(islice(chunks(Market(SMALL, seed=0)), ROWS // CHUNK_ROWS))


@pytest.fixture(scope="module")
def columns(log: pa.Table) -> dict[str, np.ndarray]:
    flat = [f.name for f in log.schema if not pa.types.is_nested(f.type)]
    return {name: log[name].to_numpy() for name in flat}


def test_time_is_strictly_ordered_and_follows_the_clock(columns: dict[str, np.ndarray]) -> None:
    time = columns["timestamp"]
    assert (np.diff(time) > 0).all()
    moments = time.astype("datetime64[ms]")
    np.testing.assert_array_equal(columns["hour"], moments.astype("datetime64[h]").astype(int) % 24)
    np.testing.assert_array_equal(columns["weekday"], (moments.astype("datetime64[D]").astype(int) + 3) % 7)
    by_hour = np.bincount(columns["hour"], minlength=24)
    assert by_hour[18:22].mean() > 4 * by_hour[1:5].mean()


def test_requests_share_user_query_and_placement_and_repeat_few_listings(columns: dict[str, np.ndarray]) -> None:
    for name in ("user_id", "query_id", "placement", "device"):
        page = columns[name].reshape(-1, PAGE)
        assert (page == page[:, :1]).all()
    listings = np.sort(columns["listing_id"].reshape(-1, PAGE), axis=1)
    assert (listings[:, 1:] == listings[:, :-1]).any(axis=1).mean() < 0.15  # from 3,000; 100,000 repeat far less
    same = columns["listing_category"] == columns["query_category"]
    assert same.mean() > 0.7


def test_what_belongs_to_an_id_never_changes(columns: dict[str, np.ndarray], log: pa.Table) -> None:
    _, first, inverse = np.unique(columns["listing_id"], return_index=True, return_inverse=True)
    for name in ("shop_id", "listing_category", "price", "rating", "historical_ctr", "price_band"):
        np.testing.assert_array_equal(columns[name], columns[name][first][inverse])
    text = log["listing_text"].combine_chunks().flatten().to_numpy().reshape(-1, TEXT_SIZE)
    np.testing.assert_array_equal(text, text[first][inverse])
    bags: dict[int, list[int]] = {}
    for query, tokens in zip(log["query_id"].to_pylist(), log["query_tokens"].to_pylist(), strict=True):
        assert bags.setdefault(query, tokens) == tokens
    lengths = [len(bag) for bag in bags.values()]
    assert 2.7 < np.mean(lengths) < 3.3
    assert min(lengths) == 0


def test_base_rates(columns: dict[str, np.ndarray]) -> None:
    click = columns["click"] > 0
    assert 0.08 < click.mean() < 0.12
    assert 0.10 < columns["add_to_cart"][click].mean() < 0.15
    assert 0.05 < columns["favourite"][click].mean() < 0.08
    assert 0.035 < columns["purchase"][click].mean() < 0.065
    assert columns["add_to_cart"][columns["purchase"] > 0].mean() > 0.7


def test_nothing_follows_where_nobody_clicked(columns: dict[str, np.ndarray]) -> None:
    click = columns["click"] > 0
    for name in ("add_to_cart", "favourite", "purchase", "dwell_seconds"):
        assert (columns[name][~click] == 0).all()
    assert (columns["dwell_seconds"][click] > 0).all()
    assert all(set(np.unique(columns[task])) == {0, 1} for task in TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_truth_is_the_probability_of_the_label(columns: dict[str, np.ndarray], task: str) -> None:
    rows = np.ones(ROWS, bool) if task == "click" else columns["click"] > 0
    truth, label = columns[f"true_{task}"][rows].astype(float), columns[task][rows]
    assert 0 < truth.min() < truth.max() < 1
    cells = {f"placement {p}": columns["placement"][rows] == p for p in range(4)}
    decile = np.argsort(np.argsort(truth)) * 10 // len(truth)
    cells |= {f"decile {d}": decile == d for d in range(10)}
    for name, cell in cells.items():
        surprise = (label[cell] - truth[cell]).sum() / np.sqrt((truth[cell] * (1 - truth[cell])).sum())
        assert abs(surprise) < 4, f"{task}, {name}: {surprise:.1f} standard deviations"


def test_auc_of_the_truth_leaves_room_to_learn_and_noise_to_bear(columns: dict[str, np.ndarray]) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    for task in TASKS:
        rows = np.ones(ROWS, bool) if task == "click" else columns["click"] > 0
        auc = sklearn_metrics.roc_auc_score(columns[task][rows], columns[f"true_{task}"][rows])
        assert 0.74 < auc < 0.87, f"{task}: {auc}"


def test_segments_conflict_between_click_and_purchase(columns: dict[str, np.ndarray]) -> None:
    def slope(task: str, feature: str) -> float:
        hunters = columns["user_segment"] == SEGMENTS.index("bargain_hunter")
        truth = columns[f"true_{task}"][hunters].astype(float)
        return np.polyfit(columns[feature][hunters], np.log(truth / (1 - truth)), 1)[0]

    assert slope("click", "discount") > 0.3 > slope("purchase", "discount")
    assert slope("purchase", "rating") > 0.3 > slope("click", "rating")


def test_history_is_the_users_clicks_before_the_chunk(log: pa.Table) -> None:
    past: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=HISTORY_LENGTH))
    waiting: list[tuple[int, int]] = []
    names = ("user_id", "listing_id", "click", "recent_listings")
    longest = 0
    for i, (user, listing, click, recent) in enumerate(zip(*(log[n].to_pylist() for n in names), strict=True)):
        if i % CHUNK_ROWS == 0:
            for clicker, clicked in waiting:
                past[clicker].append(clicked)
            waiting = []
        assert recent == list(past[user])
        longest = max(longest, len(recent))
        if click:
            waiting.append((user, listing))
    assert longest == HISTORY_LENGTH


def test_taste_shows(columns: dict[str, np.ndarray], log: pa.Table) -> None:
    """A listing like one of the recent clicks is likelier to be clicked, by the columns alone."""
    text = np.zeros((SMALL.num_listings, TEXT_SIZE))
    text[columns["listing_id"]] = log["listing_text"].combine_chunks().flatten().to_numpy().reshape(-1, TEXT_SIZE)
    text /= np.linalg.norm(text, axis=1, keepdims=True) + 1e-9
    late = log.slice(ROWS - 20_000)
    truth, listings = late["true_click"].to_numpy(), late["listing_id"].to_numpy()
    recents = late["recent_listings"].to_pylist()
    nearest = [max(text[r] @ text[x], default=np.nan) for r, x in zip(recents, listings, strict=True)]
    known = ~np.isnan(nearest)
    assert np.corrcoef(np.array(nearest)[known], np.log(truth[known]))[0, 1] > 0.15


def test_world_depends_on_the_seed_and_shows_every_placement() -> None:
    worlds = [Market(SMALL, seed=seed) for seed in (0, 0, 1)]
    shown = [w.show(np.random.default_rng(5), Clock(), History(SMALL.num_users)) for w in worlds]
    scores = [w.score(s).tasks for w, s in zip(worlds, shown, strict=True)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert np.abs(scores[0] - scores[2]).mean() > 0.5
    assert scores[0].shape == (CHUNK_ROWS, len(TASKS))
    assert set(np.unique(shown[0].placement)) == {0, 1, 2, 3}
