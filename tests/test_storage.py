import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rec import logs, report, storage
from rec.config import compose
from rec.data import Reader, Split
from rec.features import Batch, DataError
from rec.logs import RunLog, _append
from rec.schema import ConfigError
from rec.storage import Attempts, StoreError
from tests.conftest import CONF, torchrun, toy_overrides
from tests.workers.storage_server import BUCKET, Fault, Store, running_store

PART = "train/part-0.parquet"


@pytest.fixture(scope="module")
def running() -> Iterator[Store]:
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    with running_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield store
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def store(running: Store) -> Iterator[Store]:
    running.faults, running.failed, running.served = [], [], []
    yield running
    running.faults = []


@pytest.fixture(scope="module")
def toy_uri(running: Store, toy: Path) -> str:
    for file in toy.rglob("*.parquet"):
        running.request("PUT", f"/{BUCKET}/toy/{file.relative_to(toy)}", file.read_bytes())
    return f"s3://{BUCKET}/toy"


def reader_of(path: str | Path, *more: str) -> Reader:
    config = compose(toy_overrides(path, "reader.prefetch_batches=0", *more), config_dir=str(CONF))
    return Reader(config.data, config.reader, split="train")


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    ids = batch.sparse_features
    return [ids.values(), ids.lengths(), batch.dense, batch.labels, batch.weights, batch.domain_id, batch.row_id]


