import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rec import calibrate as calibration
from rec import evaluate as evaluation
from rec import predict as prediction
from rec.calibration import FILE, CalibratorKind
from rec.config import compose
from rec.schema import ConfigError
from tests.conftest import CONF, start_ranks, toy_overrides, write_toy
from tests.test_calibration import fitted, market
from tests.test_checkpoint import one_process, train
from tests.test_train import events

STEP = "step_000000026"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, of which the probabilities are off."""
    folder = tmp_path_factory.mktemp("trained")
    toy = write_toy(folder, [610, 37])
    train(
        compose(
            toy_overrides(toy, f"run_dir={folder}/run", "trainer.num_epochs=2", "optim.dense.lr=0.02"),
            config_dir=str(CONF),
        )
    )
    return folder / "run"


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def alone() -> Iterator[None]:
    with one_process():
        yield


def calibrate(run_dir: Path, *arguments: str) -> dict:
    """The `calibration` event that a calibration appends."""
    calibration.run([f"run_dir={run_dir}", *arguments])
    return events(run_dir, "calibration")[-1]


def kept(run_dir: Path) -> dict:
    return json.loads((run_dir / "checkpoints" / STEP / FILE).read_text())


def evaluate(run_dir: Path, *arguments: str) -> dict:
    evaluation.run([f"run_dir={run_dir}", *arguments])
    return events(run_dir, "eval")[-1]


@pytest.mark.usefixtures("alone")
class TestEvent:
    def test_says_what_was_fitted_and_what_it_is_worth(self, run_dir: Path) -> None:
        event = calibrate(run_dir)
        assert (event["split"], event["measured_on"], event["kind"], event["step"]) == ("valid", "test", "platt", 26)
        assert event.keys() == {"event", "time", "step", "rows", "split", "measured_on", "kind", "tasks"}
        assert event["tasks"].keys() == {"click", "purchase"}  # dwell is a regression
        for task, of in event["tasks"].items():
            assert of.keys() == {"before", "global", "after", "cells", "reliability"}
            assert of["after"]["logloss"] < of["before"]["logloss"]
            assert of["after"]["domains"].keys() == {"home", "search"} and 0 < of["after"]["field_ece"] < 1
            assert of["reliability"].keys() == {"before", "after"} and len(of["reliability"]["after"]["rate"]) == 10
            cells = kept(run_dir)["tasks"][task]
            for name, cell in of["cells"]["domains"].items():
                assert {key: cell[key] for key in ("a", "b", "rows")} == {
                    key: cells["domains"][name][key] for key in ("a", "b", "rows")
                }
        for domain in ("home", "search"):
            before, after = (event["tasks"]["click"][when]["domains"][domain]["auc"] for when in ("before", "after"))
            assert before == pytest.approx(after, abs=1e-9)

    def test_before_and_after_are_what_an_evaluation_gives(self, run_dir: Path) -> None:
        event = calibrate(run_dir, "split=train", "measure=valid")
        for calibrated, when in (("false", "before"), ("true", "after")):
            evaluated = evaluate(run_dir, "split=valid", f"calibrated={calibrated}")
            assert evaluated["calibrated"] == (calibrated == "true")
            for name in ("auc", "logloss", "ece", "calibration", "rows", "positives"):
                for task, of in event["tasks"].items():
                    assert of[when][name] == pytest.approx(evaluated["metrics"][task][name], rel=1e-5), (task, name)
                    for domain in ("home", "search"):
                        want = evaluated["domains"][task][domain][name]
                        assert of[when]["domains"][domain][name] == pytest.approx(want, rel=1e-5)

    def test_fitting_again_replaces(self, run_dir: Path) -> None:
        first = calibrate(run_dir, "split=train", "prior_positives=0", "measure=valid")
        before = kept(run_dir)
        again = calibrate(run_dir, "split=train", "kind=temperature", "per_domain=false", "measure=valid")
        after = kept(run_dir)
        assert first["kind"] == "platt" and before["config"]["prior_positives"] == 0
        assert again["kind"] == after["config"]["kind"] == "temperature"
        assert after["tasks"]["click"]["global"]["b"] == 0 and after["tasks"]["click"]["domains"] == {}
        assert "global" not in again["tasks"]["click"]
        assert len(events(run_dir, "calibration")) == 2

    def test_isotonic(self, run_dir: Path) -> None:
        event = calibrate(run_dir, "split=train", "kind=isotonic", "min_positives=50", "measure=train")
        of = event["tasks"]["click"]
        assert of["cells"]["domains"]["home"]["knots"] > 3 and "logits" not in of["cells"]["domains"]["home"]
        assert of["after"]["logloss"] < of["before"]["logloss"]


@pytest.mark.usefixtures("alone")
class TestSaid:
    def test_table(self, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        event = calibrate(run_dir, "split=train", "measure=valid")
        said = capsys.readouterr().out
        assert f"{STEP}: platt, fitted on train, 647 rows" in said and "measured on valid, 647 rows" in said
        assert "the network was trained on the rows fitted on" in said and "thinned of negatives" in said
        assert "these are the rows that were fitted on" not in said
        (home,) = [line.split() for line in said.splitlines() if line.startswith("  home")][:1]
        of = event["tasks"]["click"]
        losses = [f"{of[when]['domains']['home']['logloss']:.4f}" for when in ("before", "global", "after")]
        assert home[3:6] == losses
        (field,) = [line.split() for line in said.splitlines() if line.startswith("  field")][:1]
        assert field[1:] == [f"{of[when]['field_ece']:.4f}" for when in ("before", "global", "after")]

    def test_that_it_was_measured_on_the_rows_fitted_on(
        self, run_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert calibrate(run_dir)["measured_on"] == "test"  # the toy's test split is made of the files of valid
        said = capsys.readouterr().out
        assert "these are the rows that were fitted on" in said and "was trained on" not in said

    def test_evaluation_says_whether_it_was_calibrated(self, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert evaluate(run_dir)["calibrated"] is False
        assert f"{STEP} on test, 647 rows:" in capsys.readouterr().out
        calibrate(run_dir, "split=train")
        assert evaluate(run_dir)["calibrated"] is True
        assert f"{STEP}, calibrated on train, on test, 647 rows:" in capsys.readouterr().out


@pytest.mark.usefixtures("alone")
class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["kind=plat"], "kind: .*plat.*"),
            (["prior_positives=many"], "prior_positives: .*many"),
            (["prior_positives=-2"], "calibration.prior_positives is -2.0, expected a value from 0"),
            (["per_domain=maybe"], "per_domain: "),
            (["split=vald"], "no split 'vald': did you mean 'valid'"),
            (["measure=tets"], "no split 'tets': did you mean 'test'"),
            (["prior=3"], "no setting 'prior'"),
            (["checkpoint=3"], "no checkpoint '3' .* expected latest, best or one of the steps 26"),
        ],
    )
    def test_argument(self, run_dir: Path, arguments: list[str], said: str) -> None:
        before = (run_dir / "metrics.jsonl").read_bytes()
        with pytest.raises(ConfigError, match=said):
            calibrate(run_dir, *arguments)
        assert (run_dir / "metrics.jsonl").read_bytes() == before
        assert not (run_dir / "checkpoints" / STEP / FILE).exists()

    def test_evaluation_of_what_was_not_calibrated(self, run_dir: Path) -> None:
        with pytest.raises(ConfigError, match=f"calibrated=true, and .*{STEP} has no {FILE}; fit calibrators first"):
            evaluate(run_dir, "calibrated=true")

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("calibrated=yes", "calibrated is 'yes', expected true or false"),
            ("predictions=1", "predictions is '1', expected true or false"),
        ],
    )
    def test_evaluation_with_what_is_no_flag(self, run_dir: Path, argument: str, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            evaluate(run_dir, argument)


def close(got: object, want: object) -> None:
    """Nested values alike up to the order in which float64 sums were made."""
    if isinstance(want, dict):
        assert isinstance(got, dict) and got.keys() == want.keys()
        for key in want:
            close(got[key], want[key])
    elif isinstance(want, float | list):
        assert got == pytest.approx(want, rel=1e-6, abs=1e-9)
    else:
        assert got == want


@pytest.mark.slow
def test_two_ranks_are_one(trained: Path, run_dir: Path, tmp_path: Path) -> None:
    """The same calibrators, measures and predictions, whoever holds the rows."""
    rows = market(6000)
    torch.save(rows, tmp_path / "rows.pt")
    two = Path(shutil.copytree(trained, tmp_path / "two"))
    start_ranks("tests/workers/calibration_worker.py", str(two), str(tmp_path / "rows.pt"), str(tmp_path / "out"))
    for kind in CalibratorKind:
        for per_domain in (True, False):
            ranks = [(tmp_path / "out" / f"{kind.name}-{per_domain}-{r}" / FILE).read_text() for r in (0, 1)]
            assert ranks[0] == ranks[1]
            fitted(rows, kind=kind, per_domain=per_domain).save(tmp_path)
            ours, theirs = json.loads(ranks[0]), json.loads((tmp_path / FILE).read_text())
            assert len(ours.pop("sha256")) == len(theirs.pop("sha256")) == 64  # of all digits, the last ones too
            close(ours, theirs)
    with one_process():
        event = calibrate(run_dir, "split=train", "measure=valid")
    with one_process():
        evaluated = evaluate(run_dir, "predictions=true")
    with one_process():
        prediction.run([f"run_dir={run_dir}", f"out={tmp_path}/predictions"])
    assert kept(two)["fitted_on"] == kept(run_dir)["fitted_on"] == {"split": "train", "step": 26, "rows": 647}
    close(events(two, "calibration")[-1]["tasks"], event["tasks"])
    close(events(two, "eval")[-1]["domains"], evaluated["domains"])
    for one, other in (
        (run_dir / "predictions" / "test", two / "predictions" / "test"),
        (tmp_path / "predictions", tmp_path / "out" / "predictions"),
    ):
        assert [len(list(folder.iterdir())) for folder in (one, other)] == [1, 2]
        tables = [pq.read_table(folder).sort_by("row") for folder in (one, other)]
        assert tables[0].schema.equals(tables[1].schema, check_metadata=True)
        assert tables[0]["row"].to_pylist() == list(range(647))
        for name in tables[0].column_names:
            np.testing.assert_allclose(tables[1][name], tables[0][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run_dir=x", "-h"]], ids=str)
@pytest.mark.parametrize("module", [calibration, prediction], ids=lambda module: module.__name__)
def test_help(
    module: object, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    module.main()  # type: ignore[attr-defined]
    assert "torchrun --standalone --nproc-per-node 2 -m rec." in capsys.readouterr().out
