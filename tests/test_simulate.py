"""The simulated log against what it promises: its bytes, its files, its columns, its command line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from rec import market as world
from rec import population
from rec import simulate as sim
from rec.market import Market
from rec.population import MarketConfig
from rec.schema import ConfigError, DataConfig, FeatureKind
from rec.simulate import simulate

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


def test_writers_hold_two_chunks_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a slice without rows keeps its whole table alive, so memory would grow with the log."""
    held: list[int] = []
    write = sim.SplitWriter.write

    def spy(self: sim.SplitWriter, table: pa.Table) -> None:
        write(self, table)
        held.append(self._pending.get_total_buffer_size())

    monkeypatch.setattr(sim.SplitWriter, "write", spy)
    simulate(tmp_path / "market", rows=12 * world.CHUNK_ROWS, seed=0, market=SMALL)
    chunk = next(sim.chunks(Market(SMALL, seed=0))).get_total_buffer_size()
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
    sizes = ["--users", "50", "--queries", "50", "--listings", "500"]
    arguments = ["--out", str(tmp_path / "m"), "--rows", "4000", *sizes]
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
    others = {"timestamp", "dwell_seconds", *world.TASKS, *(f"true_{task}" for task in world.TASKS)}
    assert described | others == set(schema.names)
    assert market.domain is not None
    assert market.domain.names == [p.name for p in world.PLACEMENTS]
    assert list(market.splits) == list(sim.SPLITS)
    assert market.group in schema.names


def test_yaml_tables_are_the_sizes_of_the_default_market(market: DataConfig) -> None:
    sizes = {name: table.num_embeddings for name, table in market.tables.items()}
    for name, size in vars(MarketConfig()).items():
        table = {"queries": "query"}.get(name.removeprefix("num_"), name.removeprefix("num_").removesuffix("s"))
        assert sizes.pop(table) == size
    assert sizes == {
        "query_category": population.NUM_CATEGORIES,
        "listing_category": population.NUM_CATEGORIES,
        "country": population.NUM_COUNTRIES,
        "device": population.NUM_DEVICES,
        "hour": 24,
        "weekday": 7,
        "price_band": population.NUM_PRICE_BANDS,
        "user_segment": len(population.SEGMENTS),
        "placement": len(world.PLACEMENTS),
    }


def test_ids_fit_the_tables(log: pa.Table, market: DataConfig) -> None:
    for name in market.sparse_features:
        if name in sim.CATEGORICALS:
            ids = log[name].to_numpy()
            assert 0 <= ids.min() <= ids.max() < market.tables[market.table_of(name)].num_embeddings
    for name, size in (("user_id", 800), ("query_id", 500), ("listing_id", 3_000), ("shop_id", 100)):
        ids = log[name].to_numpy()
        assert 0 <= ids.min() <= ids.max() < size
