from pathlib import Path

import pytest
import torch

from rec.config import compose
from rec.data import Reader
from rec.features import Batch
from rec.model import Outputs, Ranker
from tests.conftest import CONF, toy_overrides


def run(toy: Path, *changes: str) -> tuple[Ranker, Batch, Outputs]:
    config = compose(toy_overrides(toy, *changes), config_dir=str(CONF))
    torch.manual_seed(0)
    model = Ranker(config.model, config.data)
    batch = next(Reader(config.data, config.reader, split="valid", training=False).batches())
    return model, batch, model(batch)


@pytest.mark.parametrize("experts", ["mmoe", "shared_bottom", "omoe", "mixed", "cgc", "ple"])
@pytest.mark.parametrize("interaction", ["dcn_v2", "dcn_v2_low_rank", "none"])
def test_every_choice_gives_logits_and_gradients_everywhere(toy: Path, experts: str, interaction: str) -> None:
    model, _, outputs = run(toy, f"experts={experts}", f"interaction={interaction}")
    assert outputs.logits.shape == (50, 3) and outputs.logits.dtype == torch.float32
    assert (outputs.gate_weights is None) == (experts == "shared_bottom")
    outputs.logits.square().sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_rows_do_not_see_each_other_and_a_batch_of_one_works(toy: Path) -> None:
    _, _, many = run(toy)
    _, batch, one = run(toy, "reader.global_batch_size=1")
    assert batch.num_rows == 1 and one.logits.shape == (1, 3)
    torch.testing.assert_close(one.logits[0], many.logits[0])


def test_bf16_stays_close_and_keeps_weights_and_logits_in_float32(toy: Path) -> None:
    _, _, exact = run(toy)
    model, _, rounded = run(toy, "model.bf16=true")
    assert rounded.logits.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not torch.equal(rounded.logits, exact.logits)
    torch.testing.assert_close(rounded.logits, exact.logits, rtol=0.1, atol=0.1)


def test_a_data_set_without_ids_or_without_dense_columns_works(toy: Path) -> None:
    config = compose(toy_overrides(toy), config_dir=str(CONF))
    for kept in (config.data.dense_features, config.data.sparse_features):
        tables = {config.data.table_of(name) for name, f in kept.items() if name in config.data.sparse_features}
        data = compose(toy_overrides(toy), config_dir=str(CONF)).data
        data.features, data.tables = dict(kept), {name: table for name, table in data.tables.items() if name in tables}
        batch = next(Reader(data, config.reader, split="valid", training=False).batches())
        assert Ranker(config.model, data)(batch).logits.shape == (50, 3)
