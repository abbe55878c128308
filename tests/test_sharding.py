from pathlib import Path

import pytest
import torch

from rec.config import compose
from rec.embeddings import Embeddings
from rec.schema import ConfigError
from rec.sharding import ShardingConfig, _fill, init_tables
from tests.conftest import CONF, start_ranks, toy_overrides


def test_every_kind_of_sharding_gives_the_one_device_network(toy: Path) -> None:
    printed = start_ranks("tests/workers/sharding_worker.py", str(toy), ranks=2)
    row_wise, table_wise, column_wise, auto, mixed, *with_all_parts = (
        eval(line) for line in printed.splitlines() if line.startswith("{")
    )
    assert set(row_wise.values()) == {"row_wise"}
    assert set(table_wise.values()) == {"table_wise"}
    assert set(column_wise.values()) == {"column_wise"}
    assert "column_wise" not in auto.values()  # it would give a row several accumulators
    assert (mixed["user"], mixed["item"], mixed["query"]) == ("table_wise", "column_wise", "row_wise")
    # and with an attended history, whose table gives a vector an id, and a linear part
    for kind, plan in zip(("row_wise", "table_wise", "column_wise"), with_all_parts, strict=False):
        assert set(plan.values()) == {kind}
        assert {"item", "linear/user", "linear/item"} <= set(plan)
    assert len(with_all_parts) == 4


def test_any_piece_of_a_table_starts_with_the_table_s_values() -> None:
    whole = torch.empty(9000, 8)
    _fill(whole, seed=5, row=0, column=0, width=8, limit=0.1)
    for row, column, shape in ((0, 0, (9000, 8)), (4095, 4, (2, 4)), (8191, 0, (809, 8)), (17, 4, (5000, 4))):
        part = torch.empty(shape)
        _fill(part, seed=5, row=row, column=column, width=8, limit=0.1)
        assert torch.equal(part, whole[row : row + shape[0], column : column + shape[1]])
    assert whole.abs().max() <= 0.1
    assert whole.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert len(whole.unique()) > 0.99 * whole.numel() * 0.98


def test_tables_start_different_from_each_other_and_with_the_seed(toy: Path) -> None:
    config = compose(toy_overrides(toy, "data.tables.user.init_range=0.5"), config_dir=str(CONF))

    def start(seed: int) -> dict[str, torch.Tensor]:
        embeddings = Embeddings(config.data)
        init_tables(embeddings, ShardingConfig(), seed=seed)
        return {key.split(".")[-2]: value for key, value in embeddings.state_dict().items()}

    first, same, other = start(1), start(1), start(2)
    assert all(torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["user"][:50] / 10, first["query"])
    assert first["query"].abs().max() <= 0.05 < first["user"].abs().max()


def test_a_bad_column_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sharding.column_width is 6, expected a positive multiple of 4"):
        ShardingConfig(column_width=6)
