import subprocess
import sys
from pathlib import Path

import pytest

from rec import config as configuration
from rec import sweep as sweeping
from rec.config import load
from rec.schema import ConfigError
from rec.sweep import expand, sweep, torchrun
from tests.conftest import CONF, ROOT, toy_overrides, write_toy
from tests.test_train import events

TOY = ["data=toy", "data.path=/nowhere"]


@pytest.mark.parametrize(
    ("overrides", "jobs"),
    [
        ([], [[]]),
        (["a=1"], [["a=1"]]),
        (["a=1,2"], [["a=1"], ["a=2"]]),
        (["a=choice(x,y)"], [["a=x"], ["a=y"]]),
        (["a=range(1,4)"], [["a=1"], ["a=2"], ["a=3"]]),
        (["a=range(3)"], [["a=0"], ["a=1"], ["a=2"]]),
        (["a=range(0,1,0.5)"], [["a=0.0"], ["a=0.5"]]),
        (["a=sort(3,1,2)"], [["a=1"], ["a=2"], ["a=3"]]),
        (["a.b.c=null,true"], [["a.b.c=null"], ["a.b.c=True"]]),
        (["+a=1,2", "++b=3"], [["+a=1", "++b=3"], ["+a=2", "++b=3"]]),
        # commas within quotes, brackets and braces, or after a backslash, separate nothing
        (["a='x,y'"], [["a='x,y'"]]),
        (['a="x, y",z'], [['a="x, y"'], ["a=z"]]),
        (["a=[1,2]"], [["a=[1,2]"]]),
        (["a=[1,2],[3]"], [["a=[1,2]"], ["a=[3]"]]),
        (["a={b:1,c:2}"], [["a={b:1,c:2}"]]),
        ([r"a=x\,y"], [[r"a=x\,y"]]),
        # what is not swept goes on as it was written
        (["a=${b}", "c=/x y/z", "~d.e", "f=''"], [["a=${b}", "c=/x y/z", "~d.e", "f=''"]]),
        (["a=1", "a=2,3"], [["a=1", "a=2"], ["a=1", "a=3"]]),
    ],
    ids=str,
)
def test_expand(overrides: list[str], jobs: list[list[str]]) -> None:
    assert expand(overrides) == jobs


def test_expand_takes_every_combination_the_last_changing_fastest() -> None:
    assert expand(["a=1,2", "b=x", "c=range(2)", "d=p,q"]) == [
        [f"a={a}", "b=x", f"c={c}", f"d={d}"] for a in (1, 2) for c in (0, 1) for d in "pq"
    ]


@pytest.mark.parametrize("override", ["a=glob(*)", "a=interval(0,1)"])
def test_sweep_without_a_list_of_values_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be swept .*; list the values: a=a,b"):
        expand([override])


@pytest.mark.parametrize("override", ["a=1,", "a='x", "a b=1", "a=choose(1,2)"])
def test_expand_refuses_what_the_grammar_does(override: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the overrides"):
        expand(["seed=1", override])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of every job, none of which really runs; one with seed=2 fails."""
    jobs: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        launcher = [*torchrun(), "-m", "rec.train"]
        assert command[: len(launcher)] == launcher
        jobs.append(command[len(launcher) :])
        return subprocess.CompletedProcess(command, 1 if "seed=2" in command else 0)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sweeping.subprocess, "run", run)
    return jobs


def test_every_job_has_its_folder(started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep([*TOY, "seed=0,1", f"run_dir={tmp_path}", "experts=mmoe,shared_bottom"], config_dir=str(CONF))
    pairs = [(0, "mmoe"), (0, "shared_bottom"), (1, "mmoe"), (1, "shared_bottom")]
    assert started == [
        ["--config-dir", str(CONF), *TOY, f"seed={seed}", f"experts={experts}", f"run_dir={tmp_path}/{number}"]
        for number, (seed, experts) in enumerate(pairs)
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"[3/4] {' '.join([*TOY, 'seed=1', 'experts=mmoe', f'run_dir={tmp_path}/2'])}"


def test_default_folder(started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep(["seed=0,1"])
    first, second = (job[-1].removeprefix("run_dir=") for job in started)
    assert first.startswith("runs/sweep_20") and Path(first).name == "0"
    assert Path(second) == Path(first).parent / "1"
    assert list(tmp_path.iterdir()) == []


def test_failed_job_is_named_and_the_others_run(started: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^1 of 3 jobs failed: {tmp_path}/1$"):
        sweep([*TOY, "seed=1,2,3", f"run_dir={tmp_path}"], config_dir=str(CONF))
    assert [job[4] for job in started] == ["seed=1", "seed=2", "seed=3"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=0,1", "trainer.max_stps=3"], "did you mean 'max_steps'?"),
        (["experts=mmoe,shared_botom"], "experts=shared_botom run_dir={}/1: no experts 'shared_botom'; did you mean"),
        (["trainer.max_steps=3,0"], "trainer.max_steps=0 run_dir={}/1: trainer.max_steps is 0"),
        (["experts=mmoe,shared_bottom", "model.experts.num_experts=3"], "no setting 'model.experts.num_experts'"),
        (["seed=0,1", "hydra.sweep.dir=x"], "takes no Hydra settings"),
    ],
)
def test_one_job_that_cannot_run_starts_none(
    started: list[list[str]], tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=r"^no job was started, for one cannot be run: ") as caught:
        sweep([*TOY, f"run_dir={tmp_path}", *overrides], config_dir=str(CONF))
    assert said.format(tmp_path) in str(caught.value)
    assert started == [] and list(tmp_path.iterdir()) == []


def test_under_torchrun_is_refused(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="--multirun starts torchrun itself: run `python -m rec.train --multirun"):
        sweep(["seed=0,1"])
    assert started == []


def test_ranks_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping.torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("NPROC", raising=False)
    assert torchrun()[-2:] == ["--nproc-per-node", "2"]
    monkeypatch.setattr(sweeping.torch.cuda, "device_count", lambda: 8)
    assert torchrun()[-1] == "8"
    monkeypatch.setenv("NPROC", "3")
    assert torchrun()[-1] == "3"


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_command_line(started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train.py", flag, "--config-dir", str(CONF), *TOY, "seed=0,1", f"run_dir={tmp_path}"]
    )
    configuration.main(lambda config: pytest.fail("trained in this process"), about="")
    assert [job[4:] for job in started] == [["seed=0", f"run_dir={tmp_path}/0"], ["seed=1", f"run_dir={tmp_path}/1"]]


def test_real_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Two jobs, the second of which fails: its data has no such split."""
    toy, folder = write_toy(tmp_path / "toy", [120]), tmp_path / "sweep"
    for name, value in {"NPROC": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    swept = ["trainer.eval_split=valid,vald", "trainer.max_steps=2", f"run_dir={folder}"]
    with pytest.raises(ConfigError, match=rf"^1 of 2 jobs failed: {folder}/1$"):
        sweep(toy_overrides(toy, *swept), config_dir=str(CONF))
    assert "no split 'vald': did you mean 'valid'?" in capfd.readouterr().err
    assert load(folder / "0" / "config.yaml").trainer.eval_split == "valid"
    assert [(event["step"], event["reason"]) for event in events(folder / "0", "end")] == [(2, "all steps done")]
    assert not (folder / "1" / "checkpoints").exists()
