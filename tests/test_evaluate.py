import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rec import evaluate as evaluation
from rec.config import compose
from rec.features import DataError
from rec.schema import ConfigError
from tests.conftest import CONF, toy_overrides, toy_table, write_toy
from tests.test_checkpoint import one_process, train
from tests.test_train import events, known


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("small"), [180, 37])


@pytest.fixture(scope="module")
def trained(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, evaluated and kept after every one; large steps, so that its checkpoints differ."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    more = [f"run_dir={run_dir}", "trainer.max_steps=3", "trainer.eval_every_steps=1", "optim.dense.lr=0.05"]
    kept = ["checkpoint.every_steps=1", "checkpoint.keep_last=3", "trainer.monitor=logloss"]
    train(compose(toy_overrides(toy, *more, *kept), config_dir=str(CONF)))
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_process():
        yield


def evaluate(run_dir: Path, *arguments: str) -> dict:
    """The `eval` event that an evaluation appends."""
    evaluation.run([f"run_dir={run_dir}", *arguments])
    return events(run_dir, "eval")[-1]


class TestNumbers:
    @pytest.mark.parametrize("which", ["1", "best", "latest"])
    def test_are_those_of_the_training_at_that_step(self, run_dir: Path, which: str) -> None:
        during = {event["step"]: event for event in events(run_dir, "eval")}
        auc = {step: event["metrics"]["click"]["auc"] for step, event in during.items()}
        assert sorted(during) == [1, 2, 3] and len(set(auc.values())) == 3  # checkpoints can be told apart
        score = {
            step: -sum(event["metrics"][t]["logloss"] for t in ("click", "purchase")) for step, event in during.items()
        }
        step = {"1": 1, "best": max(score, key=score.__getitem__), "latest": 3}[which]
        after = evaluate(run_dir, "split=valid", f"checkpoint={which}")
        assert (after["step"], after["rows"], after["split"]) == (step, during[step]["rows"], "valid")
        for task, values in during[step]["metrics"].items():
            assert known(after["metrics"][task]) == pytest.approx(known(values), rel=1e-6, nan_ok=False), task
            for domain, inner in during[step]["domains"][task].items():
                assert known(after["domains"][task][domain]) == pytest.approx(known(inner), rel=1e-6), (task, domain)

    def test_of_other_data(self, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The default split, `test`, of a folder given on the command line; the run's own settings stay as they are."""
        (tmp_path / "late" / "valid").mkdir(parents=True)  # where conf/data/toy.yaml has its test split
        late = toy_table(61, seed=9)
        pq.write_table(late, tmp_path / "late" / "valid" / "part.parquet")
        settings, before = (run_dir / "config.yaml").read_bytes(), (run_dir / "metrics.jsonl").read_text()
        after = evaluate(run_dir, f"data.path={tmp_path}/late", "metrics.exact=true", "reader.global_batch_size=7")
        assert after["split"] == "test" and after["seconds"] > 0
        clicks = sum(late["click"].to_pylist())
        assert (after["metrics"]["click"]["rows"], after["metrics"]["click"]["positives"]) == (61, clicks)
        assert after["metrics"]["purchase"]["rows"] == clicks
        said = capsys.readouterr().out
        assert "step_000000003 on test, 61 rows:" in said and "  search" in said
        assert (run_dir / "config.yaml").read_bytes() == settings
        text = (run_dir / "metrics.jsonl").read_text()
        assert text.startswith(before) and len(text.splitlines()) == len(before.splitlines()) + 1
        json.loads(text.splitlines()[-1])


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["split=vald"], "data set 'toy' has no split 'vald': did you mean 'valid'?"),
            (
                ["checkpoint=17"],
                "no checkpoint '17' in {run_dir}/checkpoints; expected latest, best or one of the steps 1, 2, 3",
            ),
            (["data.pth=x"], "no setting 'data.pth'; did you mean 'path'?"),
            (["splt=valid"], "no setting 'splt'"),
            (["experts=mmoe"], "the choices of a run are made"),
            (["model.experts.num_experts=2"], "step_000000003 does not fit this configuration"),
            (["metrics.exact"], "'metrics.exact': expected key=value"),
            (["--split=valid"], "'--split=valid': expected key=value"),
        ],
    )
    def test_argument(self, run_dir: Path, arguments: list[str], said: str) -> None:
        before = (run_dir / "metrics.jsonl").read_bytes()
        with pytest.raises(ConfigError) as caught:
            evaluate(run_dir, *arguments)
        assert said.format(run_dir=run_dir) in str(caught.value)
        assert (run_dir / "metrics.jsonl").read_bytes() == before

    def test_data_that_is_not_there(self, run_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no Parquet files in split 'test' .*nowhere"):
            evaluate(run_dir, f"data.path={tmp_path}/nowhere")

    def test_no_run_dir(self) -> None:
        with pytest.raises(ConfigError, match="run_dir=DIR is missing: the folder of the run to evaluate"):
            evaluation.run(["split=valid"])

    def test_folder_of_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"config.yaml does not exist: is run_dir the folder of a run\?"):
            evaluate(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_no_checkpoint(self, run_dir: Path) -> None:
        shutil.rmtree(run_dir / "checkpoints")
        with pytest.raises(
            ConfigError, match=f"no checkpoint in {run_dir}/checkpoints; train first: rec.train run_dir="
        ):
            evaluate(run_dir)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["run_dir=x", "--help"]], ids=str)
def test_help(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    evaluation.main()
    said = capsys.readouterr().out
    for word in (
        "torchrun",
        "-m rec.evaluate run_dir=DIR",
        "split",
        "checkpoint",
        "latest, best, or a step",
        "data.path=DIR",
    ):
        assert word in said
