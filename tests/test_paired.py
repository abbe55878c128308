"""Predictions are read whatever ranks wrote them, paired by row, and refused where that has no meaning."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec import storage
from rec.paired import check_same_rows, how_rows_differ, read_predictions, shared_tasks, slices_of
from rec.schema import ConfigError

Columns = dict[str, np.ndarray]


def make_columns(num_rows: int = 1000, *, seed: int = 0, world: int = 0, noise: float = 1.0) -> Columns:
    """Rows of a `world`, and predictions for them that differ by `seed`: click, buy given click, and seconds."""
    rng = np.random.default_rng(world)
    true = rng.normal(size=num_rows) - 1
    truth = 1 / (1 + np.exp(-true))
    click = rng.random(num_rows) < truth
    buy = click & (rng.random(num_rows) < 0.4)
    domain, group, seconds = rng.integers(0, 2, num_rows), rng.integers(0, 99, num_rows), rng.exponential(3, num_rows)
    rng = np.random.default_rng(1000 * world + seed + 1)

    def guess() -> np.ndarray:
        return (true + noise * rng.normal(size=num_rows)).astype(np.float32)

    columns = {"row": np.arange(num_rows), "domain": domain.astype(np.int32), "group": group}
    columns |= {"click.label": click, "click.weight": np.ones(num_rows), "click.logit": guess(), "click.truth": truth}
    columns |= {"buy.label": buy, "buy.weight": click, "buy.logit": guess()}
    columns |= {"seconds.label": seconds, "seconds.weight": np.ones(num_rows), "seconds.logit": seconds + guess()}
    return {name: x if name in ("row", "domain", "group") else x.astype(np.float32) for name, x in columns.items()}


def write_predictions(folder: Path, columns: Columns, *, ranks: int = 2, **about: Any) -> Path:
    """`folder`/part-*.parquet, as ranks write them: rows in any order."""
    tasks = {
        n.removesuffix(".logit"): "regression" if "sec" in n else "binary" for n in columns if n.endswith(".logit")
    }
    known = {"step": 1200, "split": "test", "calibrated": False, "tasks": tasks, "domains": ["home", "search"]}
    metadata = {b"rec": json.dumps(known | {"grouped": True, "auxiliary": []} | about).encode()}
    order = np.random.default_rng(len(str(folder))).permutation(len(columns["row"]))
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        part = pa.table({name: values[order[rank::ranks]] for name, values in columns.items()})
        pq.write_table(part.replace_schema_metadata(metadata), folder / f"part-{rank:05d}.parquet")
    return folder


def write_run(run: Path, columns: Columns, **about: Any) -> Path:
    write_predictions(run / "predictions" / about.get("split", "test"), columns, **about)
    return run


def test_a_run_in_a_store_is_read_as_one_on_disk(tmp_path: Path) -> None:
    local = write_run(tmp_path / "run", make_columns())
    stored = storage.path("memory://paired/run")
    for file in (local / "predictions" / "test").iterdir():
        storage.put(file, stored / "predictions" / "test" / file.name)
    assert read_predictions(stored).table.equals(read_predictions(local).table)


def test_rows_are_in_order_whatever_ranks_wrote_them(tmp_path: Path) -> None:
    columns = make_columns()
    runs = [
        read_predictions(write_run(tmp_path / "experts=mmoe" / "row=1", columns, ranks=3)),
        read_predictions(write_predictions(tmp_path / "out", columns, ranks=1)),  # of rec.predict, out=DIR
    ]
    for run in runs:
        assert run.column("row", np.int64).tolist() == list(range(1000))
        rows = run.rows_of("click")
        assert rows.scores.dtype == np.float64 and (rows.scores == columns["click.logit"]).all()
        assert (rows.labels == columns["click.label"]).all() and (rows.truth == columns["click.truth"]).all()
        assert (rows.groups == columns["group"]).all() and (rows.domain_id == columns["domain"]).all()
        assert run.rows_of("buy").truth is None
        assert (run.split, run.step, run.calibrated) == ("test", 1200, False)
    assert how_rows_differ(runs[1], reference=runs[0], tasks=shared_tasks(runs)) is None
    plain = read_predictions(write_run(tmp_path / "plain", columns, grouped=False))
    assert plain.rows_of("click").groups is None


def test_slices_hold_the_rows_that_count(tmp_path: Path) -> None:
    columns = make_columns()
    runs = [
        read_predictions(write_run(tmp_path / name, make_columns(seed=seed))) for seed, name in enumerate(("a", "b"))
    ]
    whole, home, search = slices_of(runs, "buy", domains=True)
    counts = columns["click.label"] == 1
    assert (whole.domain, home.domain, search.domain) == (None, "home", "search")
    assert whole.num_rows == counts.sum() == home.num_rows + search.num_rows
    assert (home.rows[0].scores == columns["buy.logit"][counts & (columns["domain"] == 0)]).all()
    assert (home.rows[0].labels == home.rows[1].labels).all() and (home.rows[0].scores != home.rows[1].scores).any()
    assert [part.domain for part in slices_of(runs, "buy")] == [None]
    assert [part.kind for part in slices_of(runs, "seconds")] == ["regression"]


def test_truth_that_one_run_knows_serves_all(tmp_path: Path) -> None:
    columns = make_columns()
    blind = {name: values for name, values in columns.items() if name != "click.truth"}
    runs = [read_predictions(write_run(tmp_path / n, c)) for n, c in (("a", blind), ("b", columns))]
    (part,) = slices_of(runs, "click")
    assert (part.rows[0].truth == columns["click.truth"]).all()


def test_tasks_that_all_runs_have(tmp_path: Path) -> None:
    columns = make_columns()
    few = {name: values for name, values in columns.items() if not name.startswith("click")}
    other = {name.replace("seconds", "second"): values for name, values in few.items()}
    kinds = {"buy": "binary", "seconds": "binary"}
    named = {"all": (columns, {}), "few": (few, {}), "other": (other, {}), "kind": (columns, {"tasks": kinds})}
    runs = {name: read_predictions(write_run(tmp_path / name, c, **about)) for name, (c, about) in named.items()}
    assert shared_tasks([runs["all"], runs["few"]]) == ["buy", "seconds"]
    assert shared_tasks([runs["all"], runs["few"], runs["kind"]]) == ["buy"]
    alone = read_predictions(write_run(tmp_path / "alone", {n: few[n] for n in few if not n.startswith("buy")}))
    with pytest.raises(ConfigError, match=r"share no task \(.*other: buy, second; .*alone: seconds\): compare runs of"):
        shared_tasks([runs["other"], alone])


def changed(columns: Columns, name: str, row: int, value: float) -> Columns:
    values = columns[name].copy()
    values[row] = value
    return columns | {name: values}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("click.label", 7, r"click\.label differs in 1 of 1,000 rows, such as row 20; evaluate both on the same files"),
        ("click.weight", 0.5, r"click\.weight differs in 1 of 1,000 rows"),
        ("domain", -1, "domain differs in 1 of 1,000 rows"),
        ("domain", 9, "domain differs in 1 of 1,000 rows"),
        ("group", 100, "group differs in 1 of 1,000 rows"),
        ("row", 5000, "it holds 1,000 rows, not 1,000; 2 are in one alone, such as row 20"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, name: str, value: float, message: str) -> None:
    columns = make_columns()
    a, b = write_run(tmp_path / "a", columns), write_run(tmp_path / "b", changed(columns, name, 20, value))
    runs = [read_predictions(run) for run in (a, b)]
    with pytest.raises(ConfigError, match=f"b is not on the rows of .*a: {message}") as error:
        check_same_rows(runs, tasks=shared_tasks(runs))
    for run in (a, b):
        assert f"-m rec.evaluate run_dir={run} split=test predictions=true" in str(error.value)


def test_fewer_rows_are_refused_and_domains_go_by_name(tmp_path: Path) -> None:
    columns = make_columns()
    reference = read_predictions(write_run(tmp_path / "a", columns))
    fewer = read_predictions(write_run(tmp_path / "b", {name: values[:990] for name, values in columns.items()}))
    assert how_rows_differ(fewer, reference=reference, tasks=[]) == (
        "it holds 990 rows, not 1,000; 10 are in one alone, such as row 990"
    )
    grown = read_predictions(write_run(tmp_path / "c", columns, domains=["home", "search", "app"]))
    assert how_rows_differ(grown, reference=reference, tasks=["click"]) is None
    swapped = read_predictions(write_run(tmp_path / "d", columns, domains=["search", "home"]))
    assert how_rows_differ(swapped, reference=reference, tasks=[]).startswith("domain differs in 1,000 of 1,000 rows")


def test_a_label_of_a_row_without_weight_does_not_matter(tmp_path: Path) -> None:
    columns = make_columns()
    row = int(np.flatnonzero(columns["buy.weight"] == 0)[0])
    odd = changed(changed(columns, "buy.label", row, np.nan), "buy.logit", row, np.nan)
    runs = [read_predictions(write_run(tmp_path / n, c)) for n, c in (("a", columns), ("b", odd))]
    check_same_rows(runs, tasks=["buy"])


def test_folders_without_predictions_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_columns())
    with pytest.raises(ConfigError, match=r"run: no predictions of split 'valid'; make them: torchrun .* split=valid"):
        read_predictions(run, split="valid")
    with pytest.raises(ConfigError, match="nowhere: no predictions of split 'test'; make them: "):
        read_predictions(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds predictions of split 'test', not 'valid': choose --split"):
        read_predictions(run / "predictions" / "test", split="valid")


def test_files_that_are_no_predictions_are_refused(tmp_path: Path) -> None:
    columns = make_columns()
    bare = {name: values for name, values in columns.items() if name != "buy.label"}
    with pytest.raises(
        ConfigError, match=r"no file of predictions with labels .*without column buy\.label.*make them anew"
    ):
        read_predictions(write_run(tmp_path / "bare", bare))
    pq.write_table(pa.table(columns), tmp_path / "part-00000.parquet")
    with pytest.raises(ConfigError, match=r"part-00000\.parquet is no file of predictions with labels \(b'rec'\)"):
        read_predictions(tmp_path)
    (tmp_path / "part-00000.parquet").write_text("half a file")
    with pytest.raises(ConfigError, match=r"part-00000\.parquet is no file of predictions"):
        read_predictions(tmp_path)


def test_parts_of_two_evaluations_are_refused(tmp_path: Path) -> None:
    columns, folder = make_columns(), tmp_path / "predictions" / "test"
    write_run(tmp_path, columns, ranks=3)
    write_run(tmp_path, columns, ranks=2, step=1300)
    with pytest.raises(ConfigError, match=r"part-00002\.parquet is of another evaluation than part-00000\.parquet"):
        read_predictions(tmp_path)
    (folder / "part-00002.parquet").write_bytes((folder / "part-00001.parquet").read_bytes())
    with pytest.raises(ConfigError, match=r"row \d+ was predicted more than once; make them anew: torchrun"):
        read_predictions(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("click.logit", "nan"), ("seconds.label", "inf"), ("click.weight", "nan")])
def test_values_without_a_metric_are_refused(tmp_path: Path, name: str, value: str) -> None:
    columns = changed(make_columns(), name, 17, float(value))
    with pytest.raises(ConfigError, match=rf"{name} is {value} in row 17 \(1 such rows\), expected a finite number"):
        read_predictions(write_run(tmp_path / "run", columns))
