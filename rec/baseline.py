"""What gradient-boosted trees reach on a data set's columns: the number that a network has to beat.

`python -m rec.baseline --data conf/data/kuairand.yaml --path data/kuairand` trains LightGBM once per binary task on split
train and scores split test, with exact metrics from scikit-learn. Trees read what the network reads, row by row: dense
columns and vectors as they are, ids as numbers (as categories where the table has at most `MAX_CATEGORIES` rows), bags
and sequences as their length.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rec.data import Split
from rec.features import DataError, Encoder
from rec.hashing import hash_strings
from rec.schema import ConfigError, DataConfig, FeatureConfig, FeatureKind, TaskConfig, TaskKind, nearest

MAX_CATEGORIES = 64  # more values than this split better as ordered numbers


@dataclass(frozen=True)
class Score:
    """One task on the test rows; a metric is None where it has no meaning."""

    auc: float | None
    pr_auc: float | None
    logloss: float | None
    rows: int
    positives: int


@dataclass(frozen=True)
class TreeConfig:
    """LightGBM's settings, by its names. The slow rate and the thin columns keep weak counters from being overfitted."""

    num_trees: int = field(default=150, metadata={"help": "trees a task"})
    num_leaves: int = field(default=31, metadata={"help": "leaves a tree"})
    learning_rate: float = field(default=0.05, metadata={"help": "share of each tree that is added, 0 to 1"})
    feature_fraction: float = field(
        default=0.5, metadata={"help": "share of the columns that each tree may use, 0 to 1"}
    )
    min_data_in_leaf: int = field(default=100, metadata={"help": "rows a leaf has at least"})
    num_threads: int = field(default=0, metadata={"help": "threads; 0: LightGBM's choice"})
    seed: int = field(default=0, metadata={"help": "of the choice of columns"})


@dataclass(frozen=True)
class Matrix:
    """Features [N, F] float32 of a split, with the names of the columns and the places of the categories."""

    values: np.ndarray
    names: list[str]
    categorical: list[int]

    def filter(self, rows: np.ndarray) -> "Matrix":
        """The chosen rows [N] bool."""
        return self if rows.all() else replace(self, values=self.values[rows])


def load_data_config(file: Path) -> DataConfig:
    """The data set described in `file`, without Hydra's defaults list.

    Raises:
        ConfigError: no such file.
        omegaconf.errors.OmegaConfBaseException: a key or a value that `DataConfig` does not know.
    """
    if not file.is_file():
        names = (other.name for other in file.parent.glob("*.yaml"))
        raise ConfigError(f"--data {file}: no such file; {nearest(file.name, names)}")
    loaded = OmegaConf.load(file)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"--data {file}: a list, expected the keys of a data set as in conf/data/kuairand.yaml")
    loaded.pop("defaults", None)
    return cast(DataConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), loaded)))


def read_split(config: DataConfig, split: str) -> pa.Table:
    """The columns that `config` names, all rows of one split.

    Raises:
        ConfigError: unknown split.
        DataError: no files or rows there, or columns that do not fit `config`.
    """
    found, encoder = Split(config, split), Encoder(config)
    found.check_schema(encoder)
    if not found.num_rows:
        raise DataError(f"split '{split}' in {config.path}: no rows in {len(found.files)} files; write them again")
    tables = [found.read(group, encoder.columns) for group in found.row_groups]
    return pa.concat_tables(tables, promote_options="permissive")  # files may differ in the width of their integers


def feature_matrix(table: pa.Table, config: DataConfig) -> Matrix:
    """What trees read of `table`: one column a feature, `size` columns a vector."""
    parts: list[np.ndarray] = []
    names: list[str] = []
    categorical: list[int] = []
    for name, feature in config.features.items():
        part = feature_columns(table[config.column_of(name)].combine_chunks(), feature)
        if feature.kind is FeatureKind.id and config.tables[config.table_of(name)].num_embeddings <= MAX_CATEGORIES:
            categorical.append(len(names))
        names += [name] if part.shape[1] == 1 else [f"{name}_{i}" for i in range(part.shape[1])]
        parts.append(part)
    return Matrix(np.concatenate(parts, axis=1), names, categorical)


def feature_columns(array: pa.Array, feature: FeatureConfig) -> np.ndarray:
    """[N, 1] float32, or [N, size] of a vector; NaN where null. A string becomes 24 bits of its hash: float32 holds no more.

    >>> feature_columns(pa.array([[1, 2], [], None]), FeatureConfig(kind=FeatureKind.bag)).ravel().tolist()
    [2.0, 0.0, 0.0]
    """
    if feature.kind in (FeatureKind.bag, FeatureKind.sequence):
        array = pc.fill_null(pc.list_value_length(array), 0)
    if feature.kind is FeatureKind.vector:
        row = np.asarray(pc.list_parent_indices(array))
        values = np.full((len(array), feature.size), np.nan, np.float32)
        values[np.unique(row)] = np.asarray(array.flatten(), np.float32).reshape(-1, feature.size)
        return values
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return (hash_strings(array) >> np.uint64(40)).astype(np.float32)[:, None]
    return array.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)[:, None]


