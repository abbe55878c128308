import errno
import gc
import hashlib
import io
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from rec import checkpoint as checkpoint_module
from rec import config as configuration
from rec import tensor_files
from rec import train as training
from rec.checkpoint import VERSION, CheckpointConfig, Checkpoints, DamagedError, Info, SaveError
from rec.config import Config, compose
from rec.distributed import process_group
from rec.features import Batch
from rec.guard import TroubleError
from rec.optim import Optimizers
from rec.schema import ConfigError
from rec.tensor_files import Sum
from rec.trainer import Trainer
from tests.conftest import CONF, toy_overrides, write_toy
from tests.test_train import events, weights


@contextmanager
def one_process() -> Iterator[None]:
    """Undo what a process group of this process leaves behind: its environment and, after an error, itself."""
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            if dist.is_initialized():
                gc.collect()
                dist.destroy_process_group()


def train(config: Config) -> None:
    """A whole run of `rec.train`, in this process."""
    with one_process():
        training.run(config)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("small"), [180, 70])


def toy_config(toy: Path, run_dir: Path, *more: str) -> Config:
    fixed = [f"run_dir={run_dir}", "trainer.max_steps=4", "checkpoint.every_steps=1", "checkpoint.keep_last=3"]
    return compose(toy_overrides(toy, *fixed, "optim.schedule.decay=cosine", *more), config_dir=str(CONF))


@pytest.fixture(scope="module")
def trained(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on one rank, a checkpoint after every one, the newest three kept."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    train(toy_config(toy, run_dir, "checkpoint.resume=never"))
    return run_dir


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but TensorBoard's, of which every start opens one."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def fake(folder: Path, step: int, *, score: float | None = None, **more: object) -> Path:
    """A folder that looks like a whole checkpoint."""
    path = folder / f"step_{step:09d}"
    path.mkdir(parents=True)
    (path / ".metadata").write_bytes(b"metadata")
    (path / "__0_0.distcp").write_bytes(b"tensors")
    info = {"step": step, "rows": 10 * step, "score": score, "files": {".metadata": 8, "__0_0.distcp": 7}, **more}
    (path / "checkpoint.json").write_text(json.dumps(info))
    return path


def checkpoints(folder: Path, *, keep_last: int = 2, keep_best: int = 1) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(keep_last=keep_last, keep_best=keep_best))


class TestFind:
    def test_none(self, tmp_path: Path) -> None:
        assert checkpoints(tmp_path / "absent").find() is None

    def test_latest_best_and_step(self, tmp_path: Path) -> None:
        scores = {30: -0.2, 10: -0.1, 200: None, 1000: -0.3}
        paths = {step: fake(tmp_path, step, score=score) for step, score in scores.items()}
        found = checkpoints(tmp_path)
        assert [info.step for info in found.all().values()] == [10, 30, 200, 1000]
        assert found.find() == found.find("latest") == paths[1000]
        assert found.find("best") == paths[10]
        assert all(found.find(str(step)) == path for step, path in paths.items())

    def test_best_is_the_newest_where_nothing_was_evaluated(self, tmp_path: Path) -> None:
        _, newest = fake(tmp_path, 1), fake(tmp_path, 2)
        assert checkpoints(tmp_path).find("best") == newest

    @pytest.mark.parametrize("which", ["5", "newest", "", "1.0"])
    def test_unknown(self, tmp_path: Path, which: str) -> None:
        fake(tmp_path, 1), fake(tmp_path, 20)
        with pytest.raises(ConfigError, match=rf"no checkpoint '{which}' in .*latest, best or one of the steps 1, 20$"):
            checkpoints(tmp_path).find(which)

    def test_draft_is_never_found(self, tmp_path: Path) -> None:
        fake(tmp_path, 1).rename(tmp_path / ".writing_step_000000001")
        assert checkpoints(tmp_path).find() is None and checkpoints(tmp_path).all() == {}


def written(kept: Checkpoints, state: dict, info: Info) -> Path:
    """Write a checkpoint and wait for it."""
    kept.save(state, info)
    done = kept.finish()
    assert done is not None and done.error is None and kept.finish() is None
    return done.path


