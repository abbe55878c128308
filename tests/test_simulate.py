"""The simulated log against what it promises: its bytes, its world, its labels' truth, its histories."""

import json
from collections import defaultdict, deque
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from rec import simulate as sim
from rec.schema import ConfigError, DataConfig, FeatureKind
from rec.simulate import MarketConfig, simulate

SMALL = MarketConfig(
    num_users=800, num_queries=500, num_listings=3_000, num_shops=100, num_query_tokens=400, num_listing_tags=300
)
ROWS = 160_000
YAML = Path(__file__).resolve().parents[1] / "conf" / "data" / "market.yaml"


def read(folder: Path) -> pa.Table:
    files = [file for split in sim.SPLITS for file in sorted((folder / split).glob("*.parquet"))]
    return pa.concat_tables([pq.read_table(file) for file in files])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulate") / "market"
    assert simulate(out, rows=ROWS, seed=0, market=SMALL)
    return out


@pytest.fixture(scope="module")
def log(folder: Path) -> pa.Table:
    return read(folder)


@pytest.fixture(scope="module")
def columns(log: pa.Table) -> dict[str, np.ndarray]:
    flat = [f.name for f in log.schema if not pa.types.is_nested(f.type)]
    return {name: log[name].to_numpy() for name in flat}


def test_same_arguments_same_bytes_and_another_seed_other_rows(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        simulate(tmp_path / name, rows=20_000, seed=seed, market=SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    a, c = read(tmp_path / "a"), read(tmp_path / "c")
    assert not a["listing_id"].equals(c["listing_id"])
    assert not a["listing_text"].equals(c["listing_text"])


def test_longer_log_begins_with_the_shorter_one(log: pa.Table, tmp_path: Path) -> None:
    simulate(tmp_path / "short", rows=20_002, seed=0, market=SMALL)
    short = read(tmp_path / "short")
    assert short.num_rows == 20_002
    assert short.equals(log.slice(0, 20_002))


def test_splits_files_and_row_groups(folder: Path, log: pa.Table) -> None:
    rows = {split: sum(pq.read_metadata(f).num_rows for f in (folder / split).iterdir()) for split in sim.SPLITS}
    assert rows == {"train": 128_000, "valid": 16_000, "test": 16_000}
    train = [pq.read_metadata(f) for f in sorted((folder / "train").iterdir())]
    groups = [file.row_group(i).num_rows for file in train for i in range(file.num_row_groups)]
    assert groups == [16_384] * 7 + [13_312]
    assert [file.num_row_groups for file in train] == [4, 4]
    assert log.num_rows == ROWS
    assert sum(column.null_count for column in log.columns) == 0


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
        page = columns[name].reshape(-1, sim.PAGE)
        assert (page == page[:, :1]).all()
    listings = np.sort(columns["listing_id"].reshape(-1, sim.PAGE), axis=1)
    assert (listings[:, 1:] == listings[:, :-1]).any(axis=1).mean() < 0.15  # from 3,000; 100,000 repeat far less
    same = columns["listing_category"] == columns["query_category"]
    assert same.mean() > 0.7


def test_what_belongs_to_an_id_never_changes(columns: dict[str, np.ndarray], log: pa.Table) -> None:
    _, first, inverse = np.unique(columns["listing_id"], return_index=True, return_inverse=True)
    for name in ("shop_id", "listing_category", "price", "rating", "historical_ctr", "price_band"):
        np.testing.assert_array_equal(columns[name], columns[name][first][inverse])
    text = log["listing_text"].combine_chunks().flatten().to_numpy().reshape(-1, 16)
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
    assert all(set(np.unique(columns[task])) == {0, 1} for task in sim.TASKS)


@pytest.mark.parametrize("task", sim.TASKS)
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
    for task in sim.TASKS:
        rows = np.ones(ROWS, bool) if task == "click" else columns["click"] > 0
        auc = sklearn_metrics.roc_auc_score(columns[task][rows], columns[f"true_{task}"][rows])
        assert 0.74 < auc < 0.87, f"{task}: {auc}"


def test_segments_conflict_between_click_and_purchase(columns: dict[str, np.ndarray]) -> None:
    def slope(task: str, feature: str) -> float:
        hunters = columns["user_segment"] == sim.SEGMENTS.index("bargain_hunter")
        truth = columns[f"true_{task}"][hunters].astype(float)
        return np.polyfit(columns[feature][hunters], np.log(truth / (1 - truth)), 1)[0]

    assert slope("click", "discount") > 0.3 > slope("purchase", "discount")
    assert slope("purchase", "rating") > 0.3 > slope("click", "rating")


def test_history_is_the_users_clicks_before_the_chunk(log: pa.Table) -> None:
    past: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=sim.HISTORY_LENGTH))
    waiting: list[tuple[int, int]] = []
    names = ("user_id", "listing_id", "click", "recent_listings")
    longest = 0
    for i, (user, listing, click, recent) in enumerate(zip(*(log[n].to_pylist() for n in names), strict=True)):
        if i % sim.CHUNK_ROWS == 0:
            for clicker, clicked in waiting:
                past[clicker].append(clicked)
            waiting = []
        assert recent == list(past[user])
        longest = max(longest, len(recent))
        if click:
            waiting.append((user, listing))
    assert longest == sim.HISTORY_LENGTH


