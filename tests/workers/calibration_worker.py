"""Calibrates, evaluates and predicts with a finished run, and fits calibrators to rows dealt out to the ranks.

torchrun --standalone --nproc-per-node 2 tests/workers/calibration_worker.py RUN_DIR ROWS.pt OUT_DIR
"""

import sys
from dataclasses import fields
from pathlib import Path

import torch

from rec.calibrate import calibrate, settings_of
from rec.calibrate import command_of as calibration
from rec.calibration import CalibrationConfig, CalibratorKind, Calibrators
from rec.distributed import Rank, process_group, run_entry
from rec.evaluate import command_of as evaluation
from rec.evaluate import evaluate_run
from rec.predict import command_of as prediction
from rec.predict import predict_run
from rec.predictions import Rows
from tests.test_calibration import DOMAINS, TASKS


def fit(rows: Rows, rank: Rank, out: Path) -> None:
    """Rank 0 holds a third of the rows, rank 1 the rest."""
    stop = len(rows.logits) // 3
    own = slice(None, stop) if rank.is_main else slice(stop, None)
    mine = Rows(*(getattr(rows, field.name)[own] for field in fields(rows)))
    for kind in CalibratorKind:
        for per_domain in (True, False):
            folder = out / f"{kind.name}-{per_domain}-{rank.rank}"
            folder.mkdir(parents=True)
            config = CalibrationConfig(kind=kind, per_domain=per_domain)
            Calibrators(TASKS, domains=DOMAINS, config=config).fit(mine, split="valid", step=7).save(folder)


def main(run_dir: str, rows: str, out: str) -> None:
    with process_group(timeout_s=60) as rank:
        fit(torch.load(rows, weights_only=False), rank, Path(out))
        command = calibration([f"run_dir={run_dir}", "split=train", "measure=valid"])
        calibrate(command.config(), rank, command=command, settings=settings_of(command))
        command = evaluation([f"run_dir={run_dir}", "predictions=true"])
        evaluate_run(command, command.config(), rank)
        command = prediction([f"run_dir={run_dir}", f"out={out}/predictions", "reader.global_batch_size=33"])
        predict_run(command, command.config(), rank)


if __name__ == "__main__":
    run_entry(lambda: main(*sys.argv[1:]))