DAMAGES: dict[str, Callable[[Path], object]] = {
    ".metadata is missing": lambda path: (path / ".metadata").unlink(),
    ".metadata has 3 bytes, 8 were written": lambda path: os.truncate(path / ".metadata", 3),
    "__0_0.distcp is missing": lambda path: (path / "__0_0.distcp").unlink(),
    "__0_0.distcp has 0 bytes, 7 were written": lambda path: os.truncate(path / "__0_0.distcp", 0),
    "checkpoint.json: [Errno 2]": lambda path: (path / "checkpoint.json").unlink(),
    "checkpoint.json: Expecting": lambda path: os.truncate(path / "checkpoint.json", 8),
    "checkpoint.json: Info": lambda path: (path / "checkpoint.json").write_text("{}"),
}


class TestDamage:
    @pytest.mark.parametrize("why", DAMAGES)
    def test_the_one_before_is_used(self, tmp_path: Path, why: str) -> None:
        before, damaged = fake(tmp_path, 1), fake(tmp_path, 2, score=0.9)
        DAMAGES[why](damaged)
        found = checkpoints(tmp_path)
        assert found.find() == found.find("best") == before and list(found.all()) == [before]
        assert list(found.damaged()) == [damaged] and why in found.damaged()[damaged]
        with pytest.raises(ConfigError, match=r"no checkpoint '2'.*damaged: .*step_000000002") as caught:
            found.find("2")
        assert why in str(caught.value)

    @pytest.mark.parametrize("why", DAMAGES)
    def test_nothing_else_is_left(self, tmp_path: Path, why: str) -> None:
        DAMAGES[why](fake(tmp_path, 1))
        with pytest.raises(ConfigError, match="only damaged ones: .*; move them away to start anew") as caught:
            checkpoints(tmp_path).find()
        assert why in str(caught.value)

    def test_a_run_goes_on_from_the_one_before_and_ends_as_if_nothing_had_been(self, run: Path, toy: Path) -> None:
        """Bit for bit, so weights, both optimizers' state, the schedule and the place in the data all came back."""
        expected = weights(run)
        (data,) = (run / "checkpoints" / "step_000000004").glob("*.distcp")
        os.truncate(data, data.stat().st_size // 2)
        before = len((run / "metrics.jsonl").read_text().splitlines())
        train(toy_config(toy, run, "seed=0"))
        added = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[before:]]
        assert [event["event"] for event in added][:2] == ["warning", "start"]
        assert "step_000000004 is damaged" in added[0]["message"] and data.name in added[0]["message"]
        assert added[1]["step"] == 3 and added[1]["resumed_from"].endswith("step_000000003")
        assert events(run, "end")[-1]["step"] == 4
        got = weights(run)
        assert got.keys() == expected.keys()
        assert sum("momentum" in key for key in got) >= 4 and sum("exp_avg_sq" in key for key in got) >= 4
        for key, value in expected.items():
            assert torch.equal(got[key], value), key