def assert_same_batches(got: Reader, want: Reader) -> None:
    assert got.num_rows == want.num_rows == 1004
    for ours, theirs in zip(got.batches(), want.batches(), strict=True):
        for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between attempts, none of which takes place."""
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    return waits


class TestData:
    def test_the_same_batches_as_from_disk(self, store: Store, toy: Path, toy_uri: str) -> None:
        assert_same_batches(reader_of(toy_uri), reader_of(toy))
        assert any(PART in path for path in store.served)

    def test_and_through_fsspec(self, toy: Path) -> None:
        memory = storage.path("memory://toy")
        for file in toy.rglob("*.parquet"):
            (memory / str(file.relative_to(toy))).write_bytes(file.read_bytes())
        assert_same_batches(reader_of("memory://toy"), reader_of(toy))

    @pytest.mark.parametrize("kind", [500, 503, "cut", "hang"])
    def test_what_fails_for_a_while_is_read_in_the_end(
        self,
        store: Store,
        toy: Path,
        toy_uri: str,
        kind: int | str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 0.5)
        monkeypatch.setattr(storage, "_REQUEST_ATTEMPTS", 1)  # else Arrow hides most of it
        reader = reader_of(toy_uri, "reader.retries=3")
        reader.split.attempts.wait_s = 0.01
        group = next(group for group in reader.split.row_groups if PART in group.file)
        store.faults = [Fault(kind, PART, times=2, hang_s=2)]
        got = reader.split.read(group, ["user", "item"])
        assert got.equals(reader_of(toy).split.read(reader_of(toy).split.row_groups[0], ["user", "item"]))
        assert reader.split.attempts.failed == len(store.failed) == 2
        assert capsys.readouterr().err.count("trying again in") == 2

    def test_arrow_itself_tries_a_request_again(self, store: Store, toy: Path, toy_uri: str) -> None:
        reader = reader_of(toy_uri, "reader.retries=0")
        store.faults = [Fault(503, PART, times=2)]
        assert_same_batches(reader, reader_of(toy))
        assert reader.split.attempts.failed == 0 and len(store.failed) == 2

    @pytest.mark.parametrize("kind", [503, "cut"])
    def test_what_goes_on_failing_is_an_error_in_bounded_time(
        self, store: Store, toy_uri: str, kind: int | str, no_waiting: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "_REQUEST_ATTEMPTS", 2)
        split = reader_of(toy_uri, "reader.retries=2").split
        store.faults = [Fault(kind, PART)]
        started = time.monotonic()
        with pytest.raises(
            DataError, match=rf"{BUCKET}/toy/{PART}, row group 0: cannot be read: tried 3 times in .*reader\.retries"
        ):
            split.read(split.row_groups[0], ["user"])
        assert time.monotonic() - started < 10
        assert split.attempts.failed == 3 and 3 <= len(store.failed) <= 6
        assert 0.5 <= no_waiting[0] <= 1 <= no_waiting[1] <= 2

    def test_a_footer_and_a_listing_are_tried_again_too(
        self, store: Store, toy: Path, toy_uri: str, no_waiting: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "_REQUEST_ATTEMPTS", 1)
        store.faults = [Fault("cut", PART, times=1), Fault(500, "list-type=2", times=1)]
        assert_same_batches(reader_of(toy_uri), reader_of(toy))
        assert len(store.failed) == len(no_waiting) == 2

    def test_a_listing_that_goes_on_failing(
        self, store: Store, toy_uri: str, no_waiting: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "_REQUEST_ATTEMPTS", 1)
        store.faults = [Fault(500, "list-type=2")]
        with pytest.raises(DataError, match=f"split 'train' of data.path={toy_uri}: cannot be listed: tried 2 times"):
            reader_of(toy_uri, "reader.retries=1")

    def test_no_right_to_read_is_told_at_once(self, store: Store, toy_uri: str, no_waiting: list[float]) -> None:
        store.faults = [Fault(403, "list-type=2")]
        with pytest.raises(DataError, match="cannot be listed: tried 1 times.*no credentials.*AWS_ACCESS_KEY_ID"):
            reader_of(toy_uri)
        assert not no_waiting

    def test_a_damaged_local_file_is_not_tried_again(self, toy: Path, tmp_path: Path, no_waiting: list[float]) -> None:
        (tmp_path / "train").mkdir()
        data = bytearray((toy / PART).read_bytes())
        data[100:4000] = bytes(3900)
        (tmp_path / PART).write_bytes(data)
        split = Split(compose(toy_overrides(tmp_path), config_dir=str(CONF)).data, "train")
        with pytest.raises(DataError, match="part-0.parquet, row group 0: cannot be decoded.*write it again"):
            split.read(split.row_groups[0], ["user", "query", "item"])
        assert split.attempts.failed == 1 and not no_waiting

    def test_a_bucket_that_is_not_there(self, store: Store) -> None:
        with pytest.raises(ConfigError, match="the bucket 'rec-nowhere' does not exist"):
            reader_of("s3://rec-nowhere/toy")
        with pytest.raises(DataError, match="no Parquet files in split 'train'"):
            reader_of(f"s3://{BUCKET}/nowhere")


class TestErrors:
    @pytest.mark.parametrize("of", [storage.path, storage.filesystem])
    def test_an_unknown_scheme(self, of: Callable[[str], object]) -> None:
        with pytest.raises(
            ConfigError, match="s4://bucket/x: unknown scheme, expected a folder or a URI such as s3://"
        ):
            of("s4://bucket/x")

    @pytest.mark.parametrize("of", [storage.path, storage.filesystem])
    def test_a_package_that_is_not_installed(self, of: Callable[[str], object]) -> None:
        with pytest.raises(ConfigError, match="abfs://c@a/x: a package is missing.*adlfs"):
            of("abfs://c@a/x")

    def test_a_fault_of_the_program_is_left_alone(self) -> None:
        for error in (ConfigError("a"), StoreError("b"), ValueError("c"), KeyError("d"), TypeError("e")):
            with pytest.raises(type(error)) as caught, storage.named("x"):
                raise error
            assert caught.value is error

    def test_other_exceptions_are_not_tried_again(self, no_waiting: list[float]) -> None:
        def fail() -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            Attempts(3)(fail, where="x")
        assert not no_waiting

    def test_waits_grow_and_are_bounded(self, no_waiting: list[float]) -> None:
        def fail() -> None:
            raise OSError("the store is tired")

        with pytest.raises(StoreError, match="tried 9 times in 0 s: OSError: the store is tired"):
            Attempts(8)(fail, where="x")
        for wait, most in zip(no_waiting, [1, 2, 4, 8, 16, 30, 30, 30], strict=True):
            assert most / 2 <= wait <= most


class TestPaths:
    def test_what_others_write_is_seen_at_once(self, store: Store) -> None:
        folder = storage.path(f"s3://{BUCKET}/fresh")
        for count in range(1, 4):
            store.request("PUT", f"/{BUCKET}/fresh/{count}", b"x")
            assert sorted(path.name for path in folder.iterdir()) == [str(i) for i in range(1, count + 1)]
            assert storage.is_file(folder / str(count)) and not storage.is_file(folder / "9")

    def test_a_store_that_does_not_answer_is_not_a_missing_file(self, store: Store) -> None:
        file = storage.path(f"s3://{BUCKET}/there")
        store.request("PUT", f"/{BUCKET}/there", b"x")
        store.faults = [Fault(403, "there", method="HEAD")]
        assert file.is_file() is False  # which is why there is storage.is_file
        with pytest.raises(PermissionError):
            storage.is_file(file)

    @pytest.mark.parametrize("local", [True, False])
    def test_a_file_is_replaced_whole_or_not_at_all(self, store: Store, tmp_path: Path, local: bool) -> None:
        file = storage.path(tmp_path if local else f"s3://{BUCKET}/whole") / "folder" / "a.txt"
        with storage.replacing(file) as draft:
            draft.write_text("one")
        with pytest.raises(ZeroDivisionError), storage.replacing(file) as draft:
            draft.write_text(f"two, {1 / 0}")
        assert file.read_text() == "one"
        assert [path.name for path in file.parent.iterdir()] == ["a.txt"]

    def test_a_folder_is_replaced_and_its_last_file_comes_last(self, store: Store, tmp_path: Path) -> None:
        target = storage.path(f"s3://{BUCKET}/export")
        for names in (["a", "b", "old"], ["a", "b"]):
            local = tmp_path / "".join(names)
            local.mkdir()
            for name in names:
                (local / name).write_text(f"{name} of {len(names)}")
            store.served = []
            storage.put_folder(local, target, last="a")
            assert {path.name: path.read_text() for path in target.iterdir()} == {
                n: f"{n} of {len(names)}" for n in names
            }
            assert [path.partition("?")[0] for path in store.served if path.startswith("PUT")][-1].endswith("/export/a")


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class TestLog:
    @pytest.fixture
    def run_dir(self, store: Store, request: pytest.FixtureRequest) -> Path:
        return storage.path(f"s3://{BUCKET}/{request.node.name}")

    def test_lines_come_after_a_checkpoint_and_at_the_end(self, run_dir: Path) -> None:
        log = RunLog(run_dir, active=True)
        log.event("train", step=1, rows=2, loss=0.5)
        log.event("checkpoint", step=1, rows=2, path="p", score=None)
        for _ in range(200):
            if storage.is_file(run_dir / "metrics.jsonl"):
                break
            time.sleep(0.05)
        assert [line["event"] for line in events_of(run_dir)] == ["train", "checkpoint"]
        log.event("end", step=1, rows=2, reason="ünder way")
        log.close()
        assert [line["event"] for line in events_of(run_dir)] == ["train", "checkpoint", "end"]
        assert events_of(run_dir)[-1]["reason"] == "ünder way"
        assert len(list((run_dir / "tensorboard").iterdir())) == 1

    def test_lines_of_other_commands_and_of_earlier_runs_stay(self, run_dir: Path) -> None:
        for first in (1, 4):
            log = RunLog(run_dir, active=True)
            log.event("train", step=first, rows=0)
            other = RunLog(run_dir, active=True)
            other.event("eval", step=first + 1, rows=0, split="test")
            other.close()
            log.event("train", step=first + 2, rows=0)
            log.close()
        assert sorted(line["step"] for line in events_of(run_dir)) == [1, 2, 3, 4, 5, 6]

    def test_an_upload_whose_answer_was_lost_is_not_made_twice(self, run_dir: Path) -> None:
        for _ in range(2):
            _append(run_dir / "metrics.jsonl", b"1\n2\n")
        _append(run_dir / "metrics.jsonl", b"3\n")
        assert (run_dir / "metrics.jsonl").read_text() == "1\n2\n3\n"

    def test_nothing_can_be_written_at_the_start(self, store: Store, run_dir: Path) -> None:
        store.faults = [Fault(403, "probe", method="PUT")]
        with pytest.raises(ConfigError, match=f"{run_dir}: no credentials, or ones that do not allow this.*Forbidden"):
            RunLog(run_dir, active=True)
        store.faults = []
        with pytest.raises(ConfigError, match="the bucket does not exist"):
            RunLog(storage.path("s3://rec-nowhere/run"), active=True)

    def test_later_it_is_one_warning_and_no_line_is_lost(
        self, store: Store, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logs, "UPLOAD_EVERY_S", 0.0)
        log = RunLog(run_dir, active=True)
        store.faults = [Fault(403, "metrics.jsonl|tensorboard", method="PUT")]
        for step in range(20):
            log.event("train", step=step, rows=0, loss=1.0)
            time.sleep(0.02)
        store.faults = []
        log.close()
        assert [line["step"] for line in events_of(run_dir)] == list(range(20))
        said = capsys.readouterr().err
        assert said.count("warning: the log in") == 1 and "Forbidden" in said and str(run_dir) in said


def measured(run_dir: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What a run says of its steps, less what depends on the clock."""
    timed = {"time", "seconds", "rows_per_second", "seconds_per_step", "memory_mib", "path", "split"}
    kept = ("train", "eval", "tables", "calibration", "checkpoint")
    found = [line for line in events_of(run_dir) if line["event"] in kept]
    return {(line["event"], line["step"]): {k: v for k, v in line.items() if k not in timed} for line in found}


