"""What a run says: `metrics.jsonl` for dashboards, TensorBoard files of the same, and a plain console.

`metrics.jsonl` holds one JSON object a line. Every line has `event`, `time` (UTC, ISO 8601), `step` (steps done), `rows` (rows seen).

    event       further fields
    start       world_size, device, config, parameters {dense, sparse}, tables {name: {sharding, ranks, mib}}, steps, resumed_from
    train       loss, losses {task}, rows_per_second, seconds_per_step {...}, lr, lr_sparse, grad_norm, skipped_steps, memory_mib
    eval        split, metrics {task: {...}}, domains {task: {domain: {...}}}, experts {...}, seconds
    tables      tables {name: {rms, max_abs, rows_trained}}: size of the weights, share of rows that were ever updated
    checkpoint  path, score, seconds
    warning     message
    end         reason, seconds

`seconds_per_step` holds data, peers and rest, as `rec.window.Stretch` says; `skipped_steps` counts from the start; `memory_mib` is of the
rank that has used the most. `experts` holds the values of `rec.health.HealthResult` (gate weights, effective experts, overlap, ...), null
without gates. A `train` line also has what `weighting` found: task_weights {task}, or conflicts (share of pairs of tasks).

Beside these, `rec.evaluate` adds `calibrated` to its `eval`, and `rec.calibrate` appends `calibration` with split (fitted on),
measured_on, kind and tasks {task: {before, global, after, cells, reliability {before, after}}}; before is without calibrators,
global with one curve a task (absent where there is no other), after with all of them.

The values of `metrics`: of a binary task auc, pr_auc, logloss, ne, calibration, ece, field_ece (null in a domain), gauc, rows, positives
(and auc_truth, gap_closed where true probabilities are known), log_mae (null unless labels lie between 0 and 1, as a teacher's do); of
a regression mae, rmse, calibration, rows, log_mae (null). A row of an unknown domain counts in `metrics` alone. What has no meaning
there is null. Fields are added, never renamed. After a resume steps may repeat: the last line of a step counts.

In a run folder on disk every line is there at once. An object store cannot append: there lines appear about every ten seconds,
after a checkpoint and at the end, added to what is there by then. A log is not worth a run: where it cannot be written that is an
error at the start, but one warning later.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from rec.metrics import EvalResult
from rec.storage import check_writable, explain, is_local, is_of_storage

UPLOAD_EVERY_S = 10.0  # to a store; more seldom where an upload takes longer than a twentieth of that
_METRICS = "metrics.jsonl"

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
        run_dir: folder of the run, on disk or in a store.
        active: whether to write anything.

    Raises:
        ConfigError: nothing can be written there.
    """

    def __init__(self, run_dir: Path, *, active: bool) -> None:
        self.active = active
        self.run_dir = run_dir
        self._warned = False
        if active:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and rank 0 alone needs it

            check_writable(run_dir)
            self._spool = None if is_local(run_dir) else _Spool(run_dir)
            folder = self._spool.folder if self._spool else run_dir
            self._file = _open_to_append(folder / _METRICS)
            self._board = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def event(self, event: str, *, step: int, rows: int, **values: Any) -> None:
        """Append one line to `metrics.jsonl`, and its numbers to TensorBoard."""
        if not self.active:
            return
        line = {"event": event, "time": datetime.now(UTC).isoformat(), "step": step, "rows": rows, **values}
        with self._spared():
            self._file.write(json.dumps(_finite(line), allow_nan=False).encode() + b"\n")
            self._file.flush()
        prefix = f"eval/{values['split']}" if event == "eval" else event
        numbers = {k: v for k, v in values.items() if event in ("train", "eval", "tables") and k != "split"}
        with self._spared():
            for name, value in _scalars(numbers):
                self._board.add_scalar(f"{prefix}/{name}", value, step)
        if self._spool:
            with self._spared():
                self._spool.poll(now=event == "checkpoint")

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.active:
            print(text, flush=True)

    def close(self) -> None:
        """Write out what is buffered."""
        if self.active:
            for close in (self._file.close, self._board.close, *([self._spool.close] if self._spool else [])):
                with self._spared():
                    close()

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """Go on where the disk or the store fails, and say so the first time."""
        try:
            yield
        except Exception as error:  # packages of stores have exceptions of their own, of no common type
            if not is_of_storage(error):
                raise
            if not self._warned:
                said = f"warning: the log in {self.run_dir} cannot be written: {explain(error)}"
                print(f"{said}; going on without the lines that are lost", file=sys.stderr, flush=True)
            self._warned = True


def _open_to_append(path: Path) -> BinaryIO:
    """The file, to be written from the beginning of a line: a disk that was full may have left half a one."""
    file = path.open("ab+")
    if file.tell():
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


class _Spool:
    """A local folder, and a thread that carries what grows there into a run's folder in a store."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._local = tempfile.TemporaryDirectory(prefix="rec_log_")
        self.folder = Path(self._local.name)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        self._carrying: Future[None] | None = None
        self._due = time.monotonic() + UPLOAD_EVERY_S
        self._carried: dict[str, int] = {}  # name -> bytes that are there

    def poll(self, *, now: bool) -> None:
        """Start to carry if it is time to, or `now`; does not wait. Raises what went wrong the last time."""
        self._due = 0.0 if now else self._due
        if time.monotonic() < self._due or (self._carrying and not self._carrying.done()):
            return
        last, self._carrying = self._carrying, self._thread.submit(self._carry)
        self._due = time.monotonic() + UPLOAD_EVERY_S
        if last:
            last.result()

    def close(self) -> None:
        """Carry the rest, and wait for it."""
        last = self._thread.submit(self._carry)
        self._thread.shutdown()
        self._local.cleanup()
        last.result()

    def _carry(self) -> None:
        started = time.monotonic()
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = str(file.relative_to(self.folder))
            before = self._carried.get(name, 0)
            data = file.read_bytes()
            if name == _METRICS:
                data = data[: data.rfind(b"\n") + 1]  # whole lines
            if len(data) == before:
                continue
            if name == _METRICS:
                _append(self.run_dir / name, data[before:])
            else:
                (self.run_dir / name).write_bytes(data)
            self._carried[name] = len(data)
        self._due = max(self._due, time.monotonic() + 20 * (time.monotonic() - started))


def _append(target: Path, lines: bytes) -> None:
    """Add lines to those that are in a store by now, some of which other commands may have written."""
    try:
        there = target.read_bytes()
    except FileNotFoundError:
        there = b""
    if not there.endswith(lines):  # they may have arrived though the answer did not
        target.write_bytes(there + (b"" if there.endswith(b"\n") or not there else b"\n") + lines)


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
