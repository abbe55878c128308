import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from rec import export as exporting
from rec import items as indexing
from rec.config import Config, compose, load
from rec.data import Reader
from rec.distributed import process_group
from rec.model import Ranker
from rec.schema import ConfigError
from rec.serving import Served, inputs_of
from rec.two_towers import ItemSide, QuerySide, side_inputs, side_program, sides_of
from tests.conftest import CONF, torchrun, toy_overrides
from tests.test_checkpoint import one_process

TWO = ["towers=dot", "model.towers.item_features=[item,text]", "model.towers.item_layer_sizes=[8,6]", "experts=mtmd"]


def config_of(toy: Path, *changes: str) -> Config:
    return compose(toy_overrides(toy, *TWO, *changes), config_dir=str(CONF))


@pytest.fixture(scope="module")
def served(toy: Path) -> tuple[Served, Config, dict]:
    """A network with random weights, and its inputs of 50 rows."""
    config = config_of(toy, "data.tasks.click.auxiliary=true")
    torch.manual_seed(0)
    ranker = Ranker(config.model, config.data)
    for name, parameter in ranker.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    batch = next(Reader(config.data, config.reader, split="valid", training=False).batches())
    return Served(ranker, config.data, calibrators=None), config, inputs_of(batch, 50)


def test_the_sides_together_are_the_network(served: tuple[Served, Config, dict]) -> None:
    network, config, inputs = served
    item, query = sides_of(network, config.data)
    vectors = item(**side_inputs(item, inputs))
    assert vectors.shape == (50, 6)
    assert torch.equal(query(**side_inputs(query, inputs), items=vectors), network(**inputs))
    for side, other in ((item, query), (query, item)):
        tables = set(side.embeddings.tables)
        assert tables == {"item"} if isinstance(side, ItemSide) else tables == {"user", "query", "item", "tags"}
        assert not set(side.sparse) & set(other.sparse)
        assert not set(side.dense) & set(other.dense)


def test_programs_of_the_sides_take_any_number_of_rows(served: tuple[Served, Config, dict]) -> None:
    network, config, inputs = served
    item, query = sides_of(network, config.data)
    programs = [side_program(side, item_width=6).module() for side in (item, query)]
    for rows in (50, 1):
        few = inputs if rows == 50 else {**inputs}
        if rows == 1:
            few = {
                "values": {key: values[: int(inputs["lengths"][key][0])] for key, values in inputs["values"].items()},
                "lengths": {key: lengths[:1] for key, lengths in inputs["lengths"].items()},
                "dense": inputs["dense"][:1],
                "domain_id": inputs["domain_id"][:1],
            }
        vectors = programs[0](**side_inputs(item, few))
        preds = programs[1](**side_inputs(query, few), items=vectors)
        torch.testing.assert_close(preds, network(**few), rtol=1e-6, atol=1e-6)


def test_an_item_s_vector_depends_on_the_item_alone(served: tuple[Served, Config, dict]) -> None:
    network, config, inputs = served
    ranker = network.ranker
    other = {key: values.clone() for key, values in inputs["values"].items()}
    for key in ("user", "query", "history"):
        other[key] = other[key].flip(0)
    dense = inputs["dense"].clone()
    dense[:, config.data.dense_columns["price"]] += 5

    def vectors(values: dict, dense: torch.Tensor) -> torch.Tensor:
        return ranker.items(network.embeddings(values, inputs["lengths"]), dense)

    assert torch.equal(vectors(other, dense), vectors(inputs["values"], inputs["dense"]))
    other["item"] = other["item"].flip(0)
    assert not torch.equal(vectors(other, dense), vectors(inputs["values"], inputs["dense"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.towers.item_features=[]"], r"names 0 of 7 features, expected some for each"),
        (["model.towers.item_features=[itm]"], r"has 'itm'; did you mean 'item'"),
        (["linear=v1", "model.linear.features=[user]"], r"bring \['user'\] to the logits beside the two towers"),
        (["model.fm={kind: shared, features: [user, query]}"], r"bring \['user', 'query'\]"),
        (
            ["data.features.history.max_length=4", "model.histories=[{feature: history, candidate: item}]"],
            r"bring \['history'\]",
        ),
    ],
)
def test_what_would_have_an_item_know_the_query_is_refused(toy: Path, changes: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(toy, *changes)


@pytest.fixture(scope="module")
def run_dir(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("two") / "run"
    jobs = [toy_overrides(toy, *TWO, f"run_dir={run_dir}", "trainer.max_steps=8", "trainer.eval_split=null")]
    torchrun("tests/workers/train_worker.py", json.dumps(jobs), ranks=2)
    return run_dir


def test_export_writes_and_checks_both_sides(run_dir: Path) -> None:
    with one_process():
        exporting.run([f"run_dir={run_dir}"])
    folder = run_dir / "export"
    assert {path.name for path in folder.iterdir()} == set(exporting.FILES)
    assert json.loads((folder / "schema.json").read_text())["check"]["max_difference"] < 1e-5


def test_the_index_holds_every_item_once_as_last_seen(run_dir: Path) -> None:
    with one_process():
        indexing.run([f"run_dir={run_dir}", "split=valid"])
    index = pq.read_table(run_dir / "items.parquet")
    config = load(run_dir / "config.yaml")
    path = next((run_dir / "checkpoints").glob("step_*"))
    with one_process(), process_group(timeout_s=60):
        network = exporting.load_served(config, path, calibrated=False)
    item, query = sides_of(network, config.data)
    assert isinstance(query, QuerySide)
    reader = Reader(config.data, config.reader, split="valid", training=False)
    last: dict[int, torch.Tensor] = {}
    seen: dict[int, int] = {}
    for batch in reader.batches():
        inputs = inputs_of(batch, batch.num_rows)
        vectors = item(**side_inputs(item, inputs))
        for row, key in enumerate(inputs["values"]["item"].tolist()):
            if seen.get(key, -1) < batch.row_id[row]:
                seen[key], last[key] = int(batch.row_id[row]), vectors[row]
    assert index["item"].to_pylist() == sorted(last)
    expected = torch.stack([last[key] for key in sorted(last)])
    torch.testing.assert_close(torch.tensor(index["vector"].to_pylist()), expected, rtol=1e-5, atol=1e-6)


def test_a_run_without_an_item_tower_has_no_index(toy: Path) -> None:
    config = compose(toy_overrides(toy), config_dir=str(CONF))
    with pytest.raises(ConfigError, match="the run's network has no item tower"):
        indexing.key_of(config, "")
    with pytest.raises(ConfigError, match=r"key is 'user', expected an id feature of the item's side; .*valid: item"):
        indexing.key_of(config_of(toy), "user")
