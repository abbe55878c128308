import json
from pathlib import Path

import pytest
import torch

from rec.checkpoint import Checkpoints
from rec.config import Config, compose, load
from rec.data import Reader
from rec.model import Ranker
from rec.schema import ConfigError
from rec.warm_start import _old_names, check_order
from tests.conftest import CONF, TWO_TOWERS, start_ranks, toy_overrides
from tests.test_train import events, weights

KNOWN = ["data.domain.names=[home]", "data.domain.allow_unknown=true", "data.tasks.click.domains=[home]"]
FROZEN = [
    "embeddings.*",
    "interaction.*",
    "experts.shared*",
    "experts.task*",
    "experts.fallback*",
    "towers.bias",
    "towers.t*",
    "towers.i*",
]
SIX = ["trainer.max_steps=6", "trainer.eval_split=null", "experts=shared_bottom", "interaction=none"]
STEPS = ["trainer.max_steps=6", "trainer.eval_split=null", "data.learn=[click]"]


@pytest.fixture(scope="module")
def runs(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one domain, one that adds a domain to it and trains only what is new, and one that only goes on from it."""
    folder = tmp_path_factory.mktemp("warm")
    start = f"checkpoint.warm_start={folder}/one/checkpoints/step_000000006"
    quoted = "[" + ",".join(f'"{pattern}"' for pattern in FROZEN) + "]"
    jobs = [
        toy_overrides(toy, *TWO_TOWERS, *STEPS, *KNOWN, f"run_dir={folder}/one"),
        toy_overrides(
            toy,
            *(*TWO_TOWERS, *STEPS, f"run_dir={folder}/two", start),
            *("data.tasks.click.domains=[search]", f"optim.freeze={quoted}", "sharding.default=table_wise"),
        ),
        toy_overrides(
            toy,
            *TWO_TOWERS,
            *STEPS,
            *KNOWN,
            f"run_dir={folder}/on",
            start,
            "optim.dense.lr=1e-12",
            "optim.sparse.lr=1e-12",
        ),
    ]
    grown = [f"run_dir={folder}/grown", f"checkpoint.warm_start={folder}/plain/checkpoints/step_000000006"]
    jobs += [
        toy_overrides(toy, *SIX, f"run_dir={folder}/plain"),
        toy_overrides(toy, *SIX, *grown, "data=toy_grown", "checkpoint.rename=[member:user]"),
    ]
    start_ranks("tests/workers/train_worker.py", json.dumps(jobs), ranks=2)
    return folder


def of_model(run_dir: Path) -> dict[str, torch.Tensor]:
    state = weights(run_dir)
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def test_weights_are_taken_over(runs: Path) -> None:
    before, after = of_model(runs / "one"), of_model(runs / "on")
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    (event,) = events(runs / "on", "warm_start")
    assert (event["grown"], event["new"]) == ([], [])


def test_a_domain_is_added_and_nothing_else_changes(runs: Path) -> None:
    before, after = of_model(runs / "one"), of_model(runs / "two")
    (event,) = events(runs / "two", "warm_start")
    assert event["new"] == []
    changed = [name for name in before if name.startswith("embeddings.") and not torch.equal(before[name], after[name])]
    assert not changed  # tables, the items' among them
    grown = 0
    for name in before:
        old, new = before[name], after[name]
        if old.shape != new.shape:
            part = tuple(slice(size) for size in old.shape)
            assert torch.equal(new[part], old), name
            rest = new.clone()
            rest[part] = 0
            grown += rest.abs().sum().item() > 0
        else:
            assert torch.equal(new, old), name
    assert grown == len(event["grown"]) >= 7


def test_the_old_domain_predicts_as_before(runs: Path) -> None:
    logits = []
    for name in ("one", "two"):
        config = load(runs / name / "config.yaml")
        ranker = Ranker(config.model, config.data).eval()
        ranker.load_state_dict(of_model(runs / name))
        batch = next(Reader(config.data, config.reader, split="valid", training=False).batches())
        logits.append(ranker(batch).logits[batch.domain_id == 0])
    assert len(logits[0]) > 10
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-6, atol=1e-6)


def test_a_run_that_asks_for_none_has_none(runs: Path) -> None:
    assert not events(runs / "one", "warm_start")


def config_of(toy: Path, *changes: str) -> Config:
    return compose(toy_overrides(toy, *TWO_TOWERS, *changes), config_dir=str(CONF))


def test_other_domains_are_refused(runs: Path, toy: Path) -> None:
    path = Checkpoints(runs / "one" / "checkpoints", load(runs / "one" / "config.yaml").checkpoint).find()
    assert path is not None
    check_order(config_of(toy), path)
    with pytest.raises(
        ConfigError, match=r"knows the domains \['home'\], and data.domain.names is \['search', 'home'\]"
    ):
        check_order(config_of(toy, "data.domain.names=[search,home]"), path)
    with pytest.raises(ConfigError, match="does not exist"):
        check_order(config_of(toy), path.parent)


TABLE = "embeddings.tables.embedding_bags.{}.weight"


class TestGrown:
    """A table that starts as a copy of another and is frozen, one that is slowed down, a new one, and a new task."""

    def test_what_is_new_starts_anew(self, runs: Path) -> None:
        (event,) = events(runs / "grown", "warm_start")
        assert TABLE.format("fresh") in event["new"]
        assert any("towers" in name for name in event["grown"] + event["new"])

    def test_a_frozen_table_under_another_name_is_the_old_one_bit_for_bit_beside_that_which_learns(
        self, runs: Path
    ) -> None:
        before, after = of_model(runs / "plain"), of_model(runs / "grown")
        assert torch.equal(after[TABLE.format("member")], before[TABLE.format("user")])
        moved = (after[TABLE.format("user")] - before[TABLE.format("user")]).abs()
        assert 0 < moved.max() < 0.5

    def test_a_slow_table_moves_less(self, runs: Path) -> None:
        before, after = of_model(runs / "plain"), of_model(runs / "grown")
        slow, usual = ((after[TABLE.format(of)] - before[TABLE.format(of)]).abs().mean() for of in ("tags", "item"))
        assert 0 < slow < usual / 3

    def test_names_that_lead_nowhere_are_refused(self) -> None:
        names, saved = ["tables.member.weight"], ["tables.user.weight"]
        with pytest.raises(ConfigError, match="no weight here has 'membr' in its name; did you mean 'member'"):
            _old_names(names, ["membr:user"], saved)
        with pytest.raises(ConfigError, match="no weight of the checkpoint has 'usr' there; did you mean 'user'"):
            _old_names(names, ["member:usr"], saved)
        assert _old_names(["a.member2.b"], ["a:c"], ["c.member2.b"]) == {"a.member2.b": "c.member2.b"}

    def test_other_tasks_are_refused(self, runs: Path, toy: Path) -> None:
        path = runs / "plain" / "checkpoints" / "step_000000006"
        with pytest.raises(ConfigError, match=r"knows the tasks \['click', 'purchase', 'dwell'\], and data.tasks is"):
            check_order(compose(toy_overrides(toy, "data.learn=[click]"), config_dir=str(CONF)), path)
