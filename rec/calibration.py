"""Calibrators: fitted corrections of the tasks' probabilities, one a task and domain, that act on logits [B, T].

With z the logit of a row, y its label and w its weight, and a cell being one task in one domain or in all of them:

- `platt`: sigmoid(a z + b), fitted to Platt's targets by Newton's method (`rec/platt.py`)
- `temperature`: the same with b = 0, so that a = 1 / T (Guo et al., On Calibration of Modern Neural Networks, ICML 2017)
- `isotonic`: least squares among functions that do not fall, level at both ends and short of 0 and 1 (`rec/isotonic.py`)

A domain's line is shrunk towards the line of all rows, (a0, b0), by a Gaussian prior around it that holds as much Fisher
information as `prior_positives` positives do in the fit of all rows: a domain with few positives stays near (a0, b0), one
with many has its own line. A domain that is unknown, or was never seen in fitting, takes the curve of all rows.

Fit on held-out rows with the natural ratio of classes. A line keeps the order within a domain, since a is positive, and
isotonic curves make ties; the order between domains is what changes.
"""

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rec import storage
from rec.isotonic import Knots, fit_knots
from rec.platt import MIN_SLOPE, Lines, fit_lines, over_ranks
from rec.predictions import Rows
from rec.schema import ConfigError, TaskConfig, TaskKind, check_range

VERSION = 1
FILE = "calibration.json"  # beside the tensors of a checkpoint


class CalibratorKind(Enum):
    """The form of a cell's curve."""

    platt = "platt"
    isotonic = "isotonic"
    temperature = "temperature"


@dataclass
class CalibrationConfig:
    """How calibrators are fitted.

    >>> CalibrationConfig(prior_positives=-1)
    Traceback (most recent call last):
    rec.schema.ConfigError: calibration.prior_positives is -1, expected a value from 0 to 1000000000000.0
    """

    kind: CalibratorKind = CalibratorKind.platt
    per_domain: bool = True  # a curve for every domain; false: one for all rows
    prior_positives: float = (
        20.0  # platt, temperature: positives that the fit of all rows counts in a domain, 0 or more
    )
    min_positives: int = 200  # isotonic: positives, 1 or more, that a domain needs for a curve of its own

    def __post_init__(self) -> None:
        check_range("calibration.prior_positives", self.prior_positives, 0, 1e12)
        check_range("calibration.min_positives", self.min_positives, 1, 1e12)


@dataclass
class FittedOn:
    """What calibrators were fitted on: rows of `split`, with the model of `step`; `rows` of all ranks."""

    split: str = ""
    step: int = 0
    rows: int = 0


@dataclass
class Cell:
    """One fitted curve: a line `a` z + `b`, or knots from `logits` to `calibrated` logits, none leaving z as it is.

    Attributes:
        rows: of weight above 0 that it was fitted on.
        positives: sum of their labels.
        note: what kept it from being an ordinary fit; None if nothing did.
    """

    rows: int
    positives: float
    note: str | None = None
    a: float | None = None
    b: float | None = None
    logits: list[float] | None = None
    calibrated: list[float] | None = None

    @property
    def has_curve(self) -> bool:
        """Whether it has a curve of its own; else that of all rows is taken."""
        return self.a is not None or self.logits is not None


@dataclass
class TaskCells:
    """The curves of a task: of all rows, and of each domain that has its own."""

    overall: Cell
    domains: dict[str, Cell] = field(default_factory=dict)


# ---- the calibrators


