import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rec.config import compose
from rec.distributed import Rank, process_group
from rec.logs import RunLog
from rec.train import build
from rec.trainer import Trainer
from tests.conftest import CONF, toy_overrides, write_toy
from tests.test_checkpoint import one_process


@pytest.fixture(autouse=True)
def rank() -> Iterator[Rank]:
    with one_process(), process_group() as rank:
        yield rank


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("train_state"), [180, 70])


def make_trainer(toy: Path, run_dir: Path, rank: Rank, *more: str) -> Trainer:
    """Of four steps, a checkpoint after the third."""
    fixed = [f"run_dir={run_dir}", "trainer.max_steps=4", "checkpoint.every_steps=3", "trainer.eval_split=null"]
    fixed += ["trainer.guard.spike_factor=1000", "experts=mixed", "weighting.kind=gradnorm", *more]
    config = compose(toy_overrides(toy, *fixed), config_dir=str(CONF))
    with closing(RunLog(run_dir, active=True)) as log:
        return build(config, rank, log)


def flat(state: object, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by their place."""
    if isinstance(state, dict):
        return {k: v for name, value in state.items() for k, v in flat(value, f"{prefix}{name}.").items()}
    local = getattr(state, "local_shards", None)
    return {prefix: (local()[0].tensor if local else torch.as_tensor(state)).detach().clone()}


def step(trainer: Trainer) -> None:
    for batch in trainer.reader.batches(trainer.info.step, trainer.info.step + 1):
        trainer.train_step(batch)
    trainer.info.step += 1


def save(trainer: Trainer) -> dict[str, Tensor]:
    """Three steps and their checkpoint; its tensors."""
    trainer.model.train()
    for _ in range(3):
        step(trainer)
    kept = flat(trainer.state.tensors())
    trainer.checkpoints.save(trainer.state.tensors(), trainer.info)
    trainer.checkpoints.finish()
    return kept


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_another_process_goes_on_with_every_tensor_and_learns_the_same(toy: Path, tmp_path: Path, rank: Rank) -> None:
    first = make_trainer(toy, tmp_path, rank)
    kept = save(first)
    second = make_trainer(toy, tmp_path, rank)
    second.model.train()
    step(second)
    torch.rand(5)
    before = flat(second.state.tensors())
    assert len(differing(kept, before)) > 50
    assert {name.split(".")[0] for name in before} == {"model", "optimizers", "weighting", "loop", "rng"}
    assert second.state.resume(second.checkpoints) == tmp_path / "checkpoints" / "step_000000003"
    assert differing(kept, flat(second.state.tensors())) == []
    assert (second.info.step, second.info.world_size) == (3, 1)
    step(first)
    step(second)
    assert differing(flat(first.state.tensors()), flat(second.state.tensors())) == []


def test_without_a_checkpoint_nothing_changes(toy: Path, tmp_path: Path, rank: Rank) -> None:
    trainer = make_trainer(toy, tmp_path, rank)
    before = flat(trainer.state.tensors())
    assert trainer.state.resume(trainer.checkpoints) is None
    assert differing(before, flat(trainer.state.tensors())) == [] and trainer.info.step == 0


def test_random_numbers_start_anew_where_the_number_of_ranks_has_changed(toy: Path, tmp_path: Path, rank: Rank) -> None:
    save(make_trainer(toy, tmp_path, rank))
    said = tmp_path / "checkpoints" / "step_000000003" / "checkpoint.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"world_size": 3}))
    trainer = make_trainer(toy, tmp_path, rank)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    assert trainer.state.resume(trainer.checkpoints) and trainer.info.step == 3
    assert torch.equal(torch.get_rng_state(), before)