class TestWritten:
    def test_what_a_run_leaves(self, trained: Path) -> None:
        folder = trained / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:09d}" for step in (2, 3, 4)]
        assert [event["path"] for event in events(trained, "checkpoint")][-3:] == [
            str(p) for p in sorted(folder.iterdir())
        ]
        info = Info.read(folder / "step_000000004")
        assert (info.step, info.rows, info.world_size, info.version) == (4, 200, 1, VERSION)
        auc = events(trained, "eval")[0]["metrics"]
        assert info.score == info.best_score == pytest.approx((auc["click"]["auc"] + auc["purchase"]["auc"]) / 2)
        assert Info.read(folder / "step_000000002").score is None

    @pytest.mark.parametrize(("keep_last", "keep_best"), [(1, 0), (2, 2), (3, 1)])
    def test_keeps_the_newest_and_the_best(self, tmp_path: Path, keep_last: int, keep_best: int) -> None:
        scores = [0.3, 0.9, None, 0.7, 0.1, None]
        with one_process(), process_group():
            kept = checkpoints(tmp_path, keep_last=keep_last, keep_best=keep_best)
            for step, score in enumerate(scores, start=1):
                path = written(kept, {"w": torch.full((3,), float(step))}, Info(step=step, rows=step, score=score))
                assert kept.find() == path
                scored = sorted((s, n) for n, s in enumerate(scores[:step], start=1) if s is not None)
                want = {n for _, n in scored[len(scored) - min(keep_best, len(scored)) :]}
                want |= set(range(max(1, step - keep_last + 1), step + 1))
                assert {info.step for info in kept.all().values()} == want
                assert not list(tmp_path.glob(".*"))

    def test_round_trip(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        values = {"a": torch.randn(5, 3), "b": {"c": torch.randn(2, dtype=torch.float64), "n": torch.tensor(7)}}
        info = Info(step=3, rows=30, score=-0.5, best_score=0.25, stale_evals=2)
        with one_process(), process_group():
            path = written(checkpoints(tmp_path), values, info)
            state = {"a": torch.zeros(5, 3), "b": {"c": torch.zeros(2, dtype=torch.float64), "n": torch.tensor(0)}}
            back = checkpoints(tmp_path).load(path, state)
        files = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "checkpoint.json"}
        assert back == replace(info, files={n: Sum(len(b), hashlib.sha256(b).hexdigest()) for n, b in files.items()})
        assert torch.equal(state["a"], values["a"])
        assert torch.equal(state["b"]["c"], values["b"]["c"]) and state["b"]["n"] == 7

    def test_killed_while_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def killed(state: dict, *, storage_writer: FileSystemWriter, process_group: object) -> None:
            shutil.copytree(first, storage_writer.path, dirs_exist_ok=True)  # all but the last step of it
            raise KeyboardInterrupt

        with one_process(), process_group():
            kept = checkpoints(tmp_path)
            first = written(kept, {"w": torch.ones(3)}, Info(step=1, rows=1))
            with monkeypatch.context() as patched:
                patched.setattr(dcp, "save", killed)
                with pytest.raises(KeyboardInterrupt):
                    written(kept, {"w": torch.zeros(3)}, Info(step=2, rows=2))
            assert (tmp_path / ".writing_step_000000002" / ".metadata").is_file()
            assert list(kept.all()) == [kept.find()] == [first]
            after = written(kept, {"w": torch.full((3,), 2.0)}, Info(step=3, rows=3))
            assert kept.find() == after and not list(tmp_path.glob(".*"))  # the remains are cleared away

    def test_written_again(self, tmp_path: Path) -> None:
        with one_process(), process_group():
            kept, state = checkpoints(tmp_path), {"w": torch.zeros(3)}
            for value in (1.0, 2.0):
                path = written(kept, {"w": torch.full((3,), value)}, Info(step=1, rows=1))
            kept.load(path, state)
        assert state["w"].tolist() == [2.0] * 3 and list(kept.all()) == [path]

    def test_what_was_damaged_and_is_written_again_counts(self, tmp_path: Path) -> None:
        with one_process(), process_group():
            kept = checkpoints(tmp_path, keep_last=1, keep_best=0)
            first, second = (written(checkpoints(tmp_path), {"w": torch.ones(3)}, Info(step=n, rows=n)) for n in (1, 2))
            (data,) = second.glob("*.distcp")
            data.write_bytes(data.read_bytes()[:-1] + b"?")  # of the same size
            assert kept.newest() == first and list(kept.damaged()) == [second]
            written(kept, {"w": torch.ones(3)}, Info(step=2, rows=2))
            assert kept.newest() == second and list(kept.all()) == [second] and not kept.damaged()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


