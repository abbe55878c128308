"""One of two ranks of `test_health.py`: takes its share of every step's rows and computes twice.

torchrun --standalone --nproc-per-node 2 tests/workers/health_worker.py STEPS.pt OUT.json
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rec.distributed import Rank, process_group, run_entry
from rec.health import ExpertHealth


def diagnose(case: dict[str, Any], *, rank: int) -> dict[str, Any]:
    """Rank 0 has `share` of each step's rows, rank 1 the rest and a padded row."""
    health = ExpertHealth(case["tasks"], cka_rows=case["cka_rows"])
    for step, batch in enumerate(case["steps"]):
        own = [x[: case["share"]] if rank == 0 else x[case["share"] :] for x in batch]
        if rank == 1:
            padding = [torch.full_like(batch[0][:1], torch.nan), torch.full_like(batch[1][:1], torch.nan)]
            own = [torch.cat(pair) for pair in zip(own, [*padding, torch.tensor([False])], strict=True)]
        health.update(*own, rows_before=step * len(batch[2]))
    first = health.compute()
    assert first == health.compute(), "a second compute differs: the other rank's sums were kept"
    return asdict(first)


def compare(rank: Rank) -> None:
    cases = torch.load(sys.argv[1])
    gathered: list[Any] = [None] * rank.world_size
    dist.all_gather_object(gathered, {name: diagnose(case, rank=rank.rank) for name, case in cases.items()})
    if rank.is_main:
        Path(sys.argv[2]).write_text(json.dumps(gathered))


def main() -> None:
    torch.set_num_threads(1)
    with process_group(timeout_s=60) as rank:
        compare(rank)


if __name__ == "__main__":
    run_entry(main)
