"""Every file of conf/experiment/ is trained on two real ranks, resumed, and trained again on one, on random rows of its own columns."""

import gc
import pickle
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rec.config import CONF, Config
from rec.distributed import process_group
from rec.schema import DataConfig, FeatureKind, TaskKind
from rec.train import train
from tests.conftest import start_ranks
from tests.test_checkpoint import one_process
from tests.test_train import events, weights
from tests.workers.experiments_worker import BATCH, CUT, NUM_STEPS, resumed, small

NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
ONE_OF_EACH_SYSTEM = {name.partition("_")[0]: name for name in NAMES}.values()
NUM_ROWS = 3 * BATCH - 14  # three steps an epoch, the last of them not full; the fourth step is of the second epoch


class RandomRows:
    """Random columns that fit a data set's description.

    A column may be several things at once: an id is below the sizes of all tables that read it, and of the list of domains.
    """

    def __init__(self, data: DataConfig, num_rows: int, *, seed: int) -> None:
        self.data = data
        self.num_rows = num_rows
        self.rng = np.random.default_rng(seed)

    def table(self) -> pa.Table:
        columns = {self.data.column_of(name): self._feature(name) for name in self.data.features}
        if self.data.domain and self.data.domain.column not in columns:
            columns[self.data.domain.column] = pa.array(self.rng.integers(0, len(self.data.domains), self.num_rows))
        if self.data.group and self.data.group not in columns:
            columns[self.data.group] = pa.array(self.rng.integers(0, 5, self.num_rows))
        return pa.table({**columns, **self._floats()})

    def _feature(self, name: str) -> pa.Array:
        feature = self.data.features[name]
        if feature.kind is FeatureKind.dense:
            return pa.array(self.rng.normal(size=self.num_rows).astype(np.float32))
        if feature.kind is FeatureKind.vector:
            values = self.rng.normal(size=self.num_rows * feature.size).astype(np.float32)
            return pa.FixedSizeListArray.from_arrays(pa.array(values), feature.size)
        if feature.kind is FeatureKind.id:
            return pa.array(self._ids(name, self.num_rows))
        ends = np.cumsum(self.rng.integers(0, 6, self.num_rows))
        return pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), pa.array(self._ids(name, ends[-1])))

    def _ids(self, name: str, num: int) -> np.ndarray:
        column = self.data.column_of(name)
        readers = [n for n in self.data.sparse_features if self.data.column_of(n) == column]
        plain = [self.data.table_of(n) for n in readers if not self.data.features[n].hashed]
        limits = [self.data.tables[table].num_embeddings for table in plain]
        if self.data.domain and self.data.domain.column == column and not self.data.domain.allow_unknown:
            limits.append(len(self.data.domains))
        return self.rng.integers(0, min(limits, default=2**62), num)

    def _floats(self) -> dict[str, np.ndarray]:
        """Labels, true probabilities, weights."""
        found = {task.label: self._label(name) for name, task in self.data.tasks.items()}
        for task in self.data.tasks.values():
            found |= {column: self.rng.random(self.num_rows) for column in task.truth_columns}
        own = [self.data.weight, *(task.weight for task in self.data.tasks.values())]
        return found | {column: self.rng.random(self.num_rows) for column in own if column}

    def _label(self, name: str) -> np.ndarray:
        task = self.data.tasks[name]
        if task.kind is TaskKind.regression:
            return self.rng.exponential(3, self.num_rows)
        return self.rng.random(self.num_rows) if task.teacher else self.rng.integers(0, 2, self.num_rows)


def write_rows(data: DataConfig) -> None:
    """A train and an evaluation split at the place that the description names."""
    for seed, split in enumerate(("train", "valid", "test")):
        folder = Path(data.path) / data.splits[split]
        folder.mkdir(parents=True)
        rows = RandomRows(data, NUM_ROWS, seed=seed).table()
        pq.write_table(rows, folder / "part-0.parquet", row_group_size=40)


@dataclass(frozen=True)
class Run:
    """An experiment that was trained on two ranks, and the tensors of its last checkpoint."""

    config: Config
    weights: dict[str, torch.Tensor]

    @property
    def folder(self) -> Path:
        return Path(str(self.config.run_dir))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Every experiment, trained on two ranks in its `run_dir`."""
    folder = tmp_path_factory.mktemp("experiments")
    configs = {name: small(name, folder) for name in NAMES}
    for config in configs.values():
        write_rows(config.data)
    (folder / "configs").write_bytes(pickle.dumps(list(configs.values())))
    start_ranks("tests/workers/experiments_worker.py", str(folder / "configs"))
    return configs


@pytest.fixture(scope="module")
def run(configs: dict[str, Config], request: pytest.FixtureRequest) -> Run:
    config = configs[request.param]
    return Run(config, weights(Path(str(config.run_dir))))


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """The end of a process group collects garbage: let it not look through what all other tests left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def weights_at(step: int, run_dir: Path, folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's checkpoint of one step; `folder` is for a link to it."""
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step_0").symlink_to(run_dir / "checkpoints" / f"step_{step:09d}")
    return weights(folder)


def every_experiment(*, but: Collection[str] = ()) -> pytest.MarkDecorator:
    """A test for each file, a slow one for those in `but`."""
    marked = [pytest.param(name, marks=pytest.mark.slow) if name in but else name for name in NAMES]
    return pytest.mark.parametrize("run", marked, indirect=True, scope="module")


# That the sharded network gives the logits of the one-device network is asserted in the worker, where the ranks are.


@every_experiment()
def test_every_task_has_a_loss_in_every_step(run: Run) -> None:
    losses = [event["losses"] for event in events(run.folder, "train")]
    assert len(losses) == NUM_STEPS
    for step in losses:
        assert step.keys() == run.config.data.tasks.keys()
        assert all(value is not None and value > 0 for value in step.values())


@every_experiment()
def test_nothing_stands_still_but_what_is_frozen(run: Run, tmp_path: Path) -> None:
    before = weights_at(CUT, run.folder, tmp_path)
    names = {key: key.removeprefix("model.") for key in run.weights if key.startswith("model.")}
    frozen = {key for key, name in names.items() if any(fnmatch(name, p) for p in run.config.optim.freeze)}
    assert {key for key in names if torch.equal(before[key], run.weights[key])} == frozen


@every_experiment()
def test_resumed_run_ends_as_the_whole_one(run: Run) -> None:
    folder = Path(resumed(run.config))
    assert [event["step"] for event in events(folder, "start")] == [CUT]
    again = weights(folder)
    assert again.keys() == run.weights.keys()
    for key, value in run.weights.items():
        assert torch.equal(again[key], value), key


@every_experiment(but=set(NAMES) - {*ONE_OF_EACH_SYSTEM})
def test_one_rank_ends_as_two(run: Run, tmp_path: Path) -> None:
    quiet = replace(run.config.trainer, eval_split=None, log_every_steps=NUM_STEPS)
    with one_process(), process_group() as rank:
        train(replace(run.config, run_dir=str(tmp_path), trainer=quiet), rank)
    one = weights(tmp_path)
    assert one.keys() == run.weights.keys()
    for key, value in one.items():
        np.testing.assert_allclose(run.weights[key].numpy(), value.numpy(), rtol=1e-3, atol=2e-5, err_msg=key)
