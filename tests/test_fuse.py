"""The command, end to end, on prediction files made by hand; its numbers against scikit-learn and loops over groups."""

import json
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from rec import fuse
from rec.fusion import FusionConfig, FusionKind
from rec.fusion import fuse as fuse_preds
from rec.intervals import TaskRows
from tests.test_paired import Columns, changed, make_columns, write_run

Table = dict[str, dict[str, str]]  # ranking -> column -> cell
WEIGHTS = ("--weights", "click=0.95", "buy=0.05")
SHARES = "Share of the score's variance within groups (product: of its logarithm):"
OWN = "On the rows that count for each task:"
EVERY = "On every row, those outside a task's condition as negatives:"


def run_fuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[str], dict[str, Table]]:
    """The paragraphs, and the tables by title."""
    fuse.main([*map(str, arguments), "--markdown"])
    blocks = capsys.readouterr().out.rstrip().split("\n\n")
    tables: dict[str, Table] = {}
    for title, block in pairwise(blocks):
        if block.startswith("| ranking"):
            head, _, *lines = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in block.splitlines()]
            tables[title] = {line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines}
    return [block for block in blocks if not block.startswith("|") and block not in tables], tables


def rankings_of(columns: Columns, weights: dict[str, float]) -> dict[str, np.ndarray]:
    """Scores by ranking, of `FusionKind` by the library and of single tasks."""
    preds = {t: expit(columns[f"{t}.logit"].astype(np.float64)) for t in ("click", "buy")}
    groups = columns["group"]
    scores = {kind.name: fuse_preds(preds, FusionConfig(kind, weights), group_id=groups) for kind in FusionKind}
    return scores | {"click alone": preds["click"], "buy alone": preds["buy"]}


