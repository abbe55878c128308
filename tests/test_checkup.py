"""What a configuration comes to: composed, against its data and a machine, with everything that is wrong at once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rec import checkup
from rec.checkpoint import CheckpointConfig
from rec.config import Config, compose
from rec.findings import Finding, render
from tests.conftest import CONF, toy_overrides
from tests.test_bad_input import column, twice, value

PLENTY = 2**40


def look(path: Path, *more: str, memory: int = PLENTY, ranks: int = 2) -> list[Finding]:
    overrides = toy_overrides(path, f"run_dir={path}/run", *more)
    return checkup.checkup(overrides, ranks=ranks, memory=memory, config_dir=str(CONF))


def problems(findings: list[Finding]) -> str:
    return "\n".join(f"{f.problem} -> {f.remedy}" for f in findings if f.problem)


@pytest.fixture
def spoilt(toy: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the toy data in which a function has changed one file of the training split."""

    def copy(change: Callable[[pa.Table], pa.Table], *, split: str = "train", part: int = 3) -> Path:
        folder = tmp_path / "toy"
        if not folder.exists():
            shutil.copytree(toy, folder)
        file = folder / split / f"part-{part}.parquet"
        pq.write_table(change(pq.read_table(file)), file, row_group_size=100)
        return folder

    return copy


def put(name: str, found: Any, *, row: int = 150) -> Callable[[pa.Table], pa.Table]:
    return value(name, found, row=row)


# --- all is well ---


def test_a_sound_run_has_no_problems_and_says_what_it_saw(toy: Path) -> None:
    findings = look(toy)
    assert problems(findings) == ""
    said = {f.name: f.value for f in findings}
    assert said["configuration"] == "toy: 7 features, 4 tables, 3 tasks"
    assert said["split train"] == "1,004 rows in 13 row groups of 4 files"
    assert said["values train"] == "1,004 rows looked at, 100% of the split"
    files = pa.concat_tables(
        [pq.read_table(file).drop_columns(["query"]) for file in (toy / "train").glob("*.parquet")]
    )
    users, clicks = len(files["user"].unique()), files["click"].to_numpy()
    assert abs(users - float(said["table user"].split()[1].replace(",", ""))) < 1  # all rows were looked at
    assert f"the highest {max(files['user'].to_pylist())}" in said["table user"]
    assert said["task click"].startswith(f"train {clicks.mean():.3%} positive, valid ")
    bought = files["purchase"].to_numpy()[clicks]  # given a click
    assert said["task purchase"].startswith(f"train {bought.mean():.3%} positive")
    assert "memory of 2 ranks" in said and "checkpoints" in said
    assert render(findings).endswith("all is well")


def test_a_refused_configuration_is_one_finding(toy: Path) -> None:
    (finding,) = look(toy, "trainer.max_step=3")
    assert finding.problem and finding.problem.startswith(
        "no setting 'trainer.max_step'; did you mean 'max_steps'? valid: "
    )


# --- files and columns ---


def test_every_split_that_cannot_be_read_is_named(toy: Path) -> None:
    found = problems(look(toy, "data.splits.valid=vlaid", "data.splits.test=tset"))
    assert "split 'valid' (vlaid)" in found and "split 'test' (tset)" in found


def test_every_column_of_every_split_is_named_at_once(spoilt: Callable[..., Path]) -> None:
    spoilt(lambda t: twice("user")(t.drop_columns("price")))
    path = spoilt(column("query", 7), split="valid")
    found = problems(look(path))
    assert "train/part-3.parquet: column 'price' is missing" in found
    assert "train/part-3.parquet: column 'user' is there 2 times" in found
    assert "valid/part-3.parquet: column 'query' holds int64, but" in found and "part-0.parquet string" in found
    assert "values train" not in {f.name for f in look(path)}  # which could not be decoded


def test_ids_that_are_text_in_one_split_and_numbers_in_another_are_named(spoilt: Callable[..., Path]) -> None:
    for part in range(4):
        path = spoilt(lambda t: column("query", pa.array(range(t.num_rows)))(t), split="valid", part=part)
    assert problems(look(path)).count("the same id would be another") == 1


# --- values ---


def test_all_that_is_wrong_with_values_is_found_at_once(spoilt: Callable[..., Path]) -> None:
    wrong = {"user": 9999, "item": None, "tags": [11], "price": float("nan"), "text": [1.0], "tab": "feed"}
    wrong |= {"purchase": 7, "dwell": float("inf"), "trust": -1.0, "query": None}

    def change(table: pa.Table) -> pa.Table:
        for name, bad in wrong.items():
            loose = {"text": pa.list_(pa.float32())}
            table = column(name, table[name].to_pylist(), loose[name])(table) if name in loose else table
            table = put(name, bad)(table)
        return put("price", float("nan"), row=250)(table)  # of another row group: said once

    found = problems(look(spoilt(change)))
    for name in wrong:
        assert f"part-3.parquet, row group 1: column '{name}' " in found, name
    assert found.count("column 'price' holds nan") == 1


def test_damaged_row_groups_are_named_and_the_rest_is_looked_at(spoilt: Callable[..., Path]) -> None:
    path = spoilt(lambda t: t)
    file = path / "train" / "part-3.parquet"
    content = bytearray(file.read_bytes())
    content[4:2000] = b"\xff" * 1996
    file.write_bytes(content)
    findings = {f.name: f for f in look(path)}
    assert "part-3.parquet, row group 0: cannot be decoded" in (findings["values train"].problem or "")
    assert "904 rows looked at" in findings["values train"].value