class TestSums:
    @pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "config.yaml", "plan.json"])
    def test_a_flipped_bit_is_noticed_and_the_one_before_used(self, run: Path, toy: Path, name: str) -> None:
        expected = weights(run)
        flip_a_bit(run / "checkpoints" / "step_000000004" / name)
        train(toy_config(toy, run))
        warning = events(run, "warning")[-1]["message"]
        assert "step_000000004 is damaged" in warning and f"{name} has SHA-256" in warning
        assert events(run, "start")[-1]["step"] == 3
        for key, value in weights(run).items():
            assert torch.equal(expected[key], value), key

    def test_nothing_is_loaded_from_it_when_it_is_asked_for(self, run: Path) -> None:
        path = run / "checkpoints" / "step_000000004"
        flip_a_bit(path / "__0_0.distcp")
        with (
            one_process(),
            process_group(),
            pytest.raises(
                DamagedError,
                match=r"step_000000004 is damaged: __0_0.distcp has SHA-256 \w+\.\.\., \w+\.\.\. was written",
            ),
        ):
            checkpoints(path.parent).load(path, {})

    def test_they_are_those_that_sha256sum_prints(self, trained: Path) -> None:
        path = trained / "checkpoints" / "step_000000004"
        files = Info.read(path).files
        assert files.keys() == {file.name for file in path.iterdir()} - {"checkpoint.json"}
        for name, of in files.items():
            assert of == Sum((path / name).stat().st_size, hashlib.sha256((path / name).read_bytes()).hexdigest())

    def test_the_first_format_is_still_read(self, run: Path, toy: Path) -> None:
        path = run / "checkpoints" / "step_000000004" / "checkpoint.json"
        said = json.loads(path.read_text())
        said["files"] = {name: of["bytes"] for name, of in said["files"].items()}
        path.write_text(json.dumps(said | {"version": 1}))
        train(toy_config(toy, run, "trainer.max_steps=5"))
        assert events(run, "start")[-1]["step"] == 4 and events(run, "end")[-1]["step"] == 5


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch evil",)


class TestForeignFiles:
    """A checkpoint is a folder that somebody may have sent: reading it runs nothing."""

    @pytest.mark.parametrize("where", ["description", "value"])
    def test_code_is_not_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(checkpoint_module, "staged", lambda state: state)  # a copy would be made by running it
        with one_process(), process_group():
            kept = checkpoints(tmp_path)
            path = written(kept, {"w": torch.ones(3), "x": Evil() if where == "value" else 1.5}, Info(step=1, rows=1))
            if where == "description":
                (path / ".metadata").write_bytes(pickle.dumps(Evil()))
                forget_sums(path)
            with pytest.raises(ConfigError, match="system"):
                kept.load(path, {"w": torch.zeros(3), "x": None})
        assert not (tmp_path / "evil").exists()


def forget_sums(path: Path) -> None:
    said = json.loads((path / "checkpoint.json").read_text())
    files = {file.name: file.stat().st_size for file in path.iterdir() if file.name != "checkpoint.json"}
    (path / "checkpoint.json").write_text(json.dumps(said | {"files": files}))


