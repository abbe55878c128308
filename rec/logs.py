"""What a run says: `metrics.jsonl` for dashboards, TensorBoard files of the same, and a plain console.

`metrics.jsonl` holds one JSON object a line. Every line has `event`, `time` (UTC, ISO 8601), `step` (steps done), `rows` (rows seen).

    event       further fields
    start       world_size, device, config, parameters {dense, sparse}, tables {name: {sharding, ranks, mib}}, steps, resumed_from
    train       loss, losses {task}, rows_per_second, lr, lr_sparse, grad_norm, memory_mib (the largest rank's)
    eval        split, metrics {task: {...}}, domains {task: {domain: {...}}}, experts {...}, seconds
    tables      tables {name: {rms, max_abs, rows_trained}}: size of the weights, share of rows that were ever updated
    checkpoint  path, score
    warning     message
    end         reason, seconds

`experts` holds the values of `rec.health.HealthResult` (gate weights, effective experts, overlap, ...), null without gates. A `train` line
also has what `weighting` found: task_weights {task}, or conflicts (share of pairs of tasks).

Beside these, `rec.evaluate` adds `calibrated` to its `eval`, and `rec.calibrate` appends `calibration` with split (fitted on),
measured_on, kind and tasks {task: {before, global, after, cells, reliability {before, after}}}; before is without calibrators,
global with one curve a task (absent where there is no other), after with all of them.

The values of `metrics`: of a binary task auc, pr_auc, logloss, ne, calibration, ece, field_ece (null in a domain), gauc, rows, positives
(and auc_truth, gap_closed where true probabilities are known), log_mae (null unless labels lie between 0 and 1, as a teacher's do); of
a regression mae, rmse, calibration, rows, log_mae (null). A row of an unknown domain counts in `metrics` alone. What has no meaning
there is null. Fields are added, never renamed. After a resume steps may repeat: the last line of a step counts.
"""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rec.metrics import EvalResult

_COLUMNS = (
    "auc",
    "pr_auc",
    "ne",
    "calibration",
    "ece",
    "field_ece",
    "gauc",
    "gap_closed",
    "log_mae",
    "mae",
    "rmse",
    "rows",
    "positives",
)


class RunLog:
    """Writes the events of a run; only rank 0 has one that is `active`.

    Args:
        run_dir: folder of the run.
        active: whether to write anything.
    """

    def __init__(self, run_dir: Path, *, active: bool) -> None:
        self.active = active
        if active:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and rank 0 alone needs it

            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def event(self, event: str, *, step: int, rows: int, **values: Any) -> None:
        """Append one line to `metrics.jsonl`, and its numbers to TensorBoard."""
        if not self.active:
            return
        line = {"event": event, "time": datetime.now(UTC).isoformat(), "step": step, "rows": rows, **values}
        self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        self._file.flush()
        prefix = f"eval/{values['split']}" if event == "eval" else event
        for name, value in _scalars(
            {k: v for k, v in values.items() if event in ("train", "eval", "tables") and k != "split"}
        ):
            self._board.add_scalar(f"{prefix}/{name}", value, step)

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.active:
            print(text, flush=True)

    def close(self) -> None:
        """Write out what is buffered."""
        if self.active:
            self._file.close()
            self._board.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Numbers in nested dicts, with slashes between the keys."""
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found.append((prefix + key, float(value)))
    return found


def table_of(result: EvalResult, *, domains: bool = False) -> str:
    """A table for people: a line a task, and one a domain below it.

    Args:
        result: what was measured.
        domains: also a line for each domain.
    """
    lines = []
    for task, values in result.metrics.items():
        lines.append((task, values))
        if domains and len(result.domains[task]) > 1:
            lines += [(f"  {domain}", inner) for domain, inner in result.domains[task].items()]
    columns = [c for c in _COLUMNS if any(values.get(c) is not None for _, values in lines)]
    width = max([len(name) for name, _ in lines] + [4])
    rows = ["task".ljust(width) + "".join(column.rjust(12) for column in columns)]
    for name, values in lines:
        rows.append(name.ljust(width) + "".join(_cell(values.get(column)).rjust(12) for column in columns))
    return "\n".join(rows)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or (value.is_integer() and abs(value) >= 10) else f"{value:.4f}"
