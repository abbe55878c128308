"""Hosts of their own, each with launch/node.sh: network namespaces where these can be made, else loopback addresses."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import pytest
import torch

from tests.conftest import CONF, ROOT, torchrun, toy_overrides
from tests.test_train import events, weights
from tests.workers.node_hosts import PORT, Host, copy_launch, hosts, wait_until

pytestmark = pytest.mark.slow
STOPPED = 75
STEPS = 21 * 5  # a pass has 21 steps
TRAINING = [
    "trainer.num_epochs=5",
    "trainer.log_every_steps=1",
    "trainer.timeout_s=60",
    "checkpoint.every_steps=20",
    "optim.sparse.eps=1e-3",  # as in test_train.py: keeps Adam and Adagrad from magnifying the rounding of another world size
    "optim.dense.eps=1e-3",
]
QUICK = "join_timeout=60,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"


@dataclass
class Cluster:
    """Two hosts that share a folder."""

    hosts: list[Host]
    folder: Path
    toy: Path
    script: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def start(self, number: int, *overrides: str, job: str = "7", **variables: str) -> Popen[str]:
        """Run node.sh on one host."""
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # torchrun of this Python
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.folder),  # a host that is killed leaves files behind
            "OMP_NUM_THREADS": "1",
            "NPROC": "1",
            "NNODES": "2",
            "NODE_RANK": str(number),
            "JOB_ID": job,
            "MASTER": f"{self.hosts[0].address}:{PORT}",
            "RDZV_CONF": QUICK,
        }
        training = toy_overrides(self.toy, *TRAINING, f"run_dir={self.run_dir}", *overrides)
        command = [str(self.script), "--config-dir", str(CONF), *training]
        return self.hosts[number].start(command, log=self.log(number), environment=environment | variables)

    def start_both(self, *overrides: str, **variables: str) -> list[Popen[str]]:
        return [self.start(number, *overrides, **variables) for number in range(2)]

    def log(self, number: int) -> Path:
        return self.folder / f"host-{number}.log"

    def step(self) -> int:
        """Of the newest line of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        return max((e["step"] for e in events(self.run_dir, "train")), default=0) if path.exists() else 0

    def starts(self) -> list[dict]:
        return events(self.run_dir, "start") if (self.run_dir / "metrics.jsonl").exists() else []

    def wait(self, condition: Callable[[], bool], *, timeout: float = 150, what: str) -> float:
        try:
            return wait_until(condition, timeout=timeout, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from error

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step() >= step, what=f"step {step}")

    def wait_for_checkpoint(self, step: int) -> None:
        """The checkpoint of `step`, and some steps more."""
        file = self.run_dir / "checkpoints" / f"step_{step:09}" / "checkpoint.json"
        self.wait(lambda: file.exists() and self.step() > step + 2, what=f"a checkpoint of step {step}")

    def codes(self, processes: list[Popen[str]], *, timeout: float = 150) -> list[int | None]:
        """The exit codes, all within `timeout` seconds."""
        self.wait(lambda: all(p.poll() is not None for p in processes), timeout=timeout, what="the end of all")
        return [process.returncode for process in processes]

    def said(self) -> str:
        logs = [self.log(number) for number in range(2)]
        return "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in logs if log.exists())


@contextlib.contextmanager
def two_hosts(toy: Path, folder: Path) -> Iterator[Cluster]:
    with hosts(2) as made:
        yield Cluster(made, folder, toy, copy_launch(ROOT, folder))


