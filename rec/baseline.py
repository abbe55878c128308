"""What gradient-boosted trees reach on a data set's columns: the number that a network has to beat.

`python -m rec.baseline --data conf/data/kuairand.yaml --path data/kuairand` trains LightGBM once per binary task on split
train and scores split test, with exact metrics from scikit-learn. Trees read what the network reads, row by row: dense
columns and vectors as they are, ids as numbers (as categories where the table has at most `MAX_CATEGORIES` rows), bags
and sequences as their length.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from omegaconf import DictConfig, OmegaConf

from rec.features import hash_strings
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
    """LightGBM's settings. The slow rate and the thin columns keep many weak counters from being overfitted."""

    trees: int = 150
    leaves: int = 31
    learning_rate: float = 0.05
    columns_per_tree: float = 0.5  # share, 0 to 1
    min_rows_per_leaf: int = 100
    threads: int = 0  # 0: LightGBM's choice
    seed: int = 0


@dataclass(frozen=True)
class Matrix:
    """Features [N, F] float32 of a split, with the names of the columns and the places of the categories."""

    values: np.ndarray
    names: list[str]
    categorical: list[int]


def load_data_config(file: Path) -> DataConfig:
    """The data set described in `file`, without Hydra's defaults list.

    Raises:
        ConfigError: no such file.
        omegaconf.errors.OmegaConfBaseException: a key or a value that `DataConfig` does not know.

    """
    if not file.is_file():
        raise ConfigError(
            f"--data {file}: no such file; {nearest(file.name, (f.name for f in file.parent.glob('*.yaml')))}"
        )
    loaded = OmegaConf.load(file)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(
            f"--data {file}: holds a list, expected the keys of a data set, as in conf/data/kuairand.yaml"
        )
    loaded.pop("defaults", None)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), loaded))
    assert isinstance(config, DataConfig)
    return config


def read_split(config: DataConfig, split: str) -> pa.Table:
    """The columns that features and binary tasks of `config` name, all rows of one split.

    Raises:
        ConfigError: unknown split, nothing there, a column that is missing.

    """
    if split not in config.splits:
        raise ConfigError(f"data.splits has no '{split}': {nearest(split, config.splits)}")
    place = Path(config.path) / config.splits[split]
    files = (
        sorted(place.glob("**/*.parquet")) if place.is_dir() else sorted(Path(config.path).glob(config.splits[split]))
    )
    if not files:
        raise ConfigError(f"split '{split}': no Parquet files at {place}; --path names the data set's folder")
    dataset = ds.dataset(files, format="parquet")
    columns = [config.column_of(name) for name in config.features] + [task.label for task in config.tasks.values()]
    for column in columns:
        if column not in dataset.schema.names:
            raise ConfigError(
                f"split '{split}' at {place} has no column '{column}': {nearest(column, dataset.schema.names)}"
            )
    return dataset.to_table(columns=list(dict.fromkeys(columns)))


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
    """[N, 1] float32, or [N, size] of a vector; NaN where null. A string becomes its hash, thinned to 24 bits.

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
        # float32 holds 24 bits exactly
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
    """Exact metrics of predictions [N], 0 to 1, against labels [N] of 0 and 1.

    >>> score(np.array([0, 1]), np.array([0.5, 0.5])).auc
    0.5
    """
    from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

    rows, positives = len(labels), int((labels > 0).sum())
    if not 0 < positives < rows:
        loss = float(log_loss(labels, preds, labels=[0, 1])) if rows else None
        return Score(None, None, loss, rows, positives)
    return Score(
        auc=float(roc_auc_score(labels, preds)),
        pr_auc=float(average_precision_score(labels, preds)),
        logloss=float(log_loss(labels, preds, labels=[0, 1])),
        rows=rows,
        positives=positives,
    )


def fit_predict(train: Matrix, labels: np.ndarray, test: Matrix, *, trees: TreeConfig) -> np.ndarray:
    """Probabilities [N_test] of a model of `train` and its `labels` [N_train], 0 or 1."""
    lightgbm = load_lightgbm()
    parameters: dict[str, Any] = {
        "objective": "binary",
        "num_leaves": trees.leaves,
        "learning_rate": trees.learning_rate,
        "feature_fraction": trees.columns_per_tree,
        "min_data_in_leaf": trees.min_rows_per_leaf,
        "num_threads": trees.threads,
        "seed": trees.seed,
        "deterministic": True,
        "force_row_wise": True,  # what `deterministic` needs
        "verbosity": -1,
    }
    rows = lightgbm.Dataset(train.values, labels, feature_name=train.names, categorical_feature=train.categorical)
    return np.asarray(lightgbm.train(parameters, rows, num_boost_round=trees.trees).predict(test.values))


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
        ConfigError: LightGBM is missing, or the data set is not as `config` says.

    """
    load_lightgbm()
    tables = [read_split(config, split) for split in (train, test)]
    fit_on, score_on = (feature_matrix(table, config) for table in tables)
    scores = {}
    for name, task in config.tasks.items():
        if task.kind is TaskKind.binary:
            (rows, labels), (test_rows, test_labels) = (task_rows(table, config, task) for table in tables)
            if not 0 < labels[rows].sum() < rows.sum():
                raise ConfigError(
                    f"data.tasks.{name}: split '{train}' has {int(labels[rows].sum())} positives in {rows.sum()} rows, "
                    "expected both kinds; train on more days or take the task out"
                )
            preds = fit_predict(_rows(fit_on, rows), labels[rows], _rows(score_on, test_rows), trees=trees)
            scores[name] = score(test_labels[test_rows], preds)
    return scores


