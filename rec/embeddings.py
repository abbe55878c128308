"""Ids become vectors: pooled ones, histories kept apart, and the linear part's weights.

Tables that an attended history reads lie in a TorchRec `EmbeddingCollection`, which gives a vector an id; all others, those of the
linear part among them, lie in one `EmbeddingBagCollection`, which sums the ids of a row while it reads them.

The order of a sharded KeyedTensor's columns depends on the sharding plan, so nothing may use `values()`: reading by name
keeps the meaning of the network independent of world size and plan.

Means are taken here and not by TorchRec. Tables always sum, and the sums are divided by the number of ids afterwards: where
a plan mixes kinds of sharding, TorchRec 1.8 divides some features by other features' lengths (and row-wise always by n + 1e-6).
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from rec.schema import DataConfig, FeatureKind, Pooling, TableConfig

LINEAR = "linear/"  # begins the names of the linear part's tables


@dataclass
class History:
    """A feature's ids as vectors, row by row, oldest first.

    Attributes:
        values: [B, L, D], 0 behind a row's last id.
        mask: [B, L] bool, where there is an id.
    """

    values: Tensor
    mask: Tensor


@dataclass
class Embedded:
    """What the tables say of B rows.

    Attributes:
        pooled: feature -> [B, D], the sum or mean of its ids' vectors; 0 without ids.
        histories: feature -> its ids' vectors, of the features that are attended.
        linear: feature -> [B, W], the sum of its ids' weights in the linear part.
    """

    pooled: dict[str, Tensor]
    histories: dict[str, History] = field(default_factory=dict)
    linear: dict[str, Tensor] = field(default_factory=dict)


def linear_width(num_tasks: int) -> int:
    """Columns of the linear part's tables: a weight a task, rounded up to a multiple of 4, as FBGEMM wants it.

    >>> linear_width(3)
    4
    """
    return -(-num_tasks // 4) * 4


def linear_tables(data: DataConfig, features: Collection[str], *, num_tasks: int) -> dict[str, TableConfig]:
    """The linear part's tables: for each of the sparse `features` one of as many rows as its own, with a weight a task.

    They start at 0.
    """
    return {
        LINEAR + name: TableConfig(
            num_embeddings=data.tables[data.table_of(name)].num_embeddings,
            embedding_dim=linear_width(num_tasks),
            pooling=Pooling.sum,
            init_range=0.0,
        )
        for name in data.sparse_features
        if name in features
    }


class Embeddings(nn.Module):
    """Every table of the network, and how features are read from them.

    Args:
        data: description of the data set.
        linear: sparse features with weights in the linear part.
        attended: sequence features whose ids are wanted one by one.
        device: where the tables are made; `meta` leaves it to the sharder.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        linear: Collection[str] = (),
        attended: Collection[str] = (),
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.keys = list(data.sparse_features)
        self.table_of = {key: data.table_of(key) for key in self.keys}
        weights = linear_tables(data, linear, num_tasks=len(data.tasks))
        self.linear_of = {name.removeprefix(LINEAR): name for name in weights}
        self.configs = {**data.tables, **weights}  # table -> its config
        self.dims = {key: self.configs[table].embedding_dim for key, table in self.table_of.items()}
        self.averaged = {
            key: self.configs[table].pooling is Pooling.mean and data.features[key].kind is not FeatureKind.id
            for key, table in self.table_of.items()
        }
        self.max_lengths = {name: data.features[name].max_length or 1 for name in attended}
        sequence = {self.table_of[name] for name in attended}
        self.unpooled = [key for key in self.keys if self.table_of[key] in sequence]
        self.in_sequences = [name for name in self.configs if name in sequence]  # tables
        self.tables = self._bags([name for name in self.configs if name not in sequence], device)
        self.sequences = self._sequences(self.in_sequences, device)

    def readers(self, table: str) -> list[str]:
        """The features that read a table."""
        if table.startswith(LINEAR):
            return [table.removeprefix(LINEAR)]
        return [key for key in self.keys if self.table_of[key] == table]

    def forward(self, sparse_features: KeyedJaggedTensor) -> Embedded:
        """Ids of B rows -> vectors, float32; features in the order of the configuration."""
        sums: dict[str, Tensor] = {}
        if self.tables is not None:
            keyed: KeyedTensor = self.tables(sparse_features)
            sums |= keyed.to_dict()
        rows: dict[str, tuple[Tensor, Tensor]] = {}  # values, lengths
        if self.sequences is not None:
            rows = {key: (jagged.values(), jagged.lengths()) for key, jagged in self.sequences(sparse_features).items()}
        pooled = {}
        for key in self.keys:
            if key in self.unpooled:
                values, lengths = rows[key]
                pooled[key] = self.mean(key, segment_sum(values, lengths), lengths)
            else:
                name = f"{key}@{self.table_of[key]}" if key in self.linear_of else key  # TorchRec's, read by two tables
                pooled[key] = self.mean(key, sums[name], sparse_features[key].lengths())
        linear = {key: sums[key if key in self.unpooled else f"{key}@{table}"] for key, table in self.linear_of.items()}
        histories = {key: padded(*rows[key], max_length=length) for key, length in self.max_lengths.items()}
        return Embedded(pooled, histories, linear)

    def mean(self, key: str, sums: Tensor, lengths: Tensor) -> Tensor:
        """[B, D], the sums of a feature's vectors, divided by the number of its ids where its table takes means."""
        return sums / lengths.clamp(min=1).unsqueeze(1) if self.averaged[key] else sums

    def _bags(self, names: list[str], device: torch.device | None) -> EmbeddingBagCollection | None:
        configs = [
            EmbeddingBagConfig(
                name=name,
                num_embeddings=self.configs[name].num_embeddings,
                embedding_dim=self.configs[name].embedding_dim,
                feature_names=self.readers(name),
                pooling=PoolingType.SUM,
            )
            for name in names
        ]
        return EmbeddingBagCollection(tables=configs, device=device) if configs else None

    def _sequences(self, names: list[str], device: torch.device | None) -> EmbeddingCollection | None:
        configs = [
            EmbeddingConfig(
                name=name,
                num_embeddings=self.configs[name].num_embeddings,
                embedding_dim=self.configs[name].embedding_dim,
                feature_names=self.readers(name),
            )
            for name in names
        ]
        return EmbeddingCollection(tables=configs, device=device) if configs else None


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """[n, D] and lengths [B] that add up to n -> [B, D], the sum of each row's vectors.

    >>> segment_sum(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 1])).tolist()
    [[3.0], [0.0], [4.0]]
    """
    offsets = F.pad(lengths.long().cumsum(0), (1, 0))
    places = torch.arange(len(values), device=values.device)
    return F.embedding_bag(places, values, offsets, mode="sum", include_last_offset=True)


def padded(values: Tensor, lengths: Tensor, *, max_length: int) -> History:
    """[n, D] and lengths [B], none above `max_length` = L, that add up to n -> [B, L, D] and a mask.

    >>> padded(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 1]), max_length=2).values.squeeze(-1).tolist()
    [[1.0, 2.0], [4.0, 0.0]]
    """
    lengths = lengths.long()
    places = torch.arange(max_length, device=values.device)
    mask = places < lengths.unsqueeze(1)  # [B, L]
    index = (lengths.cumsum(0) - lengths).unsqueeze(1) + places
    values = F.pad(values, (0, 0, 0, 1))  # a row of zeros, which the places without an id read
    return History(values[torch.where(mask, index, values.shape[0] - 1)], mask)
