import errno
import json
import re
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec import logs
from rec.logs import RunLog, table_of
from rec.metrics import EvalResult
from rec.schema import ConfigError
from tests.conftest import CONF, start_ranks, toy_overrides, toy_table

BINARY = {"auc", "pr_auc", "logloss", "ne", "calibration", "ece", "field_ece", "gauc", "rows", "positives", "log_mae"}
REGRESSION = {"mae", "rmse", "calibration", "rows", "log_mae"}
TASKS = {"click": BINARY, "purchase": BINARY, "dwell": REGRESSION}
TABLES = {"user", "query", "item", "tags"}


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In training every third item is null; in validation nothing at home is clicked."""
    folder = tmp_path_factory.mktemp("logs")
    train, valid = toy_table(150), toy_table(90, seed=1)
    item = train["item"].to_pylist()
    train = with_column(train, "item", pa.array([None if i % 3 == 0 else v for i, v in enumerate(item)], pa.int32()))
    searched = np.array(valid["tab"]) == "search"
    for name in ("click", "purchase", "dwell"):
        valid = with_column(valid, name, pa.array(np.where(searched, np.array(valid[name]), 0)))
    for split, table in (("train", train), ("valid", valid)):
        (folder / split).mkdir()
        pq.write_table(table, folder / split / "part.parquet", row_group_size=40)
    return folder


@pytest.fixture(scope="module")
def finished(toy: Path) -> tuple[Path, str]:
    """A run's folder, and what two ranks printed, without a terminal."""
    often = [f"trainer.{name}_every_steps={steps}" for name, steps in (("log", 2), ("eval", 3))]
    overrides = toy_overrides(toy, f"run_dir={toy}/run", "trainer.num_epochs=3", "trainer.max_steps=7", *often)
    overrides += ["data.features.item.allow_null=true"]
    return toy / "run", start_ranks("rec/train.py", "--config-dir", str(CONF), *overrides)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture(scope="module")
