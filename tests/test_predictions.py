import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from rec import predictions
from rec.config import compose
from rec.data import Reader
from rec.distributed import Rank, process_group
from rec.features import Batch
from rec.predictions import About, PredictionWriter, collect, predict
from rec.schema import ConfigError, DataConfig
from tests.conftest import CONF, toy_overrides
from tests.test_checkpoint import one_process

ALONE = Rank(rank=0, world_size=1, device=torch.device("cpu"))
ABOUT = About(step=3, split="valid", calibrated=False)


@pytest.fixture
def data(toy: Path) -> DataConfig:
    data = compose(toy_overrides(toy), config_dir=str(CONF)).data
    data.tasks["click"].truth = "trust"  # a probability, for all that the reader knows
    data.tasks["purchase"].auxiliary = True
    return data


@pytest.fixture
def reader(toy: Path, data: DataConfig) -> Reader:
    config = compose(toy_overrides(toy), config_dir=str(CONF)).reader
    return Reader(data, config, split="valid", training=False, truth=True)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with one_process(), process_group():
        yield


def logits_of(batch: Batch) -> torch.Tensor:
    """Another logit for each row and task, [B, 3]."""
    return torch.stack([batch.row_id / 1000, -batch.row_id / 500, batch.row_id + 0.5], dim=1).float()


def write(folder: Path, reader: Reader, data: DataConfig, about: About = ABOUT) -> None:
    with PredictionWriter(folder, data=data, rank=ALONE, about=about) as writer:
        for batch in reader.batches():
            writer.write(batch, logits_of(batch))


def cut_short(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The first two, then an error."""
    yield next(batches)
    yield next(batches)
    raise ZeroDivisionError


class Network(torch.nn.Module):
    """Gives `logits_of`, and counts in what mode it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, batch: Batch) -> object:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return type("Outputs", (), {"logits": logits_of(batch)})


class TestPredict:
    def test_in_evaluation_mode_without_gradients(self, reader: Reader) -> None:
        network = Network()
        seen = [predicted.batch.num_rows for predicted in predict(network, reader, device=ALONE.device)]
        assert sum(seen) == reader.num_rows == 1004 and set(network.modes) == {(False, False)}
        assert len(list(predict(network, reader, device=ALONE.device, max_steps=3))) == 3

    def test_calibrators_see_the_logits_and_domains(self, reader: Reader) -> None:
        first = next(predict(Network(), reader, device=ALONE.device, calibrators=lambda z, d: z + d[:, None]))
        assert torch.equal(first.logits, logits_of(first.batch) + first.batch.domain_id[:, None])

    def test_collected_rows_are_those_of_the_split(self, reader: Reader) -> None:
        rows = collect(Network(), reader, device=ALONE.device)
        row_id = (rows.logits[:, 0] * 1000).round().long()
        table = pq.read_table(reader.split.files)
        assert row_id.sort().values.tolist() == list(range(1004))
        assert rows.labels[:, 0].tolist() == np.array(table["click"])[row_id].astype(float).tolist()
        assert rows.domain_id.tolist() == (np.array(table["tab"])[row_id] == "search").astype(int).tolist()
        assert rows.group_id.shape == (1004,) and rows.weights.shape == rows.logits.shape == (1004, 3)