def test_taste_shows(columns: dict[str, np.ndarray], log: pa.Table) -> None:
    """A listing like one of the recent clicks is likelier to be clicked, by the columns alone."""
    text = np.zeros((SMALL.num_listings, 16))
    text[columns["listing_id"]] = log["listing_text"].combine_chunks().flatten().to_numpy().reshape(-1, 16)
    text /= np.linalg.norm(text, axis=1, keepdims=True) + 1e-9
    late = log.slice(ROWS - 20_000)
    truth, listings = late["true_click"].to_numpy(), late["listing_id"].to_numpy()
    recents = late["recent_listings"].to_pylist()
    nearest = [max(text[r] @ text[x], default=np.nan) for r, x in zip(recents, listings, strict=True)]
    known = ~np.isnan(nearest)
    assert np.corrcoef(np.array(nearest)[known], np.log(truth[known]))[0, 1] > 0.15


def test_history_append_equals_deques() -> None:
    rng = np.random.default_rng(0)
    history, expected = sim.History(7), [deque(maxlen=sim.HISTORY_LENGTH) for _ in range(7)]
    for size in (0, 5, 200, 1, 30):
        users, listings = rng.integers(7, size=size), rng.integers(1000, size=size)
        history.append(users, listings)
        for user, listing in zip(users, listings, strict=True):
            expected[user].append(listing)
        assert sim.as_lists(history.of(np.arange(7))).to_pylist() == [list(e) for e in expected]


def test_zipf_sampler_draws_in_proportion_and_within_groups() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(3, size=30)
    sampler = sim.ZipfSampler(rng, group)
    ids = sampler.draw_any(rng, 300_000)
    np.testing.assert_allclose(
        np.bincount(ids, minlength=30) / 300_000, sampler.weights / sampler.weights.sum(), atol=3e-3
    )
    wanted = rng.integers(3, size=1000)
    drawn = sampler.draw(rng.random(1000), group=wanted, anywhere=np.zeros(1000, bool))
    np.testing.assert_array_equal(group[drawn], wanted)