def gauc_by_loop(groups: np.ndarray, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Mean of scikit-learn's AUC of each group with both classes, by weight."""
    aucs, shares = [], []
    for group in np.unique(groups):
        inside = groups == group
        if len(np.unique(labels[inside])) == 2:
            aucs.append(roc_auc_score(labels[inside], scores[inside], sample_weight=weights[inside]))
            shares.append(weights[inside].sum())
    return float(np.average(aucs, weights=shares))


def expected_cells(columns: Columns, scores: np.ndarray, task: str, *, every: bool = False) -> dict[str, str]:
    """AUC and group AUC of one task under a ranking."""
    labels, weights = columns[f"{task}.label"], columns[f"{task}.weight"]
    counts = np.ones(len(labels), bool) if every else weights > 0
    labels, weights = labels * (weights > 0), np.where(every, columns["click.weight"], weights)
    groups, scores, labels, weights = (x[counts] for x in (columns["group"], scores, labels, weights))
    values = {
        "auc": roc_auc_score(labels, scores, sample_weight=weights),
        "gauc": gauc_by_loop(groups, scores, labels, weights),
    }
    return {f"{task} {name}": f"{value:.4f}" for name, value in values.items()}


@pytest.fixture
def columns() -> Columns:
    """A buy counts where there was a click; rows weigh 1 or 2; 12 groups, so that loops over them are short."""
    columns = make_columns()
    columns["group"] %= 12
    doubled = np.where(np.arange(1000) % 3, np.float32(1), np.float32(2))
    return columns | {f"{task}.weight": columns[f"{task}.weight"] * doubled for task in ("click", "buy")}


def test_rankings_are_those_of_scikit_learn(
    tmp_path: Path, columns: Columns, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", columns)
    (caption,), tables = run_fuse(capsys, "--runs", run, *WEIGHTS)
    scores = rankings_of(columns, {"click": 0.95, "buy": 0.05})
    assert list(tables) == [OWN, EVERY, SHARES]
    assert list(tables[OWN]) == list(tables[EVERY]) == [*list(scores)[:4], "buy alone", "seconds alone"]
    for name, values in scores.items():
        own = expected_cells(columns, values, "click") | expected_cells(columns, values, "buy")
        assert tables[OWN][name] == own
        assert tables[EVERY][name] == expected_cells(columns, values, "buy", every=True)
    assert tables[OWN]["rank"] != tables[OWN]["weighted_sum"]
    assert f"Split test, 1,000 rows; {run}. Weights click=0.95 buy=0.05." in caption
    assert "see gauc" in caption and "A regression has no AUC: seconds." in caption


def test_a_conditional_label_counts_on_every_row_but_where_it_is_unknown() -> None:
    def rows(labels: list[float], weights: list[float]) -> TaskRows:
        return TaskRows(np.zeros(6), np.array(labels), np.array(weights), np.zeros(6, np.int64))

    tasks = {
        "click": rows([1, 1, 1, 0, 0, 1], [1, 1, 1, 2, 0, 1]),
        "buy": rows([1, 0, 1, 1, np.nan, 1], [3, 1, 0, 0, 0, 0]),  # where clicked; rows 2 and 5 unknown
        "cart": rows([1, 1, 1, 0, 0, 0], [1, 1, 1, 2, 1, 1]),  # of every row
        "empty": rows([1] * 6, [0] * 6),
    }
    every = fuse.on_every_row(tasks, "buy")
    assert every is not None
    assert every.labels.tolist() == [1, 0, 0, 0, 0, 0]
    # rows 0 and 1 its own; 2 unknown; 3 and 4 no click or no cart; 5 no cart, on which it may be conditional, too
    assert every.weights.tolist() == [3, 1, 0, 2, 1, 1]
    assert [fuse.on_every_row(tasks, name) for name in ("click", "cart", "empty")] == [None] * 3


def test_without_groups_or_conditions(tmp_path: Path, columns: Columns, capsys: pytest.CaptureFixture[str]) -> None:
    columns = columns | {"buy.weight": columns["click.weight"]}
    run = write_run(tmp_path / "a", columns, grouped=False)
    (caption,), tables = run_fuse(capsys, "--runs", run, *WEIGHTS, "--kinds", "rank", "product")
    assert list(tables) == [OWN, SHARES] and "Ranks are among all rows" in caption
    assert list(tables[OWN]["rank"]) == ["click auc", "buy auc"]
    together = rankings_of(columns | {"group": np.zeros(1000)}, {"click": 0.95, "buy": 0.05})
    assert list(tables[OWN])[:2] == ["rank", "product"]
    assert tables[OWN]["rank"]["buy auc"] == expected_cells(columns, together["rank"], "buy")["buy auc"]


def test_a_small_probability_is_pointed_at(
    tmp_path: Path, columns: Columns, capsys: pytest.CaptureFixture[str]
) -> None:
    small = columns | {"buy.logit": columns["buy.logit"] - 5}
    run = write_run(tmp_path / "a", small)
    (_, hint), tables = run_fuse(capsys, "--runs", run, "--weights", "click=0.95", "click*buy=0.05")
    assert hint.startswith("weighted_sum: click*buy brings less than 1 % of the variance")
    assert hint.endswith("compare rank, or --sweep 'click*buy'.")
    shares = {name: float(line["click*buy"]) for name, line in tables[SHARES].items()}
    assert shares["weighted_sum"] < 0.01 < shares["rank"]
    assert list(tables[OWN])[-1] == "click*buy alone"
    # the product of both is what a purchase on every row is ranked by
    joint = expit(small["click.logit"].astype(np.float64)) * expit(small["buy.logit"].astype(np.float64))
    assert tables[EVERY]["click*buy alone"] == expected_cells(small, joint, "buy", every=True)


def test_a_sweep_trades_one_task_for_the_other(
    tmp_path: Path, columns: Columns, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", columns)
    sweep = ("--weights", "click=0.5", "--sweep", "buy")
    (_,), tables = run_fuse(capsys, "--runs", run, *sweep)
    assert list(tables[OWN])[:5] == [f"weighted_sum, buy={w}" for w in ("0.01", "0.03", "0.1", "0.3", "1")]
    assert len(tables[OWN]) == 15 + 3
    for weight in ("0.01", "1"):
        scores = rankings_of(columns, {"click": 0.5, "buy": float(weight)})
        for kind in FusionKind:
            cells = tables[OWN][f"{kind.name}, buy={weight}"]
            expected = [expected_cells(columns, scores[kind.name], task) for task in ("click", "buy")]
            assert cells == expected[0] | expected[1]
    shares = [float(line["buy"]) for line in list(tables[SHARES].values())[:5]]
    assert shares == sorted(shares) and shares[0] < 0.1 < shares[-1]


def test_runs_give_a_mean_and_a_deviation(tmp_path: Path, columns: Columns, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = [columns | {n: make_columns(seed=seed)[n] for n in ("click.logit", "buy.logit")} for seed in range(3)]
    runs = [write_run(tmp_path / str(seed), of_seed) for seed, of_seed in enumerate(seeds)]
    (caption,), tables = run_fuse(capsys, "--runs", *runs, *WEIGHTS, "--kinds", "product")
    assert "1,000 + 1,000 + 1,000 rows; mean ± sample standard deviation over n = 3 runs" in caption
    scores = [rankings_of(of_seed, {"click": 0.95, "buy": 0.05})["product"] for of_seed in seeds]
    aucs = [roc_auc_score(columns["click.label"], x, sample_weight=columns["click.weight"]) for x in scores]
    assert tables[OWN]["product"]["click auc"] == f"{mean(aucs):.4f} ± {stdev(aucs):.4f}"


def test_scores_are_written_by_row(tmp_path: Path, columns: Columns, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_run(tmp_path / "a", columns), tmp_path / "new" / "scores.parquet"
    for kind in FusionKind:  # the file of the kind before is replaced
        fuse.main(["--runs", str(run), *WEIGHTS, "--kinds", kind.name, "--out", str(out)])
        assert capsys.readouterr().out.endswith(f"\n\n1,000 rows: {out}\n")
        table = pq.read_table(out)
        assert table["row"].to_pylist() == list(range(1000))
        expected = rankings_of(columns, {"click": 0.95, "buy": 0.05})[kind.name]
        np.testing.assert_array_equal(table["score"].to_numpy(), expected)
        about = json.loads(table.schema.metadata[b"rec"])
        assert (about["kind"], about["weights"], about["split"]) == (kind.name, {"click": 0.95, "buy": 0.05}, "test")
    assert [path.name for path in out.parent.iterdir()] == ["scores.parquet"]


OUT = ("--out", "scores.parquet", "--kinds", "rank")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "clik=1"), "error: the weights name 'clik', which is no task: did you mean 'click'"),
        ((*WEIGHTS, "--sweep", "bye"), "error: the weights name 'bye', which is no task: did you mean 'buy'"),
        (("--weights", "click"), "error: --weights has 'click', expected TASK=NUMBER"),
        (("--weights", "click=much"), "error: --weights has 'click=much', expected TASK=NUMBER"),
        (("--weights", "=1"), "error: --weights has '=1' without a task"),
        (("--weights", "click=1", "click=2"), "error: --weights names 'click' twice"),
        (("--weights", "click=0"), "error: the weights are click=0: give at least one"),
        (("--weights", "click=-1"), "error: the weight of 'click' is -1.0, of a product expected 0 or more"),
        (("--weights", "seconds=1"), "error: 'seconds' is -.* such rows.* expected finite and 0 or more in a product"),
        ((*WEIGHTS, "--split", "valid"), "error: .*no predictions of split 'valid'; make them: torchrun"),
        ((*WEIGHTS, "--out", "x"), "error: --out holds one score, and there are 1 runs, 3 kinds: give"),
        ((*WEIGHTS, *OUT, "--sweep", "buy"), "there are 1 runs, 1 kinds and a sweep"),
        ((*WEIGHTS, "--out", ".", "--kinds", "rank"), "error: --out . is a folder, expected a file"),
        ((*WEIGHTS, "--out", "a/file/x", "--kinds", "rank"), "error: --out a/file/x cannot be written: "),
    ],
)
def test_refusals(
    tmp_path: Path, columns: Columns, options: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "a", columns)
    (run / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        fuse.main(["--runs", "a", *options])


def test_a_row_without_a_prediction_is_refused(tmp_path: Path, columns: Columns) -> None:
    unclicked = int(np.flatnonzero(columns["buy.weight"] == 0)[0])  # for metrics its prediction does not matter
    run = write_run(tmp_path / "a", changed(columns, "buy.logit", unclicked, np.nan))
    with pytest.raises(SystemExit, match=f"buy.logit is nan in row {unclicked} .*every row has to be ranked"):
        fuse.main(["--runs", str(run), *WEIGHTS])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        fuse.main(["--help"])
    shown = capsys.readouterr().out
    assert "python -m rec.fuse --runs RUN --weights click=0.95 purchase=0.05" in shown
    assert "predictions=true" in shown and "0.01, 0.03, 0.1, 0.3, 1" in shown
