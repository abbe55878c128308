"""Ids become vectors: one TorchRec collection holds every table, and pooled features are read by key.

The order of a sharded KeyedTensor's columns depends on the sharding plan, so nothing may use `values()`: regrouping by name
keeps the meaning of the network independent of world size and plan.
"""

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from rec.schema import DataConfig, Pooling


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
            pooling=PoolingType.MEAN if table.pooling is Pooling.mean else PoolingType.SUM,
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
        self.dims = [data.tables[data.table_of(key)].embedding_dim for key in self.keys]
        self.out_features = sum(self.dims)
        self.tables = EmbeddingBagCollection(tables=table_configs(data), device=device) if self.keys else None

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        """[B, sum of D] float32, features in the order of the configuration; zeros where a row has no ids."""
        if self.tables is None:
            return torch.zeros(sparse_features.stride(), 0)
        pooled: KeyedTensor = self.tables(sparse_features)
        return KeyedTensor.regroup([pooled], [self.keys])[0]