def task_rows(table: pa.Table, config: DataConfig, task: TaskConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N] bool that count for a task (label known, condition met), and labels [N] float32."""
    label = table[task.label]
    counts = np.asarray(label.is_valid())
    if task.condition is not None:
        counts = counts & (np.asarray(table[config.tasks[task.condition].label].fill_null(0)) > 0)
    return counts, np.asarray(label.fill_null(0), np.float32)


def score(labels: np.ndarray, preds: np.ndarray) -> Score:
    """Exact metrics of predictions [N], 0 to 1, against labels [N] of 0 and 1."""
    from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

    rows, positives = len(labels), int((labels > 0).sum())
    both = 0 < positives < rows
    return Score(
        auc=float(roc_auc_score(labels, preds)) if both else None,
        pr_auc=float(average_precision_score(labels, preds)) if both else None,
        logloss=float(log_loss(labels, preds, labels=[0, 1])) if rows else None,
        rows=rows,
        positives=positives,
    )


def fit_predict(train: Matrix, labels: np.ndarray, test: Matrix, *, trees: TreeConfig) -> np.ndarray:
    """Probabilities [N_test] of a model of `train` and its `labels` [N_train], 0 or 1."""
    lightgbm = load_lightgbm()
    parameters = {"objective": "binary", "verbosity": -1, **asdict(trees)}
    num_trees = parameters.pop("num_trees")
    parameters |= {"deterministic": True, "force_row_wise": True}  # the former needs the latter
    rows = lightgbm.Dataset(train.values, labels, feature_name=train.names, categorical_feature=train.categorical)
    return np.asarray(lightgbm.train(parameters, rows, num_boost_round=num_trees).predict(test.values))


def load_lightgbm() -> Any:
    """The module `lightgbm`; `ConfigError` that names the extra where it is not installed."""
    try:
        import lightgbm
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error}: the baseline needs the extra 'baseline': pip install '.[baseline]'") from error
    return lightgbm


def run_baseline(
    config: DataConfig, *, trees: TreeConfig, train: str = "train", test: str = "test"
) -> dict[str, Score]:
    """Each binary task's score on split `test` after training on split `train`.

    Raises:
        ConfigError: LightGBM is missing, an unknown split, or a task that `train` cannot teach.
        DataError: the files are not as `config` says.
    """
    load_lightgbm()
    tables = [read_split(config, split) for split in (train, test)]
    fit_on, score_on = (feature_matrix(table, config) for table in tables)
    scores = {}
    for name, task in config.tasks.items():
        if task.kind is TaskKind.binary:
            (rows, labels), (test_rows, test_labels) = (task_rows(table, config, task) for table in tables)
            if not 0 < labels[rows].sum() < rows.sum():
                found = f"{int(labels[rows].sum())} positives in {rows.sum()} rows"
                raise ConfigError(f"data.tasks.{name}: split '{train}' has {found}, expected both; take more days")
            preds = fit_predict(fit_on.filter(rows), labels[rows], score_on.filter(test_rows), trees=trees)
            scores[name] = score(test_labels[test_rows], preds)
    return scores


def as_text(scores: dict[str, Score]) -> str:
    """A table, one task a line."""
    lines = [f"{'task':<18}{'auc':>9}{'pr_auc':>9}{'logloss':>9}{'rows':>10}{'positives':>11}"]
    for name, s in scores.items():
        metrics = ["-" if value is None else f"{value:.4f}" for value in (s.auc, s.pr_auc, s.logloss)]
        lines.append(f"{name:<18}{''.join(f'{cell:>9}' for cell in metrics)}{s.rows:>10}{s.positives:>11}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m rec.baseline",
        description="Train LightGBM for each binary task on the columns that a YAML names, and score the test split.",
        epilog="example: python -m rec.baseline --data conf/data/kuairand.yaml --path data/kuairand --json scores.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data", type=Path, required=True, help="YAML of the data set")
    p.add_argument("--path", help="folder of the data set, in place of the YAML's path")
    p.add_argument("--train", default="train", help="split to train on")
    p.add_argument("--test", default="test", help="split to score, as one of data.splits")
    for f in fields(TreeConfig):
        option = f"--{f.name.replace('_', '-')}"
        p.add_argument(option, type=type(f.default), default=f.default, help=f.metadata["help"])
    p.add_argument("--json", type=Path, help="file to write {task: {auc, pr_auc, logloss, rows, positives}} to")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parser().parse_args(argv)
    trees = TreeConfig(**{f.name: getattr(args, f.name) for f in fields(TreeConfig)})
    try:
        config = load_data_config(args.data)
        config.path = args.path or config.path
        scores = run_baseline(config, trees=trees, train=args.train, test=args.test)
    except (ConfigError, DataError, OmegaConfBaseException) as error:
        raise SystemExit(f"error: {error}") from error
    print(as_text(scores))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({name: asdict(s) for name, s in scores.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
