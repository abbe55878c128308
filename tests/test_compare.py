"""The command, end to end, on prediction files made by hand; its numbers against scikit-learn and scipy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from rec import compare
from rec.intervals import delong
from tests.test_paired import Columns, changed, make_columns, write_run

PLAIN: dict[str, Any] = {"grouped": False}


def run_compare(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[str, list[dict[tuple[str, str], dict]]]:
    """The caption, and for each candidate the cells by task, metric and column."""
    compare.main([*map(str, arguments), "--markdown"])
    caption, *blocks = capsys.readouterr().out.rstrip().split("\n\n")
    tables = []
    for block in blocks[1::2]:
        head, _, *lines = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in block.splitlines()]
        tables.append({(line[0], line[1]): dict(zip(head, line, strict=True)) for line in lines})
    return caption, tables


def auc_of(columns: Columns, rows: Any = slice(None), *, task: str = "click") -> float:
    label, weight, logit = (columns[f"{task}.{part}"][rows] for part in ("label", "weight", "logit"))
    return float(roc_auc_score(label, logit, sample_weight=weight))


@pytest.fixture
def columns() -> list[Columns]:
    """A reference, one much better, and one that differs in a hair."""
    reference = make_columns(noise=1.5)
    hair = {n: x + 1e-3 * np.sin(np.arange(1000)) if n.endswith(".logit") else x for n, x in reference.items()}
    return [reference, make_columns(noise=0.3), hair]


def test_two_runs_without_groups(tmp_path: Path, columns: list[Columns], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write_run(tmp_path / name, c, **PLAIN) for name, c in zip("ab", columns, strict=False))
    caption, (table,) = run_compare(capsys, a, b)
    assert [task for task, _ in table] == ["click"] * 5 + ["buy"] * 4 + ["seconds"] * 3
    assert [metric for task, metric in table if task == "click"] == ["auc", "expected_auc", "ne", "calibration", "ece"]
    outcome = delong(np.stack([c["click.logit"] for c in columns[:2]]), labels=columns[0]["click.label"])
    assert outcome is not None
    interval = outcome.interval(1)
    assert table["click", "auc"] == {
        "task": "click",
        "metric": "auc",
        "reference": f"{auc_of(columns[0]):.4f}",
        "candidate": f"{auc_of(columns[1]):.4f}",
        "difference": f"{auc_of(columns[1]) - auc_of(columns[0]):+.5f}",
        "95 % interval": f"[{interval.low:+.5f}, {interval.high:+.5f}]",
        "verdict": "better",
    }
    assert {table["click", name]["verdict"] for name in ("expected_auc", "ne", "ece")} == {"better"}
    assert table["seconds", "mae"]["verdict"] == table["seconds", "rmse"]["verdict"] == "better"
    assert f"Split test, 1,000 rows. Reference: {a} (after 1,200 steps, not calibrated)." in caption
    assert (
        "Intervals at 95 %: auc by DeLong's test; expected_auc, ne, calibration, ece, mae, rmse by bootstrap" in caption
    )
    assert "over rows, 200 replicates; about 1 line in 20 " in caption
    assert "They cover the choice of rows, not of the seed" in caption
    assert "Left out" not in caption
    _, (table,) = run_compare(capsys, b, a)
    assert {table["click", name]["verdict"] for name in ("auc", "expected_auc", "ne", "ece")} == {"worse"}


def test_a_hair_is_within_noise_and_a_run_equals_itself(
    tmp_path: Path, columns: list[Columns], capsys: pytest.CaptureFixture[str]
) -> None:
    a, hair = write_run(tmp_path / "a", columns[0]), write_run(tmp_path / "hair", columns[2])
    _, tables = run_compare(capsys, a, hair, a, "--metrics", "auc,gauc,logloss", "--replicates", 50)
    assert [list(table) for table in tables] == [
        [*((t, m) for t in ("click", "buy") for m in ("auc", "gauc", "logloss"))]
    ] * 2
    assert {line["verdict"] for line in tables[0].values()} == {"within noise"}
    assert {(line["difference"], line["95 % interval"]) for line in tables[1].values()} == {
        ("+0.00000", "[+0.00000, +0.00000]")
    }
    assert {line["verdict"] for line in tables[1].values()} == {"within noise"}


def test_rows_of_groups_are_drawn_together_unless_told_otherwise(
    tmp_path: Path, columns: list[Columns], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (write_run(tmp_path / name, c) for name, c in zip("ab", columns, strict=False))
    options = (a, b, "--metrics", "auc,calibration")
    captions = [run_compare(capsys, *options, *more)[0] for more in ([], ["--method", "delong"])]
    assert "auc, calibration, mae" not in captions[0]
    assert "Intervals at 95 %: auc, calibration by bootstrap over groups, 200 replicates;" in captions[0]
    assert (
        "Intervals at 95 %: auc by DeLong's test; calibration by bootstrap over groups, 200 replicates;" in captions[1]
    )
    plain = [write_run(tmp_path / f"{name}2", c, **PLAIN) for name, c in zip("ab", columns, strict=False)]
    caption, _ = run_compare(capsys, *plain, "--metrics", "auc", "--method", "bootstrap")
    assert "auc by bootstrap over rows" in caption


def test_uneven_weights_are_not_for_delong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = [changed(make_columns(seed=seed), "click.weight", 0, 0.5) for seed in range(2)]
    a, b = (write_run(tmp_path / name, c, **PLAIN) for name, c in zip("ab", columns, strict=True))
    caption, _ = run_compare(capsys, a, b, "--metrics", "auc")
    assert "auc by bootstrap over rows; auc by DeLong's test" in caption  # click, then buy
    with pytest.raises(SystemExit, match="--method delong: task 'click' has labels or weights other than 0 and 1"):
        compare.main([str(a), str(b), "--method", "delong"])


def test_domains_stand_below_their_task(
    tmp_path: Path, columns: list[Columns], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"domains": ["home", "search", "app"]}  # no row of the app
    a, b = (write_run(tmp_path / name, c, **PLAIN, **names) for name, c in zip("ab", columns, strict=False))
    _, (table,) = run_compare(capsys, a, b, "--domains", "--metrics", "auc,field_ece,rmse")
    assert [line for line in table if line[0].startswith("click")] == [
        ("click", "auc"),
        ("click", "field_ece"),
        ("click / home", "auc"),
        ("click / search", "auc"),
        ("click / app", "auc"),
    ]
    home = columns[0]["domain"] == 0
    assert table["click / home", "auc"]["reference"] == f"{auc_of(columns[0], home):.4f}"
    expected = auc_of(columns[1], home) - auc_of(columns[0], home)
    assert table["click / home", "auc"]["difference"] == f"{expected:+.5f}"
    for line in (("click / app", "auc"), ("seconds / app", "rmse")):
        assert list(table[line].values())[2:] == ["-"] * 5


def test_calibration_is_compared_by_its_distance_from_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = make_columns()
    low, high = (columns | {"seconds.logit": columns["seconds.label"] * np.float32(x)} for x in (0.7, 1.1))
    a, b = write_run(tmp_path / "a", low), write_run(tmp_path / "b", high)
    caption, (table,) = run_compare(capsys, a, b, "--metrics", "calibration,auc")
    line = table["seconds", "calibration"]
    assert (line["reference"], line["candidate"], line["difference"]) == ("0.7000", "1.1000", "-0.20000")
    assert line["verdict"] == "better"
    assert "The difference in calibration is that of the distances from 1." in caption


def test_tasks_that_not_all_runs_have_are_named(
    tmp_path: Path, columns: list[Columns], capsys: pytest.CaptureFixture[str]
) -> None:
    few = {name: values for name, values in columns[1].items() if not name.startswith("buy")}
    a, b = write_run(tmp_path / "a", columns[0]), write_run(tmp_path / "b", few, calibrated=True, step=7)
    compare.main([str(a), str(b), "--replicates", "20"])
    out = capsys.readouterr().out
    assert "Left out, since not all runs have them: buy." in out
    assert f"\n{b} (after 7 steps, calibrated):\n" in out
    lines = out.rstrip().split("\n\n")[-1].splitlines()
    assert {line.split()[0] for line in lines[1:]} == {"click", "seconds"}
    assert len({len(line) for line in lines}) == 1


# ---- over seeds


@pytest.fixture
def seeds(tmp_path: Path) -> tuple[list[Path], list[Path], list[float]]:
    """Runs of four worlds, with a reference and a candidate each, and the difference in AUC."""
    pairs = [[make_columns(world=w, seed=s, noise=1.2 - 0.3 * s) for s in range(2)] for w in range(4)]
    folders = [[write_run(tmp_path / f"{'ab'[s]}{w}", pairs[w][s]) for w in range(4)] for s in range(2)]
    return folders[0], folders[1], [auc_of(b) - auc_of(a) for a, b in pairs]


def test_seeds_are_paired_in_order(
    seeds: tuple[list[Path], list[Path], list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, differences = seeds
    caption, tables = run_compare(
        capsys, "--reference", *a, "--candidate", *b, "--candidate", *a, "--metrics", "auc,ne", "--level", 0.9
    )
    line, error = tables[0]["click", "auc"], stats.sem(differences)
    low, high = stats.t.interval(0.9, 3, loc=np.mean(differences), scale=error)
    assert line["difference"] == f"{np.mean(differences):+.5f}"
    assert line["90 % interval"] == f"[{low:+.5f}, {high:+.5f}]"
    assert line["better in"] == f"{sum(d > 0 for d in differences)} of 4" == "4 of 4"
    assert tables[0]["click", "ne"]["better in"] == "4 of 4"
    assert tables[1]["click", "ne"]["better in"] == "0 of 4"
    assert "Split test, 1,000 + 1,000 + 1,000 + 1,000 rows. Reference: reference: " in caption
    assert "auc, ne by Student's t over seeds; about 1 line in 10 " in caption
    assert "They cover the choice of seed and of rows" in caption


def test_seeds_on_the_same_rows_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / f"r{seed}", make_columns(seed=seed)) for seed in range(4)]
    sides = ("--reference", *runs[:2], "--candidate", *runs[2:], "--names", "plain", "mixed")
    caption, (table,) = run_compare(capsys, *sides, "--domains", "--metrics", "ece,rmse")
    assert "They cover the choice of seed, not of rows" in caption
    assert f"Reference: plain: {runs[0]}, {runs[1]} (" in caption
    assert [task for task, _ in table][:3] == ["click", "click / home", "click / search"]


def test_a_seed_in_which_a_metric_has_no_meaning_does_not_count(
    seeds: tuple[list[Path], list[Path], list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, differences = seeds
    for folder, seed in ((a[3], 0), (b[3], 1)):
        columns = make_columns(world=3, seed=seed)
        write_run(folder, columns | {"click.label": np.zeros(1000, np.float32)})
    _, (table,) = run_compare(capsys, "--reference", *a, "--candidate", *b, "--metrics", "auc")
    assert table["click", "auc"]["better in"] == "3 of 3"
    assert table["click", "auc"]["difference"] == f"{np.mean(differences[:3]):+.5f}"


# ---- JSON and refusals


def test_json_holds_all_numbers(tmp_path: Path, columns: list[Columns], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (
        write_run(tmp_path / name, c, **PLAIN, domains=["home", "search", "app"])
        for name, c in zip("ab", columns, strict=False)
    )
    file = tmp_path / "new" / "numbers.json"
    run_compare(capsys, a, b, "--json", file, "--names", "base", "mmoe", "--domains")
    found = json.loads(file.read_text())
    assert (found["split"], found["level"], found["replicates"], found["reference"]) == ("test", 0.95, 200, [str(a)])
    (comparison,) = found["comparisons"]
    assert (comparison["name"], comparison["candidate"]) == ("mmoe", [str(b)])
    line = comparison["lines"][0]
    assert (line["task"], line["domain"], line["metric"], line["rows"]) == ("click", None, "auc", 1000)
    assert line["difference"] == pytest.approx(auc_of(columns[1]) - auc_of(columns[0]), rel=1e-9)
    assert line["low"] < line["difference"] < line["high"] and 0 <= line["p_value"] < 0.05
    assert (line["verdict"], line["method"], line["seeds"]) == ("better", "DeLong's test", None)
    nothing = next(x for x in comparison["lines"] if x["domain"] == "app")
    assert [nothing[name] for name in ("reference", "difference", "low", "p_value", "rows")] == [None] * 4 + [0]


def test_the_same_command_gives_the_same_numbers(
    tmp_path: Path, columns: list[Columns], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (write_run(tmp_path / name, c) for name, c in zip("ab", columns, strict=False))
    assert run_compare(capsys, a, b, "--replicates", 20) == run_compare(capsys, a, b, "--replicates", 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("A", "1 run given, expected a reference and one or more"),
        ("--reference A B", "expected --reference RUN RUN .* and --candidate RUN RUN"),
        ("A --reference A B --candidate A B", "or runs without either"),
        ("--reference A B --candidate A", "--reference has 2 runs, --candidate 1: expected as many each"),
        ("--reference A --candidate B", "--reference has 1 runs, --candidate 1: expected .* two or more"),
        ("--reference A B --candidate A B --method delong", "over seeds it is Student's"),
        ("A B --names one", "--names has 1 names, expected 2"),
        ("A B --metrics acu", r"--metrics names 'acu': did you mean 'auc'\?"),
        ("A B --level 95", "--level is 95.0, expected a value from 0.5 to 0.9999"),
        ("A B --replicates 2", "--replicates is 2, expected a value from 20 to 100000"),
        ("A B --ece-bins 0", "--ece-bins is 0, expected a value from 1 to 1000"),
        ("A B --split valid", "no predictions of split 'valid'; make them"),
        ("A C", "C is not on the rows of"),
        ("A B --metrics gauc", "no task of the runs has any of the metrics gauc"),
    ],
)
def test_refusals(tmp_path: Path, arguments: str, message: str) -> None:
    for name, world in (("A", 0), ("B", 0), ("C", 1)):
        write_run(tmp_path / name, make_columns(50, world=world), **PLAIN)
    words = [str(tmp_path / word) if word in "ABC" else word for word in arguments.split()]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        compare.main(words)
