import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from rec import config as configuration
from rec.train import run_folder
from tests.conftest import CONF, start_ranks, torchrun, toy_overrides

SHARDINGS = ("row_wise", "table_wise", "column_wise")


def events(run_dir: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def known(values: dict) -> dict:
    """The metrics with a meaning."""
    return {name: value for name, value in values.items() if value is not None}


def weights(run_dir: Path, *, step: int | None = None, rng: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, or of a step's, read without a process group.

    With `rng` each rank's random numbers too, those of PyTorch, which are seeded.
    """
    path = sorted((run_dir / "checkpoints").glob("step_*" if step is None else f"step_{step:09d}"))[-1]
    metadata = FileSystemReader(str(path)).read_metadata().state_dict_metadata
    state = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in metadata.items()
        if hasattr(m, "size") and (k[:4] != "rng." or (rng and k.endswith("torch")))
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # meant: this is one process
        dcp.load(state, checkpoint_id=str(path), no_dist=True)
    return state


@pytest.fixture(scope="module")
def runs(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on 1 to 4 ranks under three shardings: 1,004 rows a pass, 21 steps of 50 rows, the last of 4."""
    folder = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2, 3, 4):
        jobs = [
            toy_overrides(
                toy,
                f"run_dir={folder}/{kind}-{ranks}",
                f"sharding.default={kind}",
                "trainer.num_epochs=2",
                "trainer.log_every_steps=1",
                "optim.dense.lr=0.003",
                "optim.dense.clip_grad_norm=1.0",
                "optim.schedule.warmup_steps=5",
                "optim.schedule.decay=cosine",
                # Adam and Adagrad divide by what is nearly zero in rows seen once: keep that from magnifying rounding
                "optim.sparse.eps=1e-3",
                "optim.dense.eps=1e-3",
            )
            for kind in SHARDINGS
        ]
        start_ranks("tests/workers/train_worker.py", json.dumps(jobs), ranks=ranks)
    return folder


@pytest.mark.parametrize("kind", SHARDINGS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
class TestOneRankEqualsMany:
    def test_loss_curve(self, runs: Path, kind: str, ranks: int) -> None:
        one, many = events(runs / f"{kind}-1", "train"), events(runs / f"{kind}-{ranks}", "train")
        assert len(one) == len(many) == 42
        for a, b in zip(one, many, strict=True):
            assert (a["step"], a["rows"]) == (b["step"], b["rows"])
            for key in ("loss", "grad_norm"):
                assert b[key] == pytest.approx(a[key], rel=1e-4), (key, a["step"])
            assert b["losses"] == pytest.approx(a["losses"], rel=1e-4)

    def test_metrics(self, runs: Path, kind: str, ranks: int) -> None:
        (one,), (many,) = (events(runs / f"{kind}-{n}", "eval") for n in (1, ranks))
        for task, values in one["metrics"].items():
            assert known(many["metrics"][task]) == pytest.approx(known(values), rel=1e-3), task
            for domain, inner in one["domains"][task].items():
                theirs = many["domains"][task][domain]
                assert theirs.keys() == inner.keys()
                for name, value in inner.items():
                    assert theirs[name] == (None if value is None else pytest.approx(value, rel=1e-3)), (
                        task,
                        domain,
                        name,
                    )

    def test_final_weights(self, runs: Path, kind: str, ranks: int) -> None:
        one, many = weights(runs / f"{kind}-1"), weights(runs / f"{kind}-{ranks}")
        assert one.keys() == many.keys()
        assert any("embedding_bags" in key for key in one) and any("momentum" in key for key in one)
        for key, value in one.items():
            np.testing.assert_allclose(many[key].numpy(), value.numpy(), rtol=1e-3, atol=2e-5, err_msg=key)


def test_kinds_that_keep_rows_whole_agree(runs: Path) -> None:
    row_wise, table_wise = weights(runs / "row_wise-3"), weights(runs / "table_wise-2")
    for key in (key for key in row_wise if key.startswith("model.")):
        np.testing.assert_allclose(table_wise[key].numpy(), row_wise[key].numpy(), rtol=1e-3, atol=2e-5, err_msg=key)


def test_tables_say_how_many_of_their_rows_were_trained(runs: Path) -> None:
    tables = events(runs / "row_wise-2", "tables")[-1]["tables"]
    assert 0 < tables["user"]["rows_trained"] < 1
    assert tables["item"]["rows_trained"] > 0.9


@pytest.mark.slow
def test_resume_at_another_world_size_and_plan(runs: Path, toy: Path, tmp_path: Path) -> None:
    """A run cut at step 21 and gone on with on other ranks, under another plan, ends where the uncut run ends."""
    cut = toy_overrides(toy, f"run_dir={tmp_path}/cut", "trainer.log_every_steps=1", "trainer.num_epochs=2")
    cut += ["optim.sparse.eps=1e-3", "optim.dense.eps=1e-3", "checkpoint.every_steps=17"]
    whole = [*cut, f"run_dir={tmp_path}/whole", "sharding.default=row_wise"]
    start_ranks("tests/workers/train_worker.py", json.dumps([[*cut, "sharding.default=row_wise"], whole]), ranks=2)
    last = sorted((tmp_path / "cut" / "checkpoints").glob("step_*"))[-1]
    assert last.name == "step_000000042"
    shutil.rmtree(last)  # as if the run had been cut before its end
    start_ranks("tests/workers/train_worker.py", json.dumps([[*cut, "sharding.default=table_wise"]]), ranks=3)
    assert events(tmp_path / "cut", "start")[-1]["step"] == 34
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for key, value in expected.items():
        np.testing.assert_allclose(got[key].numpy(), value.numpy(), rtol=1e-3, atol=2e-5, err_msg=key)


def test_command_line_evaluates_what_was_trained(toy: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = toy_overrides(toy, f"run_dir={run_dir}", "experts=shared_bottom", "interaction=none")
    overrides += ["trainer.num_epochs=9", "trainer.max_steps=100", "trainer.log_every_steps=10", "optim.dense.lr=0.02"]
    done = torchrun("-m", "rec.train", "--config-dir", str(CONF), *overrides)
    assert "100 steps of 50 rows on 2 cpu ranks" in done.stdout and "purchase" in done.stdout
    losses = [event["losses"]["click"] for event in events(run_dir, "train")]
    assert losses[-1] < losses[0] - 0.1  # it learns
    again = start_ranks("rec/train.py", "--config-dir", str(CONF), *overrides)
    assert "was done already at step 100" in again
    start_ranks("rec/evaluate.py", f"run_dir={run_dir}", "split=valid", ranks=3)
    during, after = events(run_dir, "eval")
    assert during["split"] == after["split"] == "valid"
    assert known(after["metrics"]["click"]) == pytest.approx(known(during["metrics"]["click"]), rel=1e-5)
    assert configuration.load(run_dir / "config.yaml").model.experts.kind == "shared_bottom"


def test_run_folder_is_found_again_by_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abcdef0123")
    first = run_folder(None)
    assert first.startswith("runs/") and first.endswith("_abcdef0123")
    os.makedirs("runs/2000-01-01_00-00-00_abcdef0123")
    os.makedirs("runs/2000-01-01_00-00-00_of_abcdef0123")  # another launch's
    assert run_folder(None) == "runs/2000-01-01_00-00-00_abcdef0123"
    assert run_folder("mine") == "mine"