def _rows(matrix: Matrix, rows: np.ndarray) -> Matrix:
    return matrix if rows.all() else Matrix(matrix.values[rows], matrix.names, matrix.categorical)


def as_text(scores: dict[str, Score]) -> str:
    """A table, one task a line."""
    lines = [f"{'task':<18}{'auc':>9}{'pr_auc':>9}{'logloss':>9}{'rows':>10}{'positives':>11}"]
    for name, s in scores.items():
        metrics = "".join(
            f"{'-' if value is None else format(value, '.4f'):>9}" for value in (s.auc, s.pr_auc, s.logloss)
        )
        lines.append(f"{name:<18}{metrics}{s.rows:>10}{s.positives:>11}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    defaults = TreeConfig()
    p = argparse.ArgumentParser(
        prog="python -m rec.baseline",
        description="Train LightGBM for each binary task on the columns a data set's YAML names, and score the test split.",
        epilog="example: python -m rec.baseline --data conf/data/kuairand.yaml --path data/kuairand --json scores.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data", type=Path, required=True, help="YAML of the data set")
    p.add_argument("--path", help="folder of the data set, in place of the YAML's path")
    p.add_argument("--train", default="train", help="split to train on")
    p.add_argument("--test", default="test", help="split to score, as one of data.splits")
    p.add_argument("--trees", type=int, default=defaults.trees, help="trees a task")
    p.add_argument("--leaves", type=int, default=defaults.leaves, help="leaves a tree")
    p.add_argument(
        "--learning-rate", type=float, default=defaults.learning_rate, help="share of each tree that is added"
    )
    p.add_argument("--threads", type=int, default=defaults.threads, help="threads; 0: LightGBM's choice")
    p.add_argument("--seed", type=int, default=defaults.seed, help="of the choice of columns")
    p.add_argument("--json", type=Path, help="file to write {task: {auc, pr_auc, logloss, rows, positives}} to")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parser().parse_args(argv)
    trees = TreeConfig(
        trees=args.trees, leaves=args.leaves, learning_rate=args.learning_rate, threads=args.threads, seed=args.seed
    )
    try:
        config = load_data_config(args.data)
        config.path = args.path or config.path
        scores = run_baseline(config, trees=trees, train=args.train, test=args.test)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    print(as_text(scores))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({name: asdict(s) for name, s in scores.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
