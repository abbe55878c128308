import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec.config import compose
from rec.data import Reader
from rec.features import DataError
from rec.metrics import EvalResult
from rec.schema import ConfigError, TaskConfig, TaskKind
from rec.trainer import TrainerConfig
from tests.conftest import CONF, toy_overrides, write_toy
from tests.test_checkpoint import train
from tests.test_train import events

TASKS = {"a": TaskConfig("a"), "b": TaskConfig("b"), "time": TaskConfig("t", kind=TaskKind.regression)}
RESULT = EvalResult({"a": {"auc": 0.7, "ne": 0.8}, "b": {"auc": None, "ne": 0.6}, "time": {"rmse": 2.0}}, {})


def test_score_is_the_mean_over_binary_tasks_that_have_it_and_higher_is_better() -> None:
    assert TrainerConfig().score(RESULT, TASKS) == 0.7
    assert TrainerConfig(monitor="ne").score(RESULT, TASKS) == pytest.approx(-0.7)
    assert TrainerConfig(monitor="ne", monitor_tasks=["b"]).score(RESULT, TASKS) == -0.6
    assert TrainerConfig(monitor_tasks=["b"]).score(RESULT, TASKS) is None
    assert TrainerConfig(monitor="ne").score(RESULT, TASKS | {"a": TaskConfig("a", auxiliary=True)}) == -0.6
    with pytest.raises(ConfigError, match="trainer.monitor is 'aucc'; did you mean 'auc'"):
        TrainerConfig(monitor="aucc")


def test_early_stop_ends_the_run_once_and_keeps_the_best(toy: Path, tmp_path: Path) -> None:
    # a learning rate of nothing: no evaluation is better than the first
    changes = [
        "trainer.eval_every_steps=3",
        "trainer.early_stop_evals=2",
        "optim.dense.lr=1e-12",
        "optim.sparse.lr=1e-12",
    ]
    overrides = toy_overrides(toy, f"run_dir={tmp_path}/run", "checkpoint.keep_last=1", *changes)
    for _ in range(2):
        train(compose(overrides, config_dir=str(CONF)))
    assert [event["step"] for event in events(tmp_path / "run", "eval")] == [3, 6, 9]
    first, second = events(tmp_path / "run", "end")
    assert (first["step"], first["reason"]) == (9, "no better auc in 2 evaluations")
    assert (second["step"], second["reason"]) == (9, "was done already")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_000000003",
        "step_000000009",
    ]


def test_a_task_without_positives_and_steps_without_rows_that_count_do_no_harm(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Reader._batch

    def masked(reader: Reader, step: int, *rest: object) -> object:
        batch = make(reader, step, *rest)
        batch.labels[:, 1] = 0  # nobody ever buys
        if step % 2:
            batch.weights.zero_()  # nothing counts in every other step
        return batch

    monkeypatch.setattr(Reader, "_batch", masked)
    overrides = toy_overrides(toy, f"run_dir={tmp_path}/run", "trainer.log_every_steps=1")
    train(compose(overrides, config_dir=str(CONF)))
    losses = [event["loss"] for event in events(tmp_path / "run", "train")]
    assert all(math.isfinite(loss) for loss in losses)
    assert all(loss == 0 for loss in losses[1::2]) and all(loss > 0 for loss in losses[::2])
    (result,) = events(tmp_path / "run", "eval")
    assert result["metrics"]["purchase"]["auc"] is None and result["metrics"]["purchase"]["positives"] == 0
    assert result["metrics"]["click"]["auc"] is not None


def test_ids_that_are_texts_in_training_and_numbers_in_evaluation_end_it_before_the_first_step(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy", [120])
    (file,) = (toy / "valid").iterdir()
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.column_names.index("query"), "query", pa.array(range(120))), file)
    run_dir = tmp_path / "run"
    with pytest.raises(
        DataError, match="valid/part-0.parquet: column 'query' holds int64, but .*train.* string: the same"
    ):
        train(compose(toy_overrides(toy, f"run_dir={run_dir}"), config_dir=str(CONF)))
    assert not (run_dir / "checkpoints").exists()
    train(compose(toy_overrides(toy, f"run_dir={run_dir}", "trainer.eval_split=null"), config_dir=str(CONF)))
