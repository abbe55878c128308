"""Every kind of sharding against the one-device network, in one process group of several ranks."""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from rec.config import Config, compose
from rec.data import Reader
from rec.distributed import Rank, process_group, run_entry
from rec.model import Ranker
from rec.sharding import describe_plan, init_tables
from rec.train import build_model
from tests.conftest import toy_overrides

ALL_PARTS = [
    "model.histories=[{feature: history, candidate: item}]",
    "data.features.history.max_length=4",
    "linear=v4",
    "model.linear.features=[user,item,price]",
    "model.fm={kind: per_task, features: [user, query], scale: true}",
]


def compare(config: Config, rank: Rank) -> None:
    ranks = {"rank": rank.rank, "world_size": rank.world_size}
    batch = next(Reader(config.data, config.reader, split="train", training=False, **ranks).batches())
    model, _ = build_model(config, rank, local_batch_size=len(batch.dense))
    alone = Ranker(config.model, config.data, device=torch.device("cpu"))
    init_tables(alone.embeddings, config.sharding, seed=config.seed)
    dense = {key: value for key, value in model.module.state_dict().items() if not key.startswith("embeddings.")}
    alone.load_state_dict(dense, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(batch).logits, alone(batch).logits, rtol=1e-5, atol=1e-6)
        found, expected = (e(batch.sparse_features) for e in (model.module.embeddings, alone.embeddings))
        torch.testing.assert_close(asdict(found), asdict(expected), rtol=1e-6, atol=1e-7)
    if rank.is_main:
        print({name: table["sharding"] for name, table in describe_plan(model).items()}, flush=True)


def main() -> None:
    with process_group(timeout_s=60) as rank:
        for changes in (
            ["sharding.default=row_wise"],
            ["sharding.default=table_wise"],
            ["sharding.default=column_wise"],
            ["sharding.default=auto"],
            [
                "data.tables.user.sharding=table_wise",
                "data.tables.item.sharding=column_wise",
                "data.tables.query.sharding=row_wise",
            ],
            [*ALL_PARTS, "sharding.default=row_wise"],
            [*ALL_PARTS, "sharding.default=table_wise"],
            [*ALL_PARTS, "sharding.default=column_wise"],
            [*ALL_PARTS, "sharding.default=auto"],
        ):
            compare(compose(toy_overrides(Path(sys.argv[1]), *changes), config_dir="tests/conf"), rank)


if __name__ == "__main__":
    run_entry(main)