@pytest.fixture
def cluster(toy: Path, tmp_path: Path) -> Iterator[Cluster]:
    with two_hosts(toy, tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder, chosen by rank 0, of a training on two hosts to which nothing happens."""
    with two_hosts(toy, tmp_path_factory.mktemp("undisturbed")) as cluster:
        assert cluster.codes(cluster.start_both("run_dir=null")) == [0, 0], cluster.said()
        (run_dir,) = (cluster.folder / "runs").iterdir()
        return run_dir


def assert_same(run_dir: Path, expected: Path, *, tolerance: float = 0.0) -> None:
    """All steps, all rows once and, from the same steps' checkpoints, these weights."""
    last = events(run_dir, "end")[-1]
    assert (last["step"], last["rows"]) == (STEPS, 5 * 1004)
    names = [
        sorted(path.name for path in (folder / "checkpoints").glob("step_*"))[-1] for folder in (run_dir, expected)
    ]
    assert names == [f"step_{STEPS:09}"] * 2
    got, wanted = weights(run_dir), weights(expected)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            got[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_two_hosts_are_two_ranks(undisturbed: Path, toy: Path, tmp_path: Path) -> None:
    """To rounding: the planner places tables otherwise where ranks are on several hosts."""
    one_host = tmp_path / "run"
    torchrun("-m", "rec.train", "--config-dir", str(CONF), *toy_overrides(toy, *TRAINING, f"run_dir={one_host}"))
    assert [event["step"] for event in events(undisturbed, "train")] == list(range(1, STEPS + 1))
    assert_same(undisturbed, one_host, tolerance=1e-5)


def test_host_that_dies_comes_back_and_all_go_on(cluster: Cluster, undisturbed: Path) -> None:
    first, second = cluster.start_both(MAX_RESTARTS="3")
    cluster.wait_for_checkpoint(40)
    cluster.hosts[1].kill()
    assert second.returncode == -signal.SIGKILL and first.poll() is None
    again = cluster.start(1, MAX_RESTARTS="3")
    assert cluster.codes([first, again]) == [0, 0], cluster.said()
    assert [event["step"] for event in cluster.starts()] == [0, 40]
    assert_same(cluster.run_dir, undisturbed)


def test_host_that_is_cut_off_is_taken_in_again(cluster: Cluster, undisturbed: Path) -> None:
    """Nobody hears of it: ranks wait for trainer.timeout_s, and torchrun on the lonely host for its connection."""
    if not cluster.hosts[1].namespace:
        pytest.skip("pulling a cable needs network namespaces, which this user may not make")
    processes = cluster.start_both("trainer.timeout_s=10", MAX_RESTARTS="3")
    cluster.wait_for_checkpoint(40)
    cluster.hosts[1].cable("down")
    cluster.wait(lambda: not any(host.ranks() for host in cluster.hosts), timeout=60, what="the end of the ranks")
    cluster.hosts[1].cable("up")
    assert cluster.codes(processes) == [0, 0], cluster.said()
    assert [event["step"] for event in cluster.starts()] == [0, 40]
    assert_same(cluster.run_dir, undisturbed)


def test_range_of_hosts_goes_on_without_one(cluster: Cluster, undisturbed: Path) -> None:
    first, _ = cluster.start_both(NNODES="1:2")
    cluster.wait_for_checkpoint(40)
    cluster.hosts[1].kill()
    assert cluster.codes([first]) == [0], cluster.said()
    assert [(event["step"], event["world_size"]) for event in cluster.starts()] == [(0, 2), (40, 1)]
    assert_same(cluster.run_dir, undisturbed, tolerance=1e-5)


def test_range_of_hosts_takes_one_in_and_lets_it_go(cluster: Cluster) -> None:
    """At each change the ranks stop with a checkpoint, so that no step is lost or done twice."""
    first = cluster.start(0, "trainer.num_epochs=20", NNODES="1:2")
    cluster.wait(lambda: bool(cluster.starts()), what="the first host's start")
    second = cluster.start(1, "trainer.num_epochs=20", NNODES="1:2")
    cluster.wait(lambda: len(cluster.starts()) == 2, what="a start of both")
    joined = cluster.starts()[1]["step"]
    cluster.wait_for_step(joined + 5)
    second.terminate()
    assert cluster.codes([first, second]) == [0, STOPPED], cluster.said()
    assert [event["world_size"] for event in cluster.starts()] == [1, 2, 1]
    assert 0 < joined < cluster.starts()[2]["step"]
    assert [event["step"] for event in events(cluster.run_dir, "train")] == list(range(1, 20 * 21 + 1))
    assert events(cluster.run_dir, "end")[-1]["rows"] == 20 * 1004


@pytest.mark.parametrize(("number", "everything"), [(0, False), (1, True)])
def test_stopping_one_host_stops_all_with_a_checkpoint(
    cluster: Cluster, undisturbed: Path, number: int, everything: bool
) -> None:
    """Kubernetes sends SIGTERM to node.sh, Slurm to all processes of a node."""
    processes = cluster.start_both()
    cluster.wait_for_step(25)
    if everything:
        cluster.hosts[number].send(signal.SIGTERM)
    else:
        processes[number].terminate()
    assert cluster.codes(processes, timeout=60) == [STOPPED, STOPPED], cluster.said()
    stopped = cluster.step()
    assert 25 <= stopped < STEPS
    for host in range(2):
        assert f"stopped at step {stopped}, checkpoint written" in cluster.log(host).read_text()
    assert cluster.codes(cluster.start_both(job="8")) == [0, 0], cluster.said()
    assert [event["step"] for event in cluster.starts()] == [0, stopped]
    assert [event["step"] for event in events(cluster.run_dir, "train")] == list(range(1, STEPS + 1))
    assert_same(cluster.run_dir, undisturbed)