def test_nulls_and_repairs_are_counted(spoilt: Callable[..., Path]) -> None:
    path = spoilt(lambda t: put("item", None)(put("history", [1, None, 2])(t)))
    allow = [f"data.features.{name}.allow_null=true" for name in ("item", "history", "price")]
    findings = {f.name: f for f in look(path, *allow)}
    assert findings["nulls"].value == f"item {1 / 3012:.2%}, history {1 / 3012:.2%}" and not findings["nulls"].problem
    assert "item: null read as no id: 1" in findings["values train"].value
    for split in ("train", "valid"):
        for part in range(4):
            spoilt(lambda t: column("price", pa.nulls(t.num_rows, pa.float32()))(t), split=split, part=part)
    assert "column 'price' of a feature is null in every row" in problems(look(path, *allow))


# --- tables and tasks ---


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "data.tables.query.num_embeddings=20",
            "'query' has 20 rows for about 40 hashed ids, 86% of which share theirs",
        ),
        ("data.tables.tags.num_embeddings=2000", "'tags' has 2,000 rows, of which about 11 are ever used"),
        ("data.tables.item.num_embeddings=100", "expected 0 to 99; raise data.tables.item.num_embeddings"),
    ],
)
def test_tables_that_are_too_small_or_too_large(toy: Path, setting: str, words: str) -> None:
    assert words in problems(look(toy, setting))


def test_distinct_ids_are_estimated_from_a_share_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    ids = rng.zipf(1.3, 200_000) % 30_000
    exact = len(np.unique(ids))
    assert checkup.estimated_distinct(ids, 1.0) == exact
    part = rng.choice(ids, 20_000, replace=False)
    assert len(np.unique(part)) < 0.4 * exact
    assert 0.5 < checkup.estimated_distinct(part, 0.1) / exact < 2
    every = rng.permutation(30_000)[:3000]  # each id once: the bound of the estimator, sqrt(10) off
    assert checkup.estimated_distinct(every, 0.1) == pytest.approx(30_000 / 10**0.5)


@pytest.mark.parametrize(
    ("name", "label", "words"),
    [
        ("click", False, ["'click' has no positives", "'purchase' has no rows that count", "'dwell' has no rows that"]),
        ("click", True, ["task 'click' has the label 1 alone in 1,004 rows of split 'train'"]),
        ("purchase", 0, ["task 'purchase' has no positives"]),
        ("dwell", 2.0, ["task 'dwell' has the label"]),
    ],
)
def test_labels_from_which_nothing_is_learned(
    spoilt: Callable[..., Path], name: str, label: Any, words: list[str]
) -> None:
    for part in range(4):
        path = spoilt(lambda t: column(name, pa.array([label] * t.num_rows))(t), part=part)
    found = problems(look(path))
    assert all(word in found for word in words), found


# --- memory and room ---


def numel(config: Config) -> tuple[int, int]:
    """Weights of the tables and of the dense part, by hand."""
    rows = {"user": (997, 8), "query": (50, 8), "item": (203, 16), "tags": (11, 4)}
    model = checkup.Ranker(config.model, config.data, device=torch.device("meta"))
    dense = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings."))
    return sum(n * d for n, d in rows.values()), dense


@pytest.mark.parametrize(
    ("kind", "state"), [("rowwise_adagrad", 997 + 50 + 203 + 11), ("sgd", 0), ("adagrad", 1), ("adam", 2)]
)
def test_a_checkpoint_s_size_is_that_of_weights_and_moments(toy: Path, kind: str, state: int) -> None:
    config = compose(toy_overrides(toy, f"optim.sparse.kind={kind}"), config_dir=str(CONF))
    tables, dense = numel(config)
    size = checkup.Size(config)
    assert size.tables == 4 * (tables + (state * tables if state in (1, 2) else state))
    assert size.checkpoint == size.tables + 4 * 3 * dense  # weights and Adam's two moments
    assert checkup.Size(compose(toy_overrides(toy, "optim.dense.kind=sgd"), config_dir=str(CONF))).dense == 12 * dense


def test_memory_that_is_not_there_is_named_and_grows_with_ranks(toy: Path) -> None:
    def needed(ranks: int) -> float:
        findings = {f.name: f for f in look(toy, memory=2**20, ranks=ranks)}
        assert "are needed before the first step, 0.00 GiB are there" in (
            findings[f"memory of {ranks} ranks"].problem or ""
        )
        return float(findings[f"memory of {ranks} ranks"].value.split()[0])

    assert needed(4) > 1.9 * needed(2)
    large = ["data.tables.user.num_embeddings=1_000_000_000", "checkpoint.asynchronous=false"]
    found = {f.name: f.value for f in look(toy, *large)}["memory of 2 ranks"]
    assert 0 < float(found.split()[0]) - 1e9 * (8 + 1) * 4 / 2**30 < 4  # weights and accumulators, and two processes


def test_an_optimizer_that_this_machine_lacks_is_named(toy: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU has all optimizers")
    assert "optim.sparse.kind=adam needs a GPU" in problems(look(toy, "optim.sparse.kind=adam"))


def test_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, size = CheckpointConfig(keep_last=2, keep_best=1), 1000
    run = str(tmp_path / "not" / "yet")
    for free, wrong in ((4000, False), (3999, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        (finding,) = checkup.check_room(run, config, size)
        assert bool(finding.problem) == wrong and str(tmp_path) in finding.value
    old = tmp_path / "not" / "yet" / "checkpoints" / "step_1"
    old.mkdir(parents=True)
    (old / "tensors").write_bytes(b"x" * 1000)  # will be dropped in favour of another
    (finding,) = checkup.check_room(run, config, size)
    assert not finding.problem
    (finding,) = checkup.check_room("s3://bucket/run", config, size)
    assert not finding.problem and "s3://bucket/run" in finding.value
