import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from rec import baseline
from rec.baseline import TreeConfig
from rec.features import DataError
from rec.schema import ConfigError, FeatureConfig, FeatureKind

TOY = """
defaults: [base, _self_]
name: toy
path: nowhere
splits: {train: train, test: 'test/*.parquet'}
features:
  user: {kind: id}
  shop: {kind: id, hashed: true}
  tags: {kind: bag}
  price: {kind: dense}
  text: {kind: vector, size: 2}
tables:
  user: {num_embeddings: 9}
  shop: {num_embeddings: 100}
  tags: {num_embeddings: 9}
tasks:
  click: {label: click}
  buy: {label: buy, condition: click}
  seconds: {label: seconds, kind: regression}
"""
TREES = TreeConfig(num_trees=20, num_leaves=7, learning_rate=0.2, num_threads=1)


def toy_table(seed: int, num_rows: int = 2000) -> pa.Table:
    """Clicks depend on user and text, purchases after a click on the number of tags."""
    rng = np.random.default_rng(seed)
    user, price = rng.integers(9, size=num_rows), rng.random(num_rows)
    text = rng.standard_normal((num_rows, 2)).astype(np.float32)
    lengths = rng.integers(4, size=num_rows)
    click = rng.random(num_rows) < 1 / (1 + np.exp(-((user % 3) - 1 + 2 * text[:, 1])))
    buy = click & (rng.random(num_rows) < 0.1 + 0.25 * lengths)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.table(
        {
            "user": user,
            "shop": [f"shop {i % 5}" for i in range(num_rows)],
            "tags": pa.ListArray.from_arrays(offsets, pa.array(rng.integers(9, size=lengths.sum()))),
            "price": price,
            "text": pa.FixedSizeListArray.from_arrays(pa.array(text.ravel()), 2),
            "click": click.astype(np.int8),
            "buy": buy.astype(np.int8),
            "seconds": price,
        }
    )


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for seed, split in enumerate(("train", "test")):
        (tmp_path / split).mkdir()
        pq.write_table(toy_table(seed), tmp_path / split / "part-0.parquet")
    (tmp_path / "toy.yaml").write_text(TOY)
    return tmp_path


def load(toy: Path) -> baseline.DataConfig:
    config = baseline.load_data_config(toy / "toy.yaml")
    config.path = str(toy)
    return config


def test_the_toy_is_learned_and_conditions_restrict_rows(toy: Path) -> None:
    test = toy_table(1)
    clicks = int(np.sum(test["click"].to_numpy()))
    scores = baseline.run_baseline(load(toy), trees=TREES)
    assert list(scores) == ["click", "buy"]  # regression is not scored
    assert (scores["click"].rows, scores["click"].positives) == (2000, clicks)
    assert (scores["buy"].rows, scores["buy"].positives) == (clicks, int(np.sum(test["buy"].to_numpy())))
    assert scores["click"].auc is not None
    assert scores["buy"].auc is not None
    assert scores["click"].auc > 0.8
    assert scores["buy"].auc > 0.65


def test_shuffled_labels_are_not_learned(toy: Path) -> None:
    table = toy_table(0)
    shuffled = pa.array(np.random.default_rng(0).permutation(table["click"].to_numpy()))
    table = table.set_column(table.column_names.index("click"), "click", shuffled)
    pq.write_table(table, toy / "train" / "part-0.parquet")
    scores = baseline.run_baseline(load(toy), trees=TREES)
    assert scores["click"].auc == pytest.approx(0.5, abs=0.06)


def test_metrics_are_those_of_scikit_learn_on_the_same_predictions(toy: Path) -> None:
    config = load(toy)
    train, test = (baseline.read_split(config, split) for split in ("train", "test"))
    labels = [np.asarray(table["click"], np.float32) for table in (train, test)]
    matrices = [baseline.feature_matrix(table, config) for table in (train, test)]
    preds = baseline.fit_predict(matrices[0], labels[0], matrices[1], trees=TREES)
    found = baseline.run_baseline(config, trees=TREES)["click"]
    assert found.auc == roc_auc_score(labels[1], preds)
    assert found.pr_auc == average_precision_score(labels[1], preds)
    assert found.logloss == log_loss(labels[1], preds)
    # the definition of AUC: the share of pairs in the right order
    positive, negative = preds[labels[1] > 0], preds[labels[1] == 0]
    pairs = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    assert found.auc == pytest.approx(pairs, abs=1e-12)


