import json
from pathlib import Path

import pytest
import torch

from rec import export as exporting
from rec.config import Config, compose
from rec.data import Reader
from rec.model import Ranker
from rec.schema import ConfigError
from rec.serving import Served, inputs_of
from rec.two_towers import ItemSide, side_inputs, side_program, sides_of
from tests.conftest import CONF, TWO_TOWERS, toy_overrides
from tests.test_checkpoint import one_process


def config_of(toy: Path, *changes: str) -> Config:
    return compose(toy_overrides(toy, *TWO_TOWERS, *changes), config_dir=str(CONF))


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


def test_export_writes_and_checks_both_sides(two_tower_run: Path) -> None:
    with one_process():
        exporting.run([f"run_dir={two_tower_run}"])
    folder = two_tower_run / "export"
    assert {path.name for path in folder.iterdir()} == set(exporting.FILES)
    assert json.loads((folder / "schema.json").read_text())["check"]["max_difference"] < 1e-5
