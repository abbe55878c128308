"""The two sides of a network with two towers as programs of their own: items ahead of time, queries when they come.

`ItemSide` gives an item's vector from the item alone; `QuerySide` gives predictions from the query and items' vectors. Together they
are the served network, which `rec.export` checks. An index of vectors is good for every domain and task of the network.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rec.model import ModelConfig
from rec.schema import DataConfig
from rec.serving import Served
from rec.towers import DotTowers, DotTowersConfig

_ROWS = 3  # of the inputs that programs are traced with


class ItemSide(nn.Module):
    """Ids and dense columns of items -> their vectors [B, r].

    Args:
        served: with two towers; its weights are shared with this module.
        data: description of the data set.
    """

    def __init__(self, served: Served, data: DataConfig) -> None:
        super().__init__()
        ranker = served.ranker
        assert ranker.item_inputs is not None
        self.sparse, self.dense, self.num_dense = ranker.item_inputs.sparse, ranker.item_inputs.dense, data.num_dense
        self.embeddings = served.embeddings.only(self.sparse)
        assert isinstance(ranker.towers, DotTowers)
        self.inputs, self.item_tower = ranker.item_inputs, ranker.towers.item_tower

    def forward(self, values: dict[str, Tensor], lengths: dict[str, Tensor], dense: Tensor) -> Tensor:
        """Vectors [B, r] float32.

        Args:
            values: item feature -> ids of all rows [n] int64, one row after another.
            lengths: item feature -> number of ids of each row [B] int64.
            dense: the item's dense columns [B, their number] float32.
        """
        x = self.inputs(self.embeddings(values, lengths), spread(dense, self.dense, self.num_dense))
        return self.item_tower(x)[0]


class QuerySide(nn.Module):
    """Ids and dense columns of queries, and items' vectors -> predictions [B, S].

    Args:
        served: with two towers; its weights are shared with this module.
        data: description of the data set.
    """

    def __init__(self, served: Served, data: DataConfig) -> None:
        super().__init__()
        inputs = served.ranker.inputs
        self.sparse, self.dense, self.num_dense = inputs.sparse, inputs.dense, data.num_dense
        self.embeddings = served.embeddings.only(self.sparse)
        self.served = copy.copy(served)
        self.served._modules = {name: part for name, part in served._modules.items() if name != "embeddings"}

    def forward(
        self,
        values: dict[str, Tensor],
        lengths: dict[str, Tensor],
        dense: Tensor,
        domain_id: Tensor,
        items: Tensor,
    ) -> Tensor:
        """Predictions [B, S], as `Served.forward` gives them.

        Args:
            values: query feature -> ids of all rows [n] int64, one row after another.
            lengths: query feature -> number of ids of each row [B] int64.
            dense: the query's dense columns [B, their number] float32.
            domain_id: [B] int64.
            items: vectors [B, r] float32 of the item in each row.
        """
        embedded = self.embeddings(values, lengths)
        dense = spread(dense, self.dense, self.num_dense)
        return self.served.predict(embedded, dense, items=items, domain_id=domain_id)


def sides_of(served: Served, data: DataConfig) -> list[ItemSide | QuerySide]:
    """The two sides of a served network; none where it has not two towers."""
    return [ItemSide(served, data), QuerySide(served, data)] if served.ranker.item_inputs else []


def item_width(config: ModelConfig) -> int:
    """r, the width of an item's vector; 0 without two towers."""
    return config.towers.item_layer_sizes[-1] if isinstance(config.towers, DotTowersConfig) else 0


def spread(columns: Tensor, places: list[int], width: int) -> Tensor:
    """[B, len(places)] -> [B, width] with column i at `places[i]` and zeros elsewhere.

    >>> spread(torch.tensor([[5.0, 7.0]]), [2, 0], 3).tolist()
    [[7.0, 0.0, 5.0]]
    """
    zeros = columns.new_zeros(columns.shape[0], 1)
    both = torch.cat([columns, zeros], dim=1)
    order = [places.index(i) if i in places else len(places) for i in range(width)]
    return both[:, order]


def side_inputs(side: ItemSide | QuerySide, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a side takes of the inputs of `Served`; a query's items come beside it."""
    taken: dict[str, Any] = {
        "values": {key: inputs["values"][key] for key in side.sparse},
        "lengths": {key: inputs["lengths"][key] for key in side.sparse},
        "dense": inputs["dense"][:, side.dense],
    }
    return taken | ({"domain_id": inputs["domain_id"]} if isinstance(side, QuerySide) else {})


def side_program(side: ItemSide | QuerySide, *, item_width: int) -> ExportedProgram:
    """A side as a program that torch alone runs, for any number of rows from 1 and of ids."""
    batch = Dim("batch", min=1)
    inputs: dict[str, Any] = {
        "values": {key: torch.zeros(4, dtype=torch.int64) for key in side.sparse},
        "lengths": {key: torch.tensor([1, 0, 3]) for key in side.sparse},
        "dense": torch.zeros(_ROWS, len(side.dense)),
    }
    shapes: dict[str, Any] = {
        "values": {key: {0: Dim(f"ids_{i}", min=0)} for i, key in enumerate(side.sparse)},
        "lengths": {key: {0: batch} for key in side.sparse},
        "dense": {0: batch},
    }
    if isinstance(side, QuerySide):
        inputs |= {"domain_id": torch.zeros(_ROWS, dtype=torch.int64), "items": torch.zeros(_ROWS, item_width)}
        shapes |= {"domain_id": {0: batch}, "items": {0: batch}}
    return torch.export.export(side, (), inputs, dynamic_shapes=shapes)
