"""Ids become vectors: one TorchRec collection holds every table, and pooled features are read by key.

The order of a sharded KeyedTensor's columns depends on the sharding plan, so nothing may use `values()`: regrouping by name
keeps the meaning of the network independent of world size and plan.

Means are taken here and not by TorchRec. Tables always sum, and the sums are divided by the number of ids afterwards: where
a plan mixes kinds of sharding, TorchRec 1.8 divides some features by other features' lengths (and row-wise always by n + 1e-6).
"""

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from rec.schema import DataConfig, FeatureKind, Pooling


def table_configs(data: DataConfig) -> list[EmbeddingBagConfig]:
    """TorchRec's description of every table of a data set, in the order of the configuration."""
    readers: dict[str, list[str]] = {name: [] for name in data.tables}
    for feature in data.sparse_features:
        readers[data.table_of(feature)].append(feature)
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=readers[name],
            pooling=PoolingType.SUM,
        )
        for name, table in data.tables.items()
    ]


class Embeddings(nn.Module):
    """Pooled embeddings of every sparse feature, side by side.

    Args:
        data: description of the data set.
        device: where the tables are made; `meta` leaves it to the sharder.
    """

    def __init__(self, data: DataConfig, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.keys = list(data.sparse_features)
        tables = {key: data.tables[data.table_of(key)] for key in self.keys}
        self.dims = [tables[key].embedding_dim for key in self.keys]
        self.averaged = [
            tables[key].pooling is Pooling.mean and data.features[key].kind is not FeatureKind.id for key in self.keys
        ]
        self.out_features = sum(self.dims)
        self.tables = EmbeddingBagCollection(tables=table_configs(data), device=device) if self.keys else None

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        """[B, sum of D] float32, features in the order of the configuration; zeros where a row has no ids."""
        if self.tables is None:
            return torch.zeros(sparse_features.stride(), 0, device=sparse_features.device())
        pooled: KeyedTensor = self.tables(sparse_features)
        sums = KeyedTensor.regroup([pooled], [self.keys])[0]
        if not any(self.averaged):
            return sums
        parts = zip(self.keys, self.averaged, sums.split(self.dims, dim=1), strict=True)
        return torch.cat([part / _counts(sparse_features, key) if mean else part for key, mean, part in parts], dim=1)


def _counts(sparse_features: KeyedJaggedTensor, key: str) -> Tensor:
    """[B, 1], the number of ids of a feature in each row, at least 1."""
    return sparse_features[key].lengths().clamp(min=1).unsqueeze(1)