class Calibrators(nn.Module):
    """Maps logits [B, T] and domain_id [B] to calibrated logits [B, T], on any device; the rest of the code is unchanged.

    Regression and auxiliary tasks pass through untouched. `fit` sets `cells_`, `fitted_on_` and the tensors made of them.

    Args:
        tasks: T tasks by name, in the order of the logits.
        domains: D names; `domain_id` is an index into them.
        config: how to fit.

    >>> rows = Rows(
    ...     logits=torch.tensor([[0.0], [0.0], [2.0], [2.0]]),
    ...     labels=torch.tensor([[0.0], [1.0], [1.0], [1.0]]),
    ...     weights=torch.full((4, 1), 1000.0),
    ...     domain_id=torch.zeros(4, dtype=torch.int64),
    ...     group_id=torch.zeros(4, dtype=torch.int64),
    ... )
    >>> calibrators = Calibrators({"click": TaskConfig(label="is_click")}, domains=["home"]).fit(rows)
    >>> calibrators(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)).sigmoid().round(decimals=2)
    tensor([[0.5000]])
    """

    applied: Tensor  # [T] bool

    def __init__(
        self, tasks: dict[str, TaskConfig], *, domains: list[str], config: CalibrationConfig | None = None
    ) -> None:
        super().__init__()
        self.tasks, self.domains, self.config = tasks, domains, config or CalibrationConfig()
        self.calibrated = [n for n, task in tasks.items() if task.kind is TaskKind.binary and not task.auxiliary]
        self.register_buffer("applied", torch.tensor([name in self.calibrated for name in tasks]), persistent=False)
        self.cells_: dict[str, TaskCells] = {}
        self.fitted_on_ = FittedOn()

    def fit(self, rows: Rows, *, split: str = "", step: int = 0) -> "Calibrators":
        """Fit to the rows of all ranks, each of which gives its own; the outcome is the same on each. A collective.

        Lines: ranks exchange sums alone. Isotonic: a task's rows, 32 bytes each, are gathered on every rank, one task at
        a time.

        Raises:
            ConfigError: a logit of a row that counts is NaN or infinite.
        """
        rows = self._cleaned(rows)
        fit = _fit_knots if self.config.kind is CalibratorKind.isotonic else _fit_lines
        task_ids = {name: t for t, name in enumerate(self.tasks) if name in self.calibrated}
        domains = self.domains if self.config.per_domain and len(self.domains) > 1 else []
        self.cells_ = fit(rows, self.config, task_ids, domains)
        num_rows = int(over_ranks(torch.tensor([len(rows.logits)])))
        self.fitted_on_ = FittedOn(split=split, step=step, rows=num_rows)
        self._compile()
        return self

    def forward(self, logits: Tensor, domain_id: Tensor) -> Tensor:
        """Calibrated logits [B, T] of logits [B, T] in the domains domain_id [B]; an unknown one takes the curve of all rows."""
        num_domains = len(self.domains)
        known = (domain_id >= 0) & (domain_id < num_domains)
        return torch.where(self.applied, self.curves_(logits, torch.where(known, domain_id, num_domains)), logits)

    def _cleaned(self, rows: Rows) -> Rows:
        """The rows with 0 in place of what does not count, since 0 times NaN is NaN."""
        counts = (rows.weights > 0) & self.applied.cpu()
        logits, labels, weights = (torch.where(counts, x, 0) for x in (rows.logits, rows.labels, rows.weights))
        wrong = ~logits.isfinite().all(0)
        if wrong.any():
            raise ConfigError(
                f"logits of task '{list(self.tasks)[int(wrong.int().argmax())]}' hold NaN or infinity, expected finite ones: "
                "the training diverged; calibrate an earlier checkpoint (checkpoint=STEP)"
            )
        return Rows(logits, labels, weights, rows.domain_id, rows.group_id)

    def _compile(self) -> None:
        """Tensors of the cells: a row a task, a column a domain, and a last one for what belongs to none."""
        through = Cell(rows=0, positives=0, a=1.0, b=0.0, logits=[], calibrated=[])
        grid = []
        for name in self.tasks:
            of = self.cells_.get(name, TaskCells(through))
            own = [of.domains.get(domain, of.overall) for domain in self.domains]
            grid.append([*(cell if cell.has_curve else of.overall for cell in own), of.overall])
        isotonic = self.config.kind is CalibratorKind.isotonic
        self.curves_: nn.Module = (_Knots if isotonic else _Lines)(grid).to(self.applied.device)

    # ---- files

    def save(self, folder: Path) -> Path:
        """Write `calibration.json` into a checkpoint's folder, whole or not at all; an older one is replaced."""
        config = asdict(self.config) | {"kind": self.config.kind.name}
        tasks = {
            name: {
                "global": _plain(of.overall),
                "domains": {domain: _plain(cell) for domain, cell in of.domains.items()},
            }
            for name, of in self.cells_.items()
        }
        said = {"version": VERSION, "fitted_on": asdict(self.fitted_on_), "config": config, "tasks": tasks}
        said["sha256"] = _digest(said)
        with storage.replacing(folder / FILE) as draft:
            draft.write_text(json.dumps(said, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return folder / FILE

    @classmethod
    def load(cls, folder: Path, tasks: dict[str, TaskConfig], *, domains: list[str]) -> "Calibrators | None":
        """The calibrators in a checkpoint's folder; None if there are none.

        Domains are found by name: one that is new since takes the curve of all rows.

        Raises:
            ConfigError: the file is of a newer version, is damaged, or lacks one of the `tasks` that calibrators apply to.
        """
        path = folder / FILE
        if not storage.is_file(path):
            return None
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if said["version"] > VERSION:
                raise ConfigError(
                    f"{path} has version {said['version']}, expected at most {VERSION}; update to read it"
                )
            if said.get("sha256", found := _digest(said)) != found:
                raise ValueError(f"its content has SHA-256 {found[:12]}..., {said['sha256'][:12]}... was written")
            config = CalibrationConfig(**said["config"] | {"kind": CalibratorKind[said["config"]["kind"]]})
            calibrators = cls(tasks, domains=domains, config=config)
            calibrators.fitted_on_ = FittedOn(**said["fitted_on"])
            calibrators.cells_ = {
                name: TaskCells(Cell(**of["global"]), {domain: Cell(**cell) for domain, cell in of["domains"].items()})
                for name, of in said["tasks"].items()
            }
            calibrators._check_tasks(path)
            calibrators._compile()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{path} is no calibration ({type(error).__name__}: {error}); fit it again with rec.calibrate"
            ) from error
        return calibrators

    def _check_tasks(self, path: Path) -> None:
        missing = [name for name in self.calibrated if name not in self.cells_]
        if missing:
            raise ConfigError(
                f"{path} has no calibration of the tasks {missing}, only of {list(self.cells_)}; fit it again with rec.calibrate"
            )


def _digest(said: dict[str, Any]) -> str:
    """SHA-256 of what a file says, less this number: a refit has another, so a checkpoint's own sums cannot hold it."""
    text = json.dumps({key: value for key, value in said.items() if key != "sha256"}, sort_keys=True)
    return sha256(text.encode()).hexdigest()


def _plain(cell: Cell) -> dict[str, Any]:
    return {key: value for key, value in asdict(cell).items() if value is not None}


class _Lines(nn.Module):
    """a z + b, of a grid of cells [T][D + 1]."""

    a_: Tensor  # [T, D + 1] float32
    b_: Tensor

    def __init__(self, grid: list[list[Cell]]) -> None:
        super().__init__()
        for name in ("a", "b"):
            self.register_buffer(f"{name}_", torch.tensor([[getattr(cell, name) for cell in row] for row in grid]))

    def forward(self, logits: Tensor, cell_id: Tensor) -> Tensor:
        return self.a_[:, cell_id].T * logits + self.b_[:, cell_id].T


class _Knots(nn.Module):
    """Interpolation between knots, of a grid of cells [T][D + 1]."""

    x_: Tensor  # [K] float32, the knots of all cells, one cell after another
    y_: Tensor  # [K] float32
    first_: Tensor  # [T, D + 1] int64, a cell's first knot
    count_: Tensor  # [T, D + 1] int64, its knots; 0 leaves a logit as it is

    def __init__(self, grid: list[list[Cell]]) -> None:
        super().__init__()
        cells = [cell for row in grid for cell in row]
        counts = torch.tensor([len(cell.logits or []) for cell in cells]).view(len(grid), -1)
        self.max_count = int(counts.max())
        self.register_buffer("count_", counts)
        self.register_buffer("first_", counts.flatten().cumsum(0).view_as(counts) - counts)
        for name, part in (("x_", "logits"), ("y_", "calibrated")):
            knots = [knot for cell in cells for knot in getattr(cell, part) or []]
            self.register_buffer(name, torch.tensor([*knots, 0.0]))  # never empty

    def forward(self, logits: Tensor, cell_id: Tensor) -> Tensor:
        first, count = self.first_[:, cell_id].T, self.count_[:, cell_id].T  # [B, T]
        low, high = first, first + count
        for _ in range(self.max_count.bit_length()):  # bisection of every row at once: `low`, knots up to the logit
            middle, undecided = (low + high) // 2, low < high
            above = undecided & (self.x_[middle] <= logits)
            low, high = torch.where(above, middle + 1, low), torch.where(undecided & ~above, middle, high)
        last = first + (count - 1).clamp(min=0)
        left, right = (low - 1).clamp(min=first, max=last), low.clamp(max=last)
        width = self.x_[right] - self.x_[left]
        share = torch.where(width > 0, (logits - self.x_[left]) / torch.where(width > 0, width, 1), 0)
        return torch.where(count > 0, self.y_[left] + share * (self.y_[right] - self.y_[left]), logits)


# ---- fitting


def _fit_lines(
    rows: Rows, config: CalibrationConfig, task_ids: dict[str, int], domains: list[str]
) -> dict[str, TaskCells]:
    overall, own = fit_lines(
        rows,
        num_domains=len(domains),
        prior_positives=config.prior_positives,
        offset=config.kind is CalibratorKind.platt,
    )
    return {
        name: TaskCells(_line(overall, t, 0), {domain: _line(own, t, d) for d, domain in enumerate(domains)})
        for name, t in task_ids.items()
    }


def _line(lines: Lines, task: int, cell: int) -> Cell:
    a, b = lines.ab[task, cell].tolist()
    rows, labels, positives, negatives = (float(x[task, cell]) for x in vars(lines.counts).values())
    note = None
    if not rows:
        note = "no rows: not fitted"
    elif not positives or not negatives:
        note = f"no {'negatives' if positives else 'positives'}: the slope is not fitted"
    elif a <= MIN_SLOPE:
        note = "the logits do not rank the labels: the slope is at its lower bound"
    return Cell(int(rows), labels, note, a=a, b=b)


def _fit_knots(
    rows: Rows, config: CalibrationConfig, task_ids: dict[str, int], domains: list[str]
) -> dict[str, TaskCells]:
    cells = {}
    for name, t in task_ids.items():
        curves = fit_knots(rows, t, num_domains=len(domains), min_positives=config.min_positives)
        overall = curves.overall
        note = None if overall.logits else "labels of one kind: logits stay as they are"
        cells[name] = TaskCells(
            Cell(overall.rows, overall.labels, note, logits=overall.logits, calibrated=overall.calibrated)
        )
        for domain, knots in zip(domains, curves.domains, strict=True):
            cells[name].domains[domain] = _curve(knots, config.min_positives)
    return cells


def _curve(knots: Knots, min_positives: int) -> Cell:
    if knots.logits:
        return Cell(knots.rows, knots.labels, logits=knots.logits, calibrated=knots.calibrated)
    return Cell(
        knots.rows, knots.labels, f"fewer than {min_positives} positives or no negatives: the curve of all rows"
    )
