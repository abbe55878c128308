import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "tests" / "conf"
TWO_TOWERS = [
    "towers=dot",
    "model.towers.item_features=[item,text]",
    "model.towers.item_layer_sizes=[8,6]",
    "experts=mtmd",
]
KUAIRAND = ROOT.parent / "shared" / "data" / "KuaiRand-Pure"


def toy_table(num_rows: int, *, seed: int = 0) -> pa.Table:
    """Rows of conf/data/toy.yaml in which a click depends on the user and the price, a purchase on the item."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 997, num_rows), rng.integers(0, 203, num_rows)
    price = rng.lognormal(1, 1, num_rows).astype(np.float32)
    click = rng.random(num_rows) < 1 / (1 + np.exp(3 + 0.5 * np.sin(user) - 2 * np.log1p(price)))
    purchase = click & (rng.random(num_rows) < 0.2 + 0.3 * (item % 3 == 0))
    lengths = rng.integers(0, 6, num_rows)
    return pa.table(
        {
            "user": user,
            "query": [f"query {i}" for i in rng.integers(0, 40, num_rows)],
            "item": pa.array(item, pa.int32()),
            "tags": pa.array([rng.integers(0, 11, n).tolist() for n in lengths], pa.list_(pa.int64())),
            "history": pa.array([rng.integers(0, 203, n).tolist() for n in lengths], pa.large_list(pa.int64())),
            "price": price,
            "text": pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=3 * num_rows).astype(np.float32)), 3),
            "click": click,
            "purchase": purchase.astype(np.int8),
            "dwell": np.where(click, rng.exponential(3, num_rows), 0.0),
            "trust": rng.random(num_rows),
            "tab": rng.choice(["home", "search"], num_rows),
            "row": np.arange(num_rows) + 1_000_000 * seed,
        }
    )


def write_toy(folder: Path, sizes: list[int] = [613, 1, 0, 390], *, row_group_size: int = 100) -> Path:  # noqa: B006
    """Uneven files of uneven row groups, an empty one among them."""
    for split, offset in (("train", 0), ("valid", 100)):
        (folder / split).mkdir(parents=True)
        for number, size in enumerate(sizes):
            table = toy_table(size, seed=offset + number)
            pq.write_table(table, folder / split / f"part-{number}.parquet", row_group_size=row_group_size)
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def kuairand() -> Path:
    if not KUAIRAND.is_dir():
        if os.environ.get("REC_REQUIRE_DATA"):
            pytest.fail(f"{KUAIRAND} is absent, and REC_REQUIRE_DATA says that it must be there")
        pytest.skip(f"the KuaiRand-Pure log is not at {KUAIRAND}")
    return KUAIRAND


def toy_overrides(toy: Path, *more: str) -> list[str]:
    small = [
        "reader.global_batch_size=50",
        "reader.shuffle_rows=300",
        "model.experts.layer_sizes=[16,8]",
        "model.towers.layer_sizes=[4]",
    ]
    return ["data=toy", f"data.path={toy}", *small, "sharding.column_width=4", *more]


def torchrun(
    *command: str, ranks: int = 2, timeout: float = 240, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Start real ranks of `-m MODULE ARGS...` or `SCRIPT ARGS...` and wait for them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(
        [*launcher, *command], capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(command)} on {ranks} ranks ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


@functools.cache
def rank_server() -> subprocess.Popen[str]:
    """The process that `start_ranks` asks, one in a run of tests; it ends with them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/workers/rank_server.py"]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    atexit.register(server.__exit__, None, None, None)  # its stdin is closed, it ends
    return server


def start_ranks(script: str, *arguments: str, ranks: int = 2, timeout: float = 240) -> str:
    """Run `script` on real ranks under torch's elastic agent and wait for them; gives what they print.

    They are forked from a process that has imported everything, which saves the seconds that `torchrun` takes.
    """
    server = rank_server()
    assert server.stdin and server.stdout
    with tempfile.NamedTemporaryFile("r") as log:
        job = {"script": [script, *arguments], "ranks": ranks, "log": log.name, "timeout": timeout}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code, printed = server.stdout.readline().strip(), log.read()
    if code != "0":
        pytest.fail(f"{script} on {ranks} ranks ended with {code or 'the server'}:\n{printed}")
    return printed


@pytest.fixture(scope="session")
def two_tower_run(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of two towers on two ranks."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    jobs = [toy_overrides(toy, *TWO_TOWERS, f"run_dir={run_dir}", "trainer.max_steps=8", "trainer.eval_split=null")]
    start_ranks("tests/workers/train_worker.py", json.dumps(jobs), ranks=2)
    return run_dir
