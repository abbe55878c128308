import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rec import arms, claims
from rec.study import SPARSE, STUDIES, Result, caption, main, make_table, run_study


@pytest.fixture
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "EVALUATION_ROWS", 2000)


@pytest.mark.usefixtures("_few_rows")
def test_every_arm_runs_in_every_world() -> None:
    result = run_study("collapse", num_worlds=2, steps=2)
    assert list(result.lines) == list(claims.STUDIES["collapse"].arms()) == list(result.parameters)
    assert all(len(values) == 2 for scores in result.lines.values() for values in scores.values())
    # these two start alike and see the same rows
    near = np.subtract(result.lines["temperature 1"]["click"], result.lines["dropout 0.3"]["click"])
    assert 0 < np.abs(near).max() < 0.02
    assert result.lines["temperature 8"]["experts click"] > result.lines["temperature 1"]["experts click"]
    again = run_study("collapse", num_worlds=1, steps=2)
    assert {line: scores["click"][0] for line, scores in again.lines.items()} == {
        line: scores["click"][0] for line, scores in result.lines.items()
    }


def test_differences_are_paired_by_world_and_by_group() -> None:
    rng = np.random.default_rng(0)
    lines = {f"{g} / {a}": {"click": rng.normal(0.7, 0.01, 5).tolist()} for g, a in product("xy", "abc")}
    lines["y / b"]["overlap"] = [0.25, 0.5, 0.5, 0.5, 0.75]
    head, *rows = make_table(Result("auxiliary", steps=1, num_worlds=5, lines=lines))
    assert head == ["", "click", "difference", "better", "overlap"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["y / a"][1:3] == ["", ""] and cells["y / b"][3] == "0.500" and cells["y / c"][3] == "-"
    for line, reference in (("x / b", "x / a"), ("y / c", "y / a")):
        differences = np.subtract(lines[line]["click"], lines[reference]["click"])
        low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert cells[line][1] == f"{differences.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        assert cells[line][2] == f"{(differences > 0).sum()} of 5"


def test_lower_errors_are_better_and_the_lowest_is_shown() -> None:
    lines = {"p = 1 / a": {"mse": [0.2, 0.3, 0.4]}, "p = 1 / b": {"mse": [0.1, 0.2, 0.5]}}
    head, first, second = make_table(Result("mmoe_paper", steps=1, num_worlds=3, lines=lines))
    assert head == ["", "mse", "lowest", "difference", "better"]
    assert first[2] == "0.2000" and second[2] == "0.1000" and second[4] == "2 of 3"


def test_of_some_measures_less_is_better() -> None:
    compared = {"second_click of all": [0.2, 0.3], "unclicked logloss": [0.5, 0.5], "unclicked bias": [0.1, 0.4]}
    better = {"second_click of all": [0.3, 0.2], "unclicked logloss": [0.3, 0.4], "unclicked bias": [0.2, 0.5]}
    lines = {"condition": compared | {"above click": [0.0, 0.0]}, "product": better | {"above click": [0.0, 0.5]}}
    head, _, row = make_table(Result("entire_space", steps=1, num_worlds=2, lines=lines))
    cells = dict(zip(head, row, strict=False))
    assert [c for h, c in zip(head, row, strict=True) if h == "better"] == ["1 of 2", "2 of 2", "0 of 2"]
    assert cells["above click"] == "0.250"


def test_a_single_world_has_no_interval() -> None:
    lines = {"a": {"click": [0.7]}, "b": {"click": [0.71]}}
    result = Result("experts", steps=1, num_worlds=1, lines=lines)
    assert make_table(result)[2] == ["b", "0.7100", "+0.0100", "1 of 1"]
    assert "over 1 world after" in caption(result)


def test_command_gives_the_same_from_any_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "platt.json"
    main(["platt", "--worlds", "1", "--steps", "2", "--processes", "2", "--markdown", "--json", str(file)])
    out, written = capsys.readouterr().out, json.loads(file.read_text())
    here = run_study("platt", num_worlds=1, steps=2)
    assert written["lines"] == here.lines and written["steps"] == 2
    logloss = here.lines["click / one a placement"]["logloss"]
    assert re.search(rf"\| click / one a placement \| {logloss[0]:.4f} \|", out)


def test_help_names_every_study(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    starred = dict(re.findall(r"^    (\w+) +\S.*?( \*)?$", out, re.M))
    assert {name.removesuffix("_sparse") for name in STUDIES} == set(starred)
    assert {name for name, star in starred.items() if star} == set(SPARSE)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["platt", "--sparse"], "--sparse belongs to experts, auxiliary, linear, .*, entire_space, not to platt"),
        (["platt", "--json", "no/such/folder.json"], "no/such/folder.json: its folder does not exist"),
        (["experts", "--worlds", "0"], "--worlds is 0, expected a value from 1"),
    ],
)
def test_bad_arguments_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(argv)


@pytest.mark.slow
def test_claims_of_the_mmoe_paper_hold() -> None:
    """Ten worlds, as `python -m rec.study mmoe_paper`; section 3.2 and figure 4 of Ma et al., KDD 2018."""
    lines = run_study("mmoe_paper", processes=2).lines
    errors = {line: np.array(scores["mse"]) for line, scores in lines.items()}
    mean = {line: values.mean() for line, values in errors.items()}
    for p in ("1", "0.9", "0.5", "0"):
        assert mean[f"p = {p} / MMoE"] < mean[f"p = {p} / shared bottom"]
        assert errors[f"p = {p} / MMoE"].std() < errors[f"p = {p} / shared bottom"].std()
    assert abs(mean["p = 1 / OMoE"] / mean["p = 1 / MMoE"] - 1) < 0.1
    assert mean["p = 0.5 / OMoE"] / mean["p = 0.5 / MMoE"] > 1.15