def lines(finished: tuple[Path, str]) -> list[dict[str, Any]]:
    text = (finished[0] / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def of(lines: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


def documented() -> dict[str, set[str]]:
    """Event -> its further fields, as the module's docstring has them."""
    table = re.findall(r"^    (\w+) {2,}(.+)$", logs.__doc__ or "", re.M)[1:]
    plain = {event: re.sub(r" ?(\{.*?\}+|\(.*?\))", "", fields) for event, fields in table}
    return {event: set(fields.partition(":")[0].split(", ")) for event, fields in plain.items()}


class TestMetricsFile:
    def test_every_event_has_the_documented_fields(self, lines: list[dict[str, Any]]) -> None:
        assert set(documented()) == {"start", "train", "eval", "tables", "checkpoint", "warning", "end"}
        assert {line["event"] for line in lines} == set(documented())
        for line in lines:
            assert line.keys() == {"event", "time", "step", "rows"} | documented()[line["event"]], line["event"]

    def test_order_steps_and_rows(self, lines: list[dict[str, Any]]) -> None:
        got = [(line["event"], line["step"]) for line in lines if line["event"] not in ("checkpoint", "warning")]
        evals = {step: [("eval", step), ("tables", step)] for step in (3, 6, 7)}
        trains = [*[("train", 2)], *evals[3], ("train", 4), ("train", 6), *evals[6], ("train", 7), *evals[7]]
        assert got == [("start", 0), *trains, ("end", 7)]
        assert lines[-1]["event"] == "end"
        assert all(line["rows"] == 50 * line["step"] for line in lines)  # 150 rows a pass, 50 a step
        assert of(lines, "checkpoint")[-1]["step"] == 7

    def test_times_are_utc_and_rise(self, lines: list[dict[str, Any]]) -> None:
        times = [datetime.fromisoformat(line["time"]) for line in lines]
        assert all(time.utcoffset() == timedelta(0) for time in times)
        assert times == sorted(times)

    def test_start(self, lines: list[dict[str, Any]]) -> None:
        (start,) = of(lines, "start")
        assert (start["world_size"], start["device"], start["steps"], start["resumed_from"]) == (2, "cpu", 7, None)
        assert start["parameters"]["sparse"] == 997 * 8 + 50 * 8 + 203 * 16 + 11 * 4
        assert start["parameters"]["dense"] > 0
        assert start["config"]["data"]["features"]["history"]["kind"] == "sequence"
        assert start["tables"].keys() == TABLES
        assert all(table.keys() == {"sharding", "ranks", "mib"} for table in start["tables"].values())

    def test_train(self, lines: list[dict[str, Any]]) -> None:
        for line in of(lines, "train"):
            assert line["losses"].keys() == TASKS.keys()
            loss = line["losses"]["click"] + 0.5 * line["losses"]["purchase"] + 0.1 * line["losses"]["dwell"]
            assert line["loss"] == pytest.approx(loss, rel=1e-5)
            assert (
                line["rows_per_second"] > 0
                and line["grad_norm"] > 0
                and line["lr"] == 1e-3
                and line["lr_sparse"] == 0.02
            )
            assert isinstance(line["memory_mib"], int) and 50 < line["memory_mib"] < 50_000

    def test_eval(self, lines: list[dict[str, Any]]) -> None:
        for line in of(lines, "eval"):
            assert line["split"] == "valid" and line["seconds"] > 0
            assert line["domains"].keys() == line["metrics"].keys() == TASKS.keys()
            for task, names in TASKS.items():
                assert line["domains"][task].keys() == {"home", "search"}
                parts = list(line["domains"][task].values())
                for values in (line["metrics"][task], *parts):
                    assert values.keys() == names
                    assert all(value is None or type(value) in (int, float) for value in values.values())
                for count in {"rows", "positives"} & names:
                    assert type(line["metrics"][task][count]) is int
                    assert sum(values[count] for values in parts) == line["metrics"][task][count]

    def test_null_where_a_metric_has_no_meaning(self, lines: list[dict[str, Any]], toy: Path) -> None:
        table = pq.read_table(toy / "valid")
        at_home = int((np.array(table["tab"]) == "home").sum())
        last = of(lines, "eval")[-1]
        home = {task: values["home"] for task, values in last["domains"].items()}
        assert (home["click"]["rows"], home["click"]["positives"]) == (at_home, 0)
        assert home["click"]["auc"] is None and home["click"]["gauc"] is None and home["click"]["logloss"] > 0
        for task in ("purchase", "dwell"):  # given a click, of which there is none
            assert {home[task][count] for count in TASKS[task] & {"rows", "positives"}} == {0}
            assert {home[task][name] for name in TASKS[task] - {"rows", "positives"}} == {None}
        assert 0 <= last["metrics"]["click"]["auc"] <= 1
        assert last["metrics"]["click"]["positives"] == int(np.array(table["click"]).sum())

    def test_tables(self, lines: list[dict[str, Any]]) -> None:
        for line in of(lines, "tables"):
            assert line["tables"].keys() == TABLES
            for values in line["tables"].values():
                assert values.keys() == {"rms", "max_abs", "rows_trained"}
                assert 0 < values["rms"] <= values["max_abs"] and 0 < values["rows_trained"] <= 1

    def test_checkpoint_warning_and_end(self, lines: list[dict[str, Any]], finished: tuple[Path, str]) -> None:
        scores = {line["step"]: line["score"] for line in of(lines, "checkpoint")}
        for line in of(lines, "eval"):
            if line["step"] in scores:
                want = (line["metrics"]["click"]["auc"] + line["metrics"]["purchase"]["auc"]) / 2
                assert scores[line["step"]] == pytest.approx(want)
        assert Path(of(lines, "checkpoint")[-1]["path"]) == finished[0] / "checkpoints" / "step_000000007"
        assert any("null read as" in line["message"] for line in of(lines, "warning"))
        assert of(lines, "end")[0]["reason"] == "all steps done" and of(lines, "end")[0]["seconds"] > 0


def scalars(run_dir: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows: (tag, step) -> value."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of its own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        return {(tag, e.step): e.value for tag in board.Tags()["scalars"] for e in board.Scalars(tag)}


def flat(values: dict[str, Any], prefix: str) -> dict[str, float]:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}/{key}"))
        elif isinstance(value, int | float):
            found[f"{prefix}/{key}"] = float(value)
    return found


def test_tensorboard_has_the_same_numbers(lines: list[dict[str, Any]], finished: tuple[Path, str]) -> None:
    want = {}
    for line in lines:
        if line["event"] in ("train", "eval", "tables"):
            prefix = f"eval/{line['split']}" if line["event"] == "eval" else line["event"]
            values = {key: value for key, value in line.items() if key not in ("step", "rows")}
            want.update({(tag, line["step"]): value for tag, value in flat(values, prefix).items()})
    got = scalars(finished[0])
    assert got.keys() == want.keys() and len(got) > 100
    assert {key: np.float32(value) for key, value in want.items()} == {key: np.float32(v) for key, v in got.items()}


class TestConsole:
    def test_says_what_the_log_holds(self, finished: tuple[Path, str], lines: list[dict[str, Any]]) -> None:
        run_dir, said = finished
        last = of(lines, "eval")[-1]
        assert table_of(EvalResult(metrics=last["metrics"], domains=last["domains"])) in said
        assert f"all steps done at step 7; logs, checkpoints and configuration are in {run_dir}" in said

    def test_no_progress_bar_without_a_terminal(self, finished: tuple[Path, str]) -> None:
        assert "\r" not in finished[1] and "rows/s" not in finished[1] and "%|" not in finished[1]

    def test_rank_0_alone_speaks_and_writes(self, finished: tuple[Path, str], lines: list[dict[str, Any]]) -> None:
        run_dir, said = finished
        assert said.count("all steps done") == 1 and said.count("step 3 of 7") == 1
        assert len(of(lines, "start")) == len(of(lines, "end")) == 1
        assert len(list((run_dir / "tensorboard").iterdir())) == 1


class TestRunLog:
    def test_inactive_writes_and_says_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        log = RunLog(tmp_path / "run", active=False)
        log.event("train", step=1, rows=2, loss=3.0)
        log.say("hello")
        log.close()
        assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""

    def test_what_json_cannot_hold_is_null(self, tmp_path: Path) -> None:
        log = RunLog(tmp_path, active=True)
        values = {
            "loss": float("nan"),
            "losses": {"a": float("inf"), "b": -1e300, "c": 2},
            "many": [1.5, float("-inf")],
        }
        log.event("train", step=3, rows=60, **values)
        log.close()
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        got = json.loads(line, parse_constant=refuse)
        assert {key: got[key] for key in values} == {
            "loss": None,
            "losses": {"a": None, "b": -1e300, "c": 2},
            "many": [1.5, None],
        }
        assert {tag for tag, _ in scalars(tmp_path)} == {"train/losses/b", "train/losses/c"}

    def test_opened_again_it_appends(self, tmp_path: Path) -> None:
        for step in (1, 2):
            log = RunLog(tmp_path, active=True)
            log.event("end", step=step, rows=step, reason="ünder way")
            log.close()
        text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in text] == [1, 2]
        assert json.loads(text[0])["reason"] == "ünder way"

    def test_half_a_line_that_a_full_disk_left_stays_alone(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"event": "end"}\n{"event": "tra')
        log = RunLog(tmp_path, active=True)
        log.event("end", step=2, rows=2)
        log.close()
        first, half, last = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert (first, half) == ('{"event": "end"}', '{"event": "tra') and json.loads(last)["step"] == 2

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a disk that is always full")
    def test_a_disk_that_is_full_costs_a_warning_and_not_the_run(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        log = RunLog(tmp_path, active=True)
        for step in range(3):
            log.event("train", step=step, rows=0, loss=0.5)
        log.close()
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"warning: the log in {tmp_path} cannot be written: the disk is full; free space" in said
        assert len(scalars(tmp_path)) == 3  # what can be written is

    def test_a_folder_that_cannot_be_written_is_an_error_at_the_start(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=f"{tmp_path}/file/run: NotADirectoryError"):
            RunLog(tmp_path / "file" / "run", active=True)

    def test_so_is_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(ConfigError, match=f"{tmp_path}: the disk is full; free space, or choose another folder"):
            RunLog(tmp_path, active=True)

    def test_a_line_is_whole_before_the_log_is_closed(self, tmp_path: Path) -> None:
        log = RunLog(tmp_path, active=True)
        log.event("train", step=1, rows=2, loss=0.5)
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5
        log.close()


class TestTable:
    result = EvalResult(
        metrics={
            "click": {"auc": 0.71236, "gauc": None, "rows": 1234567, "positives": 12, "logloss": 0.5},
            "long task name": {"mae": 12.0, "rmse": 1.25, "rows": 7},
        },
        domains={
            "click": {
                "home": {"auc": None, "rows": 3, "positives": 0},
                "search": {"auc": 1.0, "rows": 9, "positives": 4},
            },
            "long task name": {"all": {"mae": 12.0, "rmse": 1.25, "rows": 7}},
        },
    )

    def test_columns_that_some_task_has_in_a_fixed_order(self) -> None:
        header, *rows = [line.split("  ") for line in table_of(self.result).splitlines()]
        cells = [[cell.strip() for cell in row if cell.strip()] for row in (header, *rows)]
        assert cells == [
            ["task", "auc", "mae", "rmse", "rows", "positives"],
            ["click", "0.7124", "-", "-", "1,234,567", "12"],
            ["long task name", "-", "12", "1.2500", "7", "-"],
        ]

    def test_domains_stand_below_their_task_where_there_are_several(self) -> None:
        lines = table_of(self.result, domains=True).splitlines()
        assert [line[:14].rstrip() for line in lines] == ["task", "click", "  home", "  search", "long task name"]
        assert lines[2].split() == ["home", "-", "-", "-", "3", "0"]
        assert lines[3].split() == ["search", "1.0000", "-", "-", "9", "4"]
        assert len({len(line) for line in lines}) == 1  # columns stand under each other
