"""Compute the vectors of all items, once, ahead of time. `python -m rec.items run_dir=DIR`"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rec import storage
from rec.config import Config
from rec.data import Reader
from rec.distributed import Rank, process_group, run_entry
from rec.evaluate import Command, find_checkpoint, split_reader, wants_help
from rec.export import load_served
from rec.features import DataError
from rec.schema import ConfigError, FeatureKind, nearest
from rec.serving import inputs_of
from rec.two_towers import ItemSide, side_inputs

ABOUT = """Compute the vectors of all items that a split shows, ahead of time, with a run whose network has two towers.

    python -m rec.items run_dir=DIR [split=train] [key=FEATURE] [checkpoint=latest] [out=DIR/items.parquet] [key=value ...]

split        whose rows hold the items; an item is taken as its last row shows it
key          the id feature that tells items apart; default the first of model.towers.item_features
checkpoint   latest, best, or a step
out          Parquet file: `item` int64 (the id; of a hashed feature its row of the table) and `vector`, r float32
key=value    changes the run's configuration, e.g. data.path=DIR

The vector depends on the item alone: one index serves every task and domain, and domains that come later."""

_BATCH_ROWS = 16_384


def key_of(config: Config, wanted: str) -> str:
    """The feature that tells items apart.

    Raises:
        ConfigError: no two towers, or no such id feature on the item's side.
    """
    data, sided = config.data, config.model.towers.item
    if not sided:
        raise ConfigError(
            "the run's network has no item tower, so items have no vectors; train one with towers=dot and model.towers.item_features"
        )
    ids = [name for name in sided if data.features[name].kind is FeatureKind.id]
    if not ids or wanted not in ("", *ids):
        raise ConfigError(f"key is '{wanted}', expected an id feature of the item's side; {nearest(wanted, ids)}")
    return wanted or ids[0]


def item_vectors(side: ItemSide, reader: Reader, *, key: str) -> pa.Table:
    """Item and vector of every item in the split, as its last row shows it, in the order of the items.

    Args:
        side: the item's.
        reader: batches of the split, in its order or not; rows count by their place in the files.
        key: id feature that tells items apart; rows without an id are left out.
    """
    ids, places, vectors = [], [], []
    for batch in reader.batches():
        inputs = inputs_of(batch, batch.num_rows)
        has = inputs["lengths"][key] > 0
        with torch.no_grad():
            vectors.append(side(**side_inputs(side, inputs))[has].numpy())
        ids.append(inputs["values"][key].numpy())
        places.append(batch.row_id[: batch.num_rows][has].numpy())
    every, order = np.concatenate(ids), np.concatenate(places)
    ranked = np.lexsort((order, every))
    last = ranked[np.append(np.diff(every[ranked]) != 0, True)]
    found = np.concatenate(vectors)[last]
    flat = pa.array(found.reshape(-1))
    return pa.table({"item": every[last], "vector": pa.FixedSizeListArray.from_arrays(flat, found.shape[1])})


def write_items(command: Command, config: Config, rank: Rank) -> None:
    """Compute, write, say."""
    key = key_of(config, command.own["key"])
    out = storage.path(command.own["out"] or command.run_dir / "items.parquet")
    path = find_checkpoint(config, command.run_dir, command.own["checkpoint"])
    wide = replace(config.reader, global_batch_size=_BATCH_ROWS)
    reader = split_reader(replace(config, reader=wide), rank, command.own["split"], labels=False)
    table = item_vectors(ItemSide(load_served(config, path, calibrated=False), config.data), reader, key=key)
    said = {"checkpoint": path.name, "split": command.own["split"], "key": key}
    with storage.named(out), storage.replacing(out) as draft:
        pq.write_table(table.replace_schema_metadata({"items": json.dumps(said)}), draft)
    width = table["vector"].type.list_size
    print(
        f"{path.name}: vectors of {table.num_rows:,} items by {key}, {width} wide, from {command.own['split']}: {out}",
        flush=True,
    )


def command_of(arguments: Sequence[str]) -> Command:
    """The command line."""
    defaults = {"split": "train", "checkpoint": "latest", "key": "", "out": ""}
    return Command.parse(arguments, defaults=defaults, purpose="compute items' vectors")


def run(arguments: list[str]) -> None:
    """Read the run's configuration, be the only rank, compute."""
    if wants_help(arguments):
        print(ABOUT)
        return
    command = command_of(arguments)
    config = command.config()
    with process_group(timeout_s=config.trainer.timeout_s):
        write_items(command, config, Rank(0, 1, torch.device("cpu")))


def main() -> None:
    """The command line."""
    run_entry(lambda: run(sys.argv[1:]), quiet=(ConfigError, DataError))


if __name__ == "__main__":
    main()
