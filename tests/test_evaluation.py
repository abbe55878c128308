from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from rec.config import compose
from rec.data import Reader, ReaderConfig
from rec.distributed import Rank, process_group
from rec.evaluation import evaluate
from rec.features import Batch
from rec.health import ExpertHealth
from rec.metrics import EvalResult, MultitaskMetrics
from rec.model import Outputs
from rec.predictions import About, PredictionWriter
from rec.schema import DataConfig
from tests.conftest import CONF, toy_overrides, write_toy
from tests.test_checkpoint import one_process

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    with one_process(), process_group():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = write_toy(tmp_path_factory.mktemp("evaluation"), [130, 75])
    return compose(toy_overrides(folder), config_dir=str(CONF)).data


class Price(nn.Module):
    """The price is every task's logit; padding and a network that trains say what no row should."""

    def forward(self, batch: Batch) -> Outputs:
        logits = batch.dense[:, :1].log1p().repeat(1, batch.labels.shape[1])
        logits = torch.where((batch.row_id >= 0)[:, None] & (not self.training), logits, 1e6)
        gates = torch.full((*logits.shape, 2), 0.5) / (batch.row_id >= 0)[:, None, None]
        return Outputs(logits, logits, logits, gate_weights=gates, expert_outputs=torch.zeros(len(logits), 2, 3))


def make_reader(data: DataConfig) -> Reader:
    return Reader(
        data, ReaderConfig(global_batch_size=40), split="valid", training=False
    )  # 6 steps, the last of 5 rows


def run(data: DataConfig, **more: object) -> EvalResult:
    metrics = MultitaskMetrics(data.tasks, domains=data.domains)
    return evaluate(Price().train(), make_reader(data), metrics, device=CPU, **more)


def rows(data: DataConfig, *, steps: int = 100) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Price, labels [R, T], weights [R, T] and domain of all rows."""
    found = []
    for batch in make_reader(data).batches(0, min(steps, 6)):
        columns = (batch.dense[:, 0], batch.labels, batch.weights, batch.domain_id)
        found.append([column[: batch.num_rows].numpy() for column in columns])
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


@pytest.mark.parametrize("max_steps", [None, 2])
def test_metrics_are_scikit_learn_s_over_the_rows_of_all_steps(data: DataConfig, max_steps: int | None) -> None:
    result = run(data, max_steps=max_steps)
    price, labels, weights, domain = rows(data, steps=max_steps or 100)
    assert len(price) == (80 if max_steps else 205)
    for t, task in enumerate(data.tasks):
        counted = weights[:, t] > 0
        assert result.metrics[task]["rows"] == counted.sum()
        if set(np.unique(labels[counted, t])) == {0, 1}:
            expected = roc_auc_score(labels[counted, t], price[counted], sample_weight=weights[counted, t])
            assert result.metrics[task]["auc"] == pytest.approx(expected, abs=1e-9)
    for d, name in enumerate(data.domains):
        assert result.domains["click"][name]["rows"] == ((weights[:, 0] > 0) & (domain == d)).sum()


def test_an_evaluation_knows_nothing_of_the_one_before(data: DataConfig) -> None:
    metrics, health = MultitaskMetrics(data.tasks, domains=data.domains), ExpertHealth(list(data.tasks))
    first, second = (
        evaluate(Price(), make_reader(data), metrics, device=CPU, health=health, max_steps=steps) for steps in (1, 6)
    )
    assert (first.metrics["click"]["rows"], second.metrics["click"]["rows"]) == (40, 205)
    assert health.compute().rows == 205 and health.compute().tasks["click"].gate_weights == [0.5, 0.5]


def test_calibrators_change_what_is_measured_and_what_is_written(data: DataConfig, tmp_path: Path) -> None:
    def lower(logits: Tensor, domain_id: Tensor) -> Tensor:
        return logits - 2.0 - domain_id[:, None]

    about = About(step=3, split="valid", calibrated=True)
    with PredictionWriter(tmp_path / "out", data=data, rank=Rank(0, 1, CPU), about=about) as writer:
        result = run(data, calibrators=lower, predictions=writer)
    written, (_, labels, weights, _) = pq.read_table(tmp_path / "out"), rows(data)
    assert sorted(written["row"].to_pylist()) == list(range(205))
    predicted = np.average(written["click.pred"], weights=written["click.weight"])
    assert result.metrics["click"]["calibration"] == pytest.approx(
        predicted / np.average(labels[:, 0], weights=weights[:, 0]), rel=1e-5
    )
    assert result.metrics["click"]["calibration"] < 0.5 * run(data).metrics["click"]["calibration"]


def test_what_is_raised_before_a_batch_breaks_it_off(data: DataConfig) -> None:
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError("told to stop")

    with pytest.raises(InterruptedError, match="told to stop"):
        run(data, before_each=stop)
    assert len(calls) == 3
