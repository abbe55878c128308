from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from rec import export as exporting
from rec import items as indexing
from rec.config import compose, load
from rec.data import Reader
from rec.distributed import process_group
from rec.schema import ConfigError
from rec.serving import inputs_of
from rec.two_towers import side_inputs, sides_of
from tests.conftest import CONF, toy_overrides
from tests.test_checkpoint import one_process
from tests.test_two_towers import config_of


def test_the_index_holds_every_item_once_as_last_seen(two_tower_run: Path) -> None:
    with one_process():
        indexing.run([f"run_dir={two_tower_run}", "split=valid"])
    index = pq.read_table(two_tower_run / "items.parquet")
    config = load(two_tower_run / "config.yaml")
    path = next((two_tower_run / "checkpoints").glob("step_*"))
    with one_process(), process_group(timeout_s=60):
        network = exporting.load_served(config, path, calibrated=False)
    item, _ = sides_of(network, config.data)
    reader = Reader(config.data, config.reader, split="valid", training=False)
    last: dict[int, torch.Tensor] = {}
    seen: dict[int, int] = {}
    for batch in reader.batches():
        inputs = inputs_of(batch, batch.num_rows)
        vectors = item(**side_inputs(item, inputs))
        for row, key in enumerate(inputs["values"]["item"].tolist()):
            if seen.get(key, -1) < batch.row_id[row]:
                seen[key], last[key] = int(batch.row_id[row]), vectors[row]
    assert index["item"].to_pylist() == sorted(last)
    expected = torch.stack([last[key] for key in sorted(last)])
    torch.testing.assert_close(torch.tensor(index["vector"].to_pylist()), expected, rtol=1e-5, atol=1e-6)


def test_a_run_without_an_item_tower_has_no_index(toy: Path) -> None:
    config = compose(toy_overrides(toy), config_dir=str(CONF))
    with pytest.raises(ConfigError, match="the run's network has no item tower"):
        indexing.key_of(config, "")
    with pytest.raises(ConfigError, match=r"key is 'user', expected an id feature of the item's side; .*valid: item"):
        indexing.key_of(config_of(toy), "user")
