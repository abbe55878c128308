from pathlib import Path

import torch

from rec.config import compose
from rec.data import Reader
from rec.embeddings import Embeddings
from rec.schema import Pooling
from rec.sharding import ShardingConfig, init_tables
from tests.conftest import CONF, toy_overrides


def test_pooled_features_equal_a_loop_over_rows(toy: Path) -> None:
    data = compose(toy_overrides(toy), config_dir=str(CONF)).data
    batch = next(Reader(data, compose(toy_overrides(toy), config_dir=str(CONF)).reader, split="train").batches())
    embeddings = Embeddings(data)
    init_tables(embeddings, ShardingConfig(), seed=3)
    tables = {key.split(".")[-2]: value for key, value in embeddings.state_dict().items()}
    pooled = embeddings(batch.sparse_features).pooled
    assert {name: vectors.shape[1] for name, vectors in pooled.items()} == embeddings.dims
    assert list(embeddings.dims.values()) == [8, 8, 16, 4, 16]
    empty = 0
    for row in range(50):
        for feature in data.sparse_features:
            table = data.tables[data.table_of(feature)]
            ids = batch.sparse_features[feature].to_dense()[row]
            vectors = tables[data.table_of(feature)][ids]
            expected = vectors.sum(0) / (max(1, len(ids)) if table.pooling is Pooling.mean else 1)
            torch.testing.assert_close(pooled[feature][row], expected)
            empty += len(ids) == 0
    assert empty > 10  # rows without ids are zeros, and there were some