class TestWriter:
    def test_every_row_once_with_what_the_files_say_of_it(
        self, tmp_path: Path, reader: Reader, data: DataConfig
    ) -> None:
        write(tmp_path / "out", reader, data)
        assert [path.name for path in tmp_path.rglob("*.parquet")] == ["part-00000.parquet"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        got = pq.read_table(tmp_path / "out").sort_by("row")
        files = pq.read_table(reader.split.files)
        assert got["row"].to_pylist() == list(range(1004))
        assert got["click.label"].to_pylist() == np.array(files["click"]).astype(float).tolist()
        assert got["purchase.weight"].to_pylist() == got["click.label"].to_pylist()
        assert got["click.truth"].to_pylist() == np.array(files["trust"]).astype(np.float32).tolist()
        assert got["domain"].to_pylist() == [["home", "search"].index(tab) for tab in files["tab"].to_pylist()]
        queries = files["query"].to_pylist()
        assert len(set(zip(got["group"].to_pylist(), queries, strict=True))) == len(set(queries))
        row = np.arange(1004)
        np.testing.assert_allclose(got["click.logit"], row / 1000, rtol=1e-6)
        np.testing.assert_allclose(got["click.pred"], 1 / (1 + np.exp(-row / 1000)), rtol=1e-6)
        assert got["dwell.pred"].to_pylist() == got["dwell.logit"].to_pylist() == (row + 0.5).tolist()

    def test_schema(self, tmp_path: Path, reader: Reader, data: DataConfig) -> None:
        write(tmp_path / "out", reader, data)
        schema = pq.read_schema(tmp_path / "out" / "part-00000.parquet")
        kinds = {f.name: str(f.type) for f in schema}
        assert {name: kinds.pop(name) for name in ("row", "domain", "group")} == {
            "row": "int64",
            "domain": "int32",
            "group": "int64",
        }
        parts = {f"{task}.{part}" for task in data.tasks for part in ("label", "weight", "logit", "pred")}
        assert kinds == dict.fromkeys([*parts, "click.truth"], "float")
        assert json.loads(schema.metadata[b"rec"]) == {
            "step": 3,
            "split": "valid",
            "calibrated": False,
            "tasks": {"click": "binary", "purchase": "binary", "dwell": "regression"},
            "domains": ["home", "search"],
            "grouped": True,
            "auxiliary": ["purchase"],
        }

    def test_without_labels_and_auxiliary_tasks(self, tmp_path: Path, reader: Reader, data: DataConfig) -> None:
        about = About(step=3, split="valid", calibrated=True, labels=False, auxiliary=False)
        write(tmp_path / "out", reader, data, about)
        got = pq.read_table(tmp_path / "out").sort_by("row")
        shown = ["click.logit", "click.pred", "dwell.logit", "dwell.pred"]
        assert got.column_names == ["row", "domain", "group", *shown]
        np.testing.assert_allclose(got["dwell.logit"], np.arange(1004) + 0.5)  # the third task, not the second
        said = json.loads(got.schema.metadata[b"rec"])
        assert said["tasks"] == {"click": "binary", "dwell": "regression"} and said["auxiliary"] == []

    def test_streams(self, tmp_path: Path, reader: Reader, data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(predictions, "_ROW_GROUP", 120)
        write(tmp_path / "out", reader, data)
        metadata = pq.ParquetFile(tmp_path / "out" / "part-00000.parquet").metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert sum(sizes) == 1004 and max(sizes) < 180 and len(sizes) > 5

    def test_a_rank_without_rows_writes_an_empty_file(self, tmp_path: Path, data: DataConfig) -> None:
        with PredictionWriter(tmp_path / "out", data=data, rank=ALONE, about=ABOUT):
            pass
        assert pq.read_table(tmp_path / "out").num_rows == 0

    def test_replaces_an_older_folder_as_a_whole(self, tmp_path: Path, reader: Reader, data: DataConfig) -> None:
        write(tmp_path / "out", reader, data)
        (tmp_path / "out" / "part-00000.parquet").rename(tmp_path / "out" / "part-00007.parquet")
        write(tmp_path / "out", reader, data)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["part-00000.parquet"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_after_an_error_the_older_folder_stays(
        self, tmp_path: Path, reader: Reader, data: DataConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "out", reader, data)
        before = (tmp_path / "out" / "part-00000.parquet").read_bytes()
        monkeypatch.setattr(reader, "batches", lambda: cut_short(Reader.batches(reader)))
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / "out", reader, data)
        monkeypatch.undo()
        assert (tmp_path / "out" / "part-00000.parquet").read_bytes() == before
        write(tmp_path / "out", reader, data)  # what it left behind is no obstacle
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_other_folders_are_not_replaced(self, tmp_path: Path, data: DataConfig) -> None:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").write_text("years of work")
        with pytest.raises(ConfigError, match=r"home holds thesis.tex, which is not of predictions and would be lost"):
            PredictionWriter(tmp_path / "home", data=data, rank=ALONE, about=ABOUT)
        with pytest.raises(ConfigError, match=r"thesis.tex is a file, expected a folder"):
            PredictionWriter(tmp_path / "home" / "thesis.tex", data=data, rank=ALONE, about=ABOUT)
        assert dist.is_initialized() and (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
