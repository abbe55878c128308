import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rec import report

AUCS = {"click": [0.71, 0.72, 0.75], "buy": [0.61, None, 0.63]}


def metrics(auc: float | None, **more: Any) -> dict[str, Any]:
    values = dict.fromkeys(("pr_auc", "logloss", "ne", "calibration", "ece"), 0.5)
    return {"auc": auc, **values, "gauc": None, "rows": 1000, "positives": 10, **more}


def evaluation(split: str, aucs: dict[str, float | None], *, step: int = 90, **more: Any) -> dict[str, Any]:
    by_domain = {task: {"app": metrics(0.25), "w|b": metrics(auc)} for task, auc in aucs.items()}
    tasks = {task: metrics(auc, **more) for task, auc in aucs.items()}
    return {"event": "eval", "step": step, "rows": 5, "split": split, "metrics": tasks, "domains": by_domain}


def write_run(folder: Path, *events: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(event) for event in ({"event": "start", "step": 0, "rows": 0}, *events)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    aucs = [{task: values[i] for task, values in AUCS.items()} for i in range(3)]
    return [str(write_run(tmp_path / f"run{i}", evaluation("test", aucs[i]))) for i in range(3)]


def write_baselines(folder: Path, *aucs: float, rows: int = 1000) -> list[str]:
    options = []
    for i, auc in enumerate(aucs):
        (folder / f"trees-{i}.json").write_text(json.dumps({"click": {"auc": auc, "rows": rows}}))
        options += ["--baseline", str(folder / f"trees-{i}.json")]
    return options


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, dict[str, str]]]:
    """The caption, and the cells of a Markdown table by line and column."""
    report.main([*arguments, "--markdown"])
    caption, table = capsys.readouterr().out.rstrip().split("\n\n")
    head, rule, *rows = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in table.splitlines()]
    assert table.splitlines()[1] == "|:--" + "|--:" * (len(head) - 1) + "|"
    assert len(rule) == 1
    return caption, {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_means_and_deviations_are_those_of_numpy(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    caption, table = printed(capsys, *runs)
    assert list(table) == ["click", "buy"]
    assert table["click"]["auc"] == f"{np.mean(AUCS['click']):.4f} ± {np.std(AUCS['click'], ddof=1):.4f}"
    assert table["buy"]["auc"] == f"0.6200 ± {np.std([0.61, 0.63], ddof=1):.4f} (n = 2)"
    assert list(table["buy"]) == ["task", "auc", "pr_auc", "logloss", "ne", "calibration", "ece"]  # no gauc anywhere
    assert caption == "Split test after 90 steps; mean ± sample standard deviation over n = 3 runs."


def test_one_run_has_no_deviation_and_a_regression_its_own_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    event = evaluation("test", {"click": 0.7}, gap_closed=0.8)
    event["metrics"]["seconds"] = {"mae": 1.5, "rmse": 2.25, "calibration": 1.0, "rows": 1000}
    caption, table = printed(capsys, str(write_run(tmp_path / "run", event)))
    assert caption == f"Split test after 90 steps, {tmp_path / 'run'}."
    assert (table["click"]["auc"], table["click"]["gap_closed"], table["click"]["mae"]) == ("0.7000", "0.8000", "-")
    assert (table["seconds"]["auc"], table["seconds"]["mae"], table["seconds"]["rmse"]) == ("-", "1.5000", "2.2500")


def test_baselines_of_several_seeds_stand_beside(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = write_baselines(tmp_path, 0.70, 0.73)
    caption, table = printed(capsys, runs[0], *options, *runs[1:])  # in any order
    assert table["click"]["baseline auc"] == f"0.7150 ± {np.std([0.70, 0.73], ddof=1):.4f}"
    assert table["click"]["difference"] == f"{np.mean(AUCS['click']) - 0.715:+.4f}" == "+0.0117"
    assert (table["buy"]["baseline auc"], table["buy"]["difference"]) == ("-", "-")
    assert caption.endswith("n = 3 runs; baseline: n = 2.")
    caption, _ = printed(capsys, *runs, *write_baselines(tmp_path, 0.7, rows=999))
    assert caption.endswith("Not all were measured on the same number of rows: click.")


def test_the_last_evaluation_of_the_split_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [evaluation(*of) for of in (("test", {"y": 0.1}), ("valid", {"y": 0.2}), ("test", {"y": 0.3}))]
    both = str(write_run(tmp_path / "both", *events, evaluation("valid", {"y": 0.4}, step=95)))
    assert printed(capsys, both)[1]["y"]["auc"] == "0.3000"
    assert printed(capsys, both, "--split", "valid")[1]["y"]["auc"] == "0.4000"
    others = write_run(tmp_path / "others", *(evaluation(s, {"y": a}) for s, a in (("b", 0.1), ("a", 0.2), ("b", 0.3))))
    caption, table = printed(capsys, str(others))
    assert caption.startswith("Split b after")
    assert table["y"]["auc"] == "0.3000"


def test_domains_stand_below_their_task(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, table = printed(capsys, runs[0], "--domains")
    assert list(table) == ["click", "click / app", "click / w\\|b", "buy", "buy / app", "buy / w\\|b"]
    assert [row["auc"] for row in table.values()] == ["0.7100", "0.2500", "0.7100", "0.6100", "0.2500", "0.6100"]


def test_the_plain_table_is_aligned(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    report.main(runs)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["task", "click", "buy"]
    assert len({len(line) for line in lines[2:]}) == 1
    assert "|" not in "".join(lines)


def test_half_a_line_is_passed_over_and_told(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(runs[0]) / "metrics.jsonl"
    file.write_text(file.read_text() + '{"event": "eval", "split": "te')
    report.main(runs[:1])
    captured = capsys.readouterr()
    assert "0.7100" in captured.out
    assert captured.err == f"{file}: line 3 is no JSON, passed over\n"


def test_what_cannot_be_reported_is_named(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*none: no metrics\.jsonl.*name the run_dir"):
        report.main([str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"run0: no evaluation of split 'tset'; did you mean 'test'"):
        report.main([runs[0], "--split", "tset"])
    fresh = str(write_run(tmp_path / "fresh"))
    with pytest.raises(
        SystemExit, match=r"fresh: no evaluation of split 'test'; .*rec\.evaluate run_dir=.*fresh split=test"
    ):
        report.main([fresh])
    valid = str(write_run(tmp_path / "valid", evaluation("valid", {"click": 0.7, "buy": 0.6})))
    with pytest.raises(SystemExit, match=r"valid was evaluated on split 'valid' .*run0 on split 'test' .*--split"):
        report.main([runs[0], valid])
    other = str(write_run(tmp_path / "other", evaluation("test", {"like": 0.7})))
    with pytest.raises(SystemExit, match=r"other was evaluated on split 'test' for like; .*for buy, click"):
        report.main([runs[0], other])
    with pytest.raises(SystemExit, match=r"--baseline .*missing\.json: .*rec\.baseline --json"):
        report.main([runs[0], "--baseline", str(tmp_path / "missing.json")])
    with pytest.raises(SystemExit, match=r"--baseline .*metrics\.jsonl: .*rec\.baseline --json"):
        report.main([runs[0], "--baseline", f"{runs[1]}/metrics.jsonl"])


def test_groups_of_runs_have_a_best_and_a_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aucs = {"mmoe": [(0.7, 0.9), (0.8, 0.6)], "alone": [(0.75, None), (0.65, None)]}
    groups = []
    for name, runs in aucs.items():
        folders = []
        for number, (income, married) in enumerate(runs):
            tasks = {"income": income} if married is None else {"income": income, "married": married}
            folders.append(str(write_run(tmp_path / name / str(number), evaluation("test", tasks))))
        groups += ["--group", name, *folders]
    report.main([*groups, "--main", "income", "--markdown"])
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    assert lines[0] == ["", "income, best", "mean", "married, mean", "at the best"]
    assert lines[2] == ["mmoe", "0.8000", "0.7500 ± 0.0707", "0.7500 ± 0.2121", "0.6000"]
    assert lines[3] == ["alone", "0.7500", "0.7000 ± 0.0707", "-", "-"]
    with pytest.raises(SystemExit, match="no auc of task 'incme'; did you mean 'income'"):
        report.main([*groups, "--main", "incme"])
    with pytest.raises(SystemExit, match="needs --main TASK"):
        report.main(groups)
    with pytest.raises(SystemExit, match="no run is named"):
        report.main([])