def test_the_matrix_holds_what_the_features_name(toy: Path) -> None:
    config, table = load(toy), toy_table(1)
    found = baseline.feature_matrix(baseline.read_split(config, "test"), config)
    assert found.names == ["user", "shop", "tags", "price", "text_0", "text_1"]
    assert found.categorical == [0]  # the table of shops is larger than MAX_CATEGORIES
    np.testing.assert_array_equal(found.values[:, 0], table["user"])
    np.testing.assert_array_equal(found.values[:, 2], [len(tags) for tags in table["tags"].to_pylist()])
    np.testing.assert_array_equal(found.values[:, 4:], table["text"].to_pylist())
    assert len(np.unique(found.values[:, 1])) == 5
    np.testing.assert_array_equal(found.values[0, 1], found.values[5, 1])


def test_files_and_row_groups_are_joined_in_order(toy: Path) -> None:
    table = toy_table(1, 50)
    narrow = table.slice(20).set_column(0, "user", table["user"].slice(20).cast(pa.int32()))
    pq.write_table(table.slice(0, 20), toy / "test" / "part-0.parquet", row_group_size=7)
    pq.write_table(narrow, toy / "test" / "part-1.parquet")
    found = baseline.read_split(load(toy), "test")
    assert found["user"].to_pylist() == table["user"].to_pylist()
    assert found["tags"].to_pylist() == table["tags"].to_pylist()


def test_null_cells_are_nan() -> None:
    dense = baseline.feature_columns(pa.array([1.5, None]), FeatureConfig(kind=FeatureKind.dense))
    np.testing.assert_array_equal(dense, [[1.5], [np.nan]])
    vectors = pa.array([None, [1.0, 2.0]], pa.list_(pa.float32(), 2))
    found = baseline.feature_columns(vectors, FeatureConfig(kind=FeatureKind.vector, size=2))
    np.testing.assert_array_equal(found, [[np.nan, np.nan], [1, 2]])


def test_a_task_without_both_classes_has_no_auc() -> None:
    found = baseline.score(np.zeros(3), np.full(3, 0.25))
    assert (found.auc, found.pr_auc, found.rows, found.positives) == (None, None, 3, 0)
    assert found.logloss == pytest.approx(-np.log(0.75))


def test_the_command_prints_and_writes_the_scores(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(toy / "toy.yaml"), "--path", str(toy), "--num-trees", "5", "--num-threads", "1"]
    baseline.main([*arguments, "--json", str(toy / "scores.json")])
    scores = json.loads((toy / "scores.json").read_text())
    assert set(scores) == {"click", "buy"}
    assert set(scores["click"]) == {"auc", "pr_auc", "logloss", "rows", "positives"}
    assert f"{scores['click']['auc']:.4f}" in capsys.readouterr().out
    again = toy / "again.json"
    baseline.main([*arguments, "--json", str(again)])
    assert json.loads(again.read_text()) == scores


def test_a_missing_extra_is_named(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(SystemExit, match=r"extra 'baseline'"):
        baseline.main(["--data", str(toy / "toy.yaml"), "--path", str(toy)])


def test_what_is_wrong_with_the_data_is_named(toy: Path) -> None:
    with pytest.raises(SystemExit, match=r"--data .*toi\.yaml: no such file; did you mean 'toy\.yaml'"):
        baseline.main(["--data", str(toy / "toi.yaml")])
    with pytest.raises(SystemExit, match=r"no Parquet files in split 'train' .*data\.path=nowhere"):
        baseline.main(["--data", str(toy / "toy.yaml")])
    config = load(toy)
    with pytest.raises(ConfigError, match=r"no split 'tset': did you mean 'test'"):
        baseline.run_baseline(config, trees=TREES, test="tset")
    pq.write_table(toy_table(0).drop_columns(["price"]), toy / "train" / "part-0.parquet")
    with pytest.raises(DataError, match=r"train/part-0\.parquet: column 'price' is missing"):
        baseline.run_baseline(config, trees=TREES)
    pq.write_table(toy_table(0).slice(0, 0), toy / "train" / "part-0.parquet")
    with pytest.raises(DataError, match="split 'train' in .*: no rows in 1 files"):
        baseline.run_baseline(config, trees=TREES)
    (toy / "toy.yaml").write_text(TOY.replace("condition", "condiment"))
    with pytest.raises(SystemExit, match="condiment"):
        baseline.main(["--data", str(toy / "toy.yaml")])


def test_a_task_that_never_happens_in_train_is_named(toy: Path) -> None:
    table = toy_table(0)
    none = pa.array(np.zeros(table.num_rows, np.int8))
    pq.write_table(table.set_column(table.column_names.index("buy"), "buy", none), toy / "train" / "part-0.parquet")
    with pytest.raises(ConfigError, match=r"data\.tasks\.buy: split 'train' has 0 positives"):
        baseline.run_baseline(load(toy), trees=TREES)