def test_writers_hold_two_chunks_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a slice without rows keeps its whole table alive, so memory would grow with the log."""
    held: list[int] = []
    write = sim.SplitWriter.write

    def spy(self: sim.SplitWriter, table: pa.Table) -> None:
        write(self, table)
        held.append(self._pending.get_total_buffer_size())

    monkeypatch.setattr(sim.SplitWriter, "write", spy)
    simulate(tmp_path / "market", rows=12 * sim.CHUNK_ROWS, seed=0, market=SMALL)
    chunk = next(sim.Market(SMALL, seed=0).chunks()).get_total_buffer_size()
    assert max(held) < 2.2 * chunk


def test_finished_folder_is_reused_and_another_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "market"
    out.mkdir()  # an empty folder is no log
    assert simulate(out, rows=4_000, seed=0, market=SMALL)
    before = contents(out)
    assert not simulate(out, rows=4_000, seed=0, market=SMALL)
    with pytest.raises(ConfigError, match=r"rows=4000 \(asked for 5000\)"):
        simulate(out, rows=5_000, seed=0, market=SMALL)
    (out / "simulation.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        simulate(out, rows=4_000, seed=0, market=SMALL)
    (out / "simulation.json").unlink()
    with pytest.raises(ConfigError, match=r"no simulation\.json"):
        simulate(out, rows=4_000, seed=0, market=SMALL)
    assert {k: v for k, v in before.items() if k.endswith("parquet")} == contents(out)


def test_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: sim.SplitWriter) -> None:
        assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
        raise KeyboardInterrupt

    monkeypatch.setattr(sim.SplitWriter, "close", fail)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "market", rows=4_000, seed=0, market=SMALL)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--out",
        str(tmp_path / "m"),
        "--rows",
        "4000",
        "--users",
        "50",
        "--queries",
        "50",
        "--listings",
        "500",
    ]
    assert sim.main(arguments) == 0
    assert "wrote 4,000 rows" in capsys.readouterr().out
    assert sim.main(arguments) == 0
    assert "already holds" in capsys.readouterr().out
    assert json.loads((tmp_path / "m" / "simulation.json").read_text())["num_users"] == 50
    assert sim.main([*arguments, "--seed", "1"]) == 2
    assert "seed=0 (asked for 1)" in capsys.readouterr().err
    assert sim.main(["--out", str(tmp_path / "n"), "--users", "0"]) == 2
    assert "num_users is 0" in capsys.readouterr().err
    assert sim.main(["--out", str(tmp_path / "n"), "--rows", "3"]) == 2
    assert "rows is 3" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


@pytest.fixture(scope="module")
def market() -> DataConfig:
    values = OmegaConf.load(YAML)
    assert values.pop("defaults") == ["base", "_self_"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), values))
    assert isinstance(config, DataConfig)
    return config


def test_yaml_describes_every_column(market: DataConfig) -> None:
    types = {
        FeatureKind.id: pa.int64(),
        FeatureKind.bag: pa.list_(pa.int64()),
        FeatureKind.sequence: pa.list_(pa.int64()),
        FeatureKind.dense: pa.float32(),
    }
    schema = sim.SCHEMA
    for name, feature in market.features.items():
        expected = types.get(feature.kind) or pa.list_(pa.float32(), feature.size)
        assert schema.field(market.column_of(name)).type == expected, name
    for task in market.tasks.values():
        assert schema.field(task.label).type == pa.int8()
        assert task.truth is not None
        assert schema.field(task.truth).type == pa.float32()
    described = {market.column_of(name) for name in market.features}
    others = {"timestamp", "dwell_seconds", *sim.TASKS, *(f"true_{task}" for task in sim.TASKS)}
    assert described | others == set(schema.names)
    assert market.domain is not None
    assert market.domain.names == [p.name for p in sim.PLACEMENTS]
    assert list(market.splits) == list(sim.SPLITS)
    assert market.group in schema.names


def test_yaml_tables_are_the_sizes_of_the_default_market(market: DataConfig) -> None:
    sizes = {name: table.num_embeddings for name, table in market.tables.items()}
    for name, size in vars(MarketConfig()).items():
        table = {"queries": "query"}.get(name.removeprefix("num_"), name.removeprefix("num_").removesuffix("s"))
        assert sizes.pop(table) == size
    assert sizes == {
        "query_category": sim.NUM_CATEGORIES,
        "listing_category": sim.NUM_CATEGORIES,
        "country": sim.NUM_COUNTRIES,
        "device": sim.NUM_DEVICES,
        "hour": 24,
        "weekday": 7,
        "price_band": sim.NUM_PRICE_BANDS,
        "user_segment": len(sim.SEGMENTS),
        "placement": len(sim.PLACEMENTS),
    }


def test_ids_fit_the_tables(columns: dict[str, np.ndarray], market: DataConfig) -> None:
    for name in market.sparse_features:
        if name in columns and not name.endswith("_id"):
            assert columns[name].min() >= 0
            assert columns[name].max() < market.tables[market.table_of(name)].num_embeddings
    for name, size in (("user_id", 800), ("query_id", 500), ("listing_id", 3_000), ("shop_id", 100)):
        assert 0 <= columns[name].min() <= columns[name].max() < size