def predictions_of(run_dir: Path) -> pa.Table:
    files = sorted((run_dir / "predictions" / "valid").iterdir(), key=str)
    assert [file.name for file in files] == ["part-00000.parquet", "part-00001.parquet"]
    return pa.concat_tables([pq.read_table(io.BytesIO(file.read_bytes())) for file in files]).sort_by("row")


@pytest.mark.slow
def test_a_run_in_a_store_equals_one_on_disk(
    store: Store, toy: Path, toy_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data, logs, checkpoints, calibration, evaluation, predictions and a report, on two ranks; that in the store goes on once."""
    on_disk, in_store = tmp_path / "run", storage.path(f"s3://{BUCKET}/runs/a")
    often = [
        "reader.global_batch_size=250",
        "checkpoint.every_steps=2",
        "trainer.eval_every_steps=2",
        "trainer.log_every_steps=1",
    ]

    def training(path: str | Path, run_dir: Path, max_steps: int) -> list[str]:
        return toy_overrides(path, *often, f"run_dir={run_dir}", f"trainer.max_steps={max_steps}")  # type: ignore[arg-type]

    jobs: list[Any] = [training(toy, on_disk, 4), training(toy_uri, in_store, 2)]
    torchrun("tests/workers/storage_worker.py", json.dumps(jobs), ranks=2)
    jobs = [training(toy_uri, in_store, 4)]
    for run_dir in (on_disk, in_store):
        valid = [f"run_dir={run_dir}", "split=valid"]
        jobs += [{"calibrate": valid}, {"evaluate": [*valid, "predictions=true"]}]
    torchrun("tests/workers/storage_worker.py", json.dumps(jobs), ranks=2)

    starts = [line["resumed_from"] for line in events_of(in_store) if line["event"] == "start"]
    assert starts == [None, f"{in_store}/checkpoints/step_000000002"]
    got, want = measured(in_store), measured(on_disk)
    assert {(event, 4) for event in ("train", "eval", "calibration", "checkpoint")} <= want.keys()
    assert got == want
    assert predictions_of(in_store).equals(predictions_of(on_disk)) and predictions_of(on_disk).num_rows == 1004
    tables = []
    for run_dir in (on_disk, in_store):
        report.main([str(run_dir)])
        tables.append(capsys.readouterr().out.replace(str(run_dir), "RUN"))
    assert tables[0] == tables[1] and "click" in tables[0]


@pytest.mark.slow
def test_export_items_and_predictions_of_a_run_in_a_store(store: Store, two_tower_run: Path, tmp_path: Path) -> None:
    """Commands of one process, the same as of the same run on disk."""
    for file in two_tower_run.rglob("*"):
        if file.is_file():
            store.request("PUT", f"/{BUCKET}/two/{file.relative_to(two_tower_run)}", file.read_bytes())
    in_store = storage.path(f"s3://{BUCKET}/two")
    predictions = {}
    for run_dir in (two_tower_run, in_store):
        out = storage.path(str(tmp_path) if run_dir == two_tower_run else f"s3://{BUCKET}/out")
        for command in ("export", "items", "predict"):
            arguments = [f"run_dir={run_dir}", f"out={out / command}", *["split=valid"][: command != "export"]]
            done = subprocess.run([sys.executable, "-m", f"rec.{command}", *arguments], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        items = pq.read_table(io.BytesIO((out / "items").read_bytes()))
        rows = pq.read_table(io.BytesIO((out / "predict" / "part-00000.parquet").read_bytes())).sort_by("row")
        exported = {path.name: path.stat().st_size for path in (out / "export").iterdir()}
        said = json.loads((out / "export" / "schema.json").read_text())
        predictions[run_dir] = (items, rows, exported.keys(), said["tasks"], said["check"])
    ours, theirs = predictions.values()
    assert ours[0].equals(theirs[0]) and ours[1].equals(theirs[1]) and ours[1].num_rows == 1004
    assert ours[2:] == theirs[2:] and {"model.pt2", "item.pt2", "query.pt2"} <= ours[2]