def failing(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Writing the checkpoints of some steps finds the disk full, half way."""
    make = tensor_files._HashedStream.__init__

    class Full:
        def __init__(self, file: io.IOBase) -> None:
            self.file, self.room = file, 1000

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    def init(stream: tensor_files._HashedStream, file: io.IOBase) -> None:
        full = any(f"step_{step:09d}" in str(file.name) for step in steps)
        make(stream, Full(file) if full else file)

    monkeypatch.setattr(tensor_files._HashedStream, "__init__", init)


class TestWhatFails:
    @pytest.mark.parametrize("asynchronous", ["true", "false"])
    def test_a_full_disk_is_named_and_training_goes_on(
        self, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: str
    ) -> None:
        failing(monkeypatch, {2, 3})
        train(toy_config(toy, tmp_path / "run", f"checkpoint.asynchronous={asynchronous}"))
        two, three = (event["message"] for event in events(tmp_path / "run", "warning"))
        assert "step_000000002 could not be written: rank 0: OSError: [Errno 28] No space left on device; " in two
        assert "MiB are free there; training goes on" in two and "step_000000003" in three
        folder = tmp_path / "run" / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == ["step_000000001", "step_000000004"]
        assert [event["step"] for event in events(tmp_path / "run", "checkpoint")] == [1, 4]

    def test_the_last_checkpoint_must_not_fail_and_what_was_saved_stays(
        self, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing(monkeypatch, {4})
        with pytest.raises(SaveError, match="step_000000004 could not be written: .*No space left"):
            train(toy_config(toy, tmp_path / "run"))
        monkeypatch.undo()
        folder = tmp_path / "run" / "checkpoints"
        assert [path.name for path in sorted(folder.iterdir())][-1] == "step_000000003"
        train(toy_config(toy, tmp_path / "run"))
        assert events(tmp_path / "run", "start")[-1]["step"] == 3 and events(tmp_path / "run", "end")[-1]["step"] == 4

    def test_a_folder_that_is_removed_comes_back(
        self, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        learn, folder = Trainer.train_step, tmp_path / "run" / "checkpoints"

        def train_step(trainer: Trainer, batch: Batch) -> bool:
            if trainer.info.step == 2:
                trainer.checkpoints.finish()
                shutil.rmtree(folder)
            return learn(trainer, batch)

        monkeypatch.setattr(Trainer, "train_step", train_step)
        train(toy_config(toy, tmp_path / "run"))
        assert sorted(path.name for path in folder.iterdir()) == ["step_000000003", "step_000000004"]

    def test_weights_that_are_no_numbers_are_not_saved(
        self, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step = Optimizers.step

        def broken(optimizers: Optimizers) -> torch.Tensor:
            norm = step(optimizers)
            return norm * torch.nan if len(done) == 3 else norm

        done: list[int] = []
        learn = Trainer.train_step
        monkeypatch.setattr(Optimizers, "step", broken)
        monkeypatch.setattr(Trainer, "train_step", lambda *args: (learn(*args), done.append(1))[0])
        with pytest.raises(TroubleError, match="step 4: its gradient is not finite, and what it did is not saved"):
            train(toy_config(toy, tmp_path / "run"))
        assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step_000000003"

    def test_training_goes_on_while_a_checkpoint_is_written(
        self, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Writing begins after two steps and cannot end before the fourth; what is written is the state of step 2."""
        learn, reached = Trainer.train_step, threading.Event()
        plain = checkpoint_module.write

        def train_step(trainer: Trainer, batch: Batch) -> bool:
            if trainer.info.step == 3:
                reached.set()
            return learn(trainer, batch)

        def write(*args: object, **kwargs: object) -> object:
            assert reached.wait(30)
            return plain(*args, **kwargs)

        monkeypatch.setattr(Trainer, "train_step", train_step)
        monkeypatch.setattr(checkpoint_module, "write", write)
        often = [
            "checkpoint.every_steps=2",
            "trainer.max_steps=5",
            "checkpoint.keep_last=9",
            "optim.schedule.decay=constant",
        ]
        train(toy_config(toy, tmp_path / "run", *often, "checkpoint.every_steps=2"))
        monkeypatch.undo()
        train(toy_config(toy, tmp_path / "short", *often, "trainer.max_steps=2"))
        got, expected = (weights(tmp_path / name, step=2) for name in ("run", "short"))
        for key in expected.keys() - {"loop.window"}:  # which the shorter run had closed
            assert torch.equal(got[key], expected[key]), key


class TestRefused:
    def test_newer_format(self, tmp_path: Path) -> None:
        path = fake(tmp_path, 1, version=VERSION + 1, what_only_the_newer_knows=3)
        found = checkpoints(tmp_path)
        assert found.find() == path
        with pytest.raises(ConfigError, match=rf"has format {VERSION + 1}, this version reads up to {VERSION}; update"):
            found.load(path, {})

    def test_added_field_of_the_same_format_is_read(self, tmp_path: Path) -> None:
        assert Info.read(fake(tmp_path, 1, added=3)).step == 1

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("data.tables.user.embedding_dim=4", r"\[997, 8\].*\[997, 4\].*user"),
            ("experts=shared_bottom", "experts"),
            ("checkpoint.resume=never", "has checkpoints and checkpoint.resume=never; choose another run_dir"),
        ],
    )
    def test_run_that_does_not_fit_its_folder(self, run: Path, toy: Path, change: str, said: str) -> None:
        before = contents(run)
        assert {"config.yaml", "metrics.jsonl", "checkpoints/step_000000004/.metadata"} <= before.keys()
        with pytest.raises(ConfigError, match=said):
            train(toy_config(toy, run, "trainer.max_steps=5", change))
        assert contents(run) == before

    @pytest.mark.parametrize("change", ["every_steps=0", "keep_last=0", "keep_best=-1"])
    def test_out_of_range(self, change: str) -> None:
        name, _, value = change.partition("=")
        with pytest.raises(ConfigError, match=rf"checkpoint\.{name} is {value}, expected"):
            CheckpointConfig(**{name: int(value)})


def test_a_checkpoint_holds_the_configuration_that_wrote_it(toy: Path, trained: Path) -> None:
    expected = toy_config(toy, trained, "checkpoint.resume=never")
    for path in (trained / "checkpoints").glob("step_*"):
        assert configuration.load(path / "config.yaml") == expected
