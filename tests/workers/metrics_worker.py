"""One of three ranks of `test_metrics.py`, as one of two and of three: takes its share of the rows and computes twice.

torchrun --standalone --nproc-per-node 3 tests/workers/metrics_worker.py ROWS.pt OUT.json
"""

import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rec.metrics import MetricsConfig, MultitaskMetrics


def evaluate(saved: dict[str, Any], config: dict[str, Any], ranks: dist.ProcessGroup) -> dict[str, Any]:
    """Rank 0 gets most rows, rank 1 some, any other nothing but a masked batch."""
    metrics = MultitaskMetrics(
        saved["tasks"], domains=saved["domains"], config=MetricsConfig(**config), grouped=True, process_group=ranks
    )
    for step, start in enumerate(range(0, len(saved["rows"]["logits"]), 700)):
        batch = {key: x[start : start + 700] for key, x in saved["rows"].items()}
        if dist.get_rank() == (step % 3 == 1):
            metrics.update(**batch)
        elif step == 0:
            metrics.update(**(batch | {"weights": torch.zeros_like(batch["weights"])}))
    first = asdict(metrics.compute())
    if dist.get_rank() == 0:  # an update on one rank only: the others must not answer from a cache
        metrics.update(**(batch | {"weights": torch.zeros_like(batch["weights"])}))
    assert first == asdict(metrics.compute()), "a second compute differs: the states of the other ranks were kept"
    return first


def main(rows_path: str, out_path: str) -> None:
    """Write [rank]{name of the configuration and world size: result}."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    saved = torch.load(rows_path, weights_only=False)
    results = {}
    for world_size in (2, 3):
        ranks = dist.new_group(list(range(world_size)))
        if dist.get_rank() < world_size:
            for name, config in saved["configs"].items():
                results[f"{name} {world_size}"] = evaluate(saved, config, ranks)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        Path(out_path).write_text(json.dumps(gathered))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
