"""How good the logits are: per task, per domain, the same number on any number of ranks, in memory that does not grow.

`MultitaskMetrics` sees batches of logits [B, T] and gives an `EvalResult` of plain numbers. Sums are always exact. Ranking
metrics are exact while the rows fit (`MetricsConfig.kept_rows`); beyond, they come from a histogram of logits, and group
AUC from a uniform sample of whole groups. `MetricsConfig(exact=True)` keeps every row, to check against.

Why not torchmetrics' own: 200 thresholds spaced evenly in probability give an AUC of .60 where .81 is right, at a base
rate of 0.1 %. The bins here are spaced evenly in logit. They are a power of two wide, the narrowest that lets `num_bins`
of them span the logits seen so far, so that they resolve an untrained model too, whose logits differ in the fourth
decimal. Two bins of one grid make exactly one of the next, so the grid can widen as logits arrive, and the outcome
depends on the rows alone: not on their order, their batches or the ranks that saw them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from rec.curves import Curve, MetricValues, binary_metrics, exact_curve, field_ece, group_auc, regression_metrics
from rec.hashing import mix
from rec.schema import TaskConfig, TaskKind, check_range

_FIELDS = ("logits", "labels", "weights", "domain_id", "truth")  # of a batch
# Sums kept for every task and domain, float64. Unused ones (mae of a binary task) are cheaper than a case distinction.
_SUMS = (
    *("rows", "positives", "weight", "labels", "preds", "logloss"),
    *("soft", "log_error", "absolute_error", "squared_error"),
)
_MIN_LOG = math.log(1e-12)  # of a probability and of a label, in log_mae
# Powers of two, so that dividing by one is exact. The first tells apart float32 logits of any size that matters.
_WIDTHS = torch.tensor([2.0**exponent for exponent in range(-40, 11)], dtype=torch.float64)


@dataclass
class MetricsConfig:
    """How the metrics of an evaluation are measured.

    >>> MetricsConfig(num_bins=0)
    Traceback (most recent call last):
    rec.schema.ConfigError: metrics.num_bins is 0, expected a value from 64 to 1048576
    """

    exact: bool = False  # keep every row, whatever `kept_rows` says: to check against; memory grows with rows
    num_bins: int = 8192  # 64 to 2**20; histogram bins a task and domain, 24 bytes each
    logit_range: float = 16.0  # 1 to 700; the histogram takes logits beyond +-logit_range as if at its ends
    ece_bins: int = 20  # 1 to 1000; bins of equal weight for the expected calibration error
    kept_rows: int = 200_000  # rows kept over all ranks; up to here all is exact, beyond it see MultitaskMetrics

    def __post_init__(self) -> None:
        check_range("metrics.num_bins", self.num_bins, 64, 2**20)
        check_range("metrics.logit_range", self.logit_range, 1, 700)
        check_range("metrics.ece_bins", self.ece_bins, 1, 1000)
        check_range("metrics.kept_rows", self.kept_rows, 1, 10**9)


@dataclass
class EvalResult:
    """The outcome of an evaluation: plain floats, ints and None, ready for JSON.

    >>> EvalResult(metrics={"click": {"auc": 0.7}}, domains={"click": {"home": {"auc": None}}}).metrics["click"]["auc"]
    0.7
    """

    metrics: dict[str, MetricValues]  # task -> metric -> value over all rows
    domains: dict[str, dict[str, MetricValues]]  # task -> domain -> metric -> value over the domain's rows


class MultitaskMetrics(Metric):
    """Metrics of every task, over all rows and in each domain, over all ranks.

    `rec/curves.py` says what each metric is. Besides, `log_mae` is the mean of |log p - log label| over the rows with a label
    that is neither 0 nor 1, as a teacher's are, p and label being taken as no less than 1e-12; None without such rows and for
    a regression. A row of weight 0 is masked for that task, whatever its logit and label hold. A row of no known domain
    (-1) counts among all rows, and in no domain, nor in `field_ece`.
    `gauc` is None when not `grouped`; also when single groups hold more than `kept_rows` rows. `auc_truth` and
    `gap_closed` are there for a binary task with a `truth` column.

    All is exact up to `kept_rows` rows. Beyond, rows are kept of a uniform sample of groups, decided by a hash of the
    group, for `gauc`, and `auc`, `pr_auc` and `ece` come from the histogram. Measured on four million rows at base rates
    of 0.5, 1e-2, 1e-3 and 1e-4, it is off by 1e-5 in `auc`, by 0.2 % of its value in `pr_auc` (always below) and by 5 %
    of its value in `ece`. Rows of one bin count as ties, so a few logits far out, up to `logit_range`, coarsen the
    grid for the rest: bins are then 1/256 wide in logit, at worst.

    The histogram holds 24 bytes a bin: 3 tasks, 15 domains and one unknown, 8,192 bins are 9 MB, 1,000 domains are 590 MB
    (use fewer bins); a task with a truth counts twice. Ranks add their histograms up in place; rows that were kept are gathered.

    `update` raises ValueError where a row that counts holds a NaN, an infinity, a label outside [0, 1] or an unknown
    domain, or where a weight is negative or NaN. `compute` waits for all ranks: call it on every rank or on none, each
    after at least one `update` (of masked rows, if a rank has none).

    >>> metrics = MultitaskMetrics({"click": TaskConfig(label="is_click")}, domains=["home", "search"])
    >>> metrics.update(
    ...     torch.tensor([[2.0], [-1.0], [0.5], [0.0]]),
    ...     labels=torch.tensor([[1.0], [0.0], [0.0], [1.0]]),
    ...     weights=torch.ones(4, 1),
    ...     domain_id=torch.tensor([0, 0, 0, 1]),
    ... )
    >>> result = metrics.compute()
    >>> result.metrics["click"]["auc"], result.metrics["click"]["positives"]
    (0.75, 2)
    >>> result.domains["click"]["home"]["auc"], result.domains["click"]["search"]["auc"]
    (1.0, None)
    """

    full_state_update = False

    binary: Tensor  # [T] bool
    known: Tensor  # [T] bool, where there is a truth
    bounds: Tensor  # [2, len(_FIELDS), T] float32
    # D is one more than there are domains: the last one holds the rows of no known domain
    histogram: Tensor  # [3, C, D, num_bins] float64; C columns of scores: the binary tasks, then the known truths
    sums: Tensor  # [len(_SUMS), T, D] float64
    low: Tensor  # [C] float64, smallest logit seen
    high: Tensor  # [C] float64, largest logit seen
    width: Tensor  # [C] float64, of a column's bins, one of _WIDTHS
    level: Tensor  # [] int64, groups whose hash ends in this many zero bits are kept
    kept_keys: list[Tensor]  # each [R, 2] int64: hash of the group, domain_id
    kept_values: list[Tensor]  # each [R, 3, C] float32: score, label, weight

    def __init__(
        self,
        tasks: dict[str, TaskConfig],
        *,
        domains: list[str],
        config: MetricsConfig | None = None,
        grouped: bool = False,
        **kwargs: Any,
    ) -> None:
        """For `tasks` and `domains` by name; `grouped` if rows have a group; `kwargs` as for every torchmetrics metric."""
        # Without the cache every compute is a collective. With it, a rank that saw no update since the last one would
        # answer from its cache and leave the others waiting.
        super().__init__(compute_with_cache=False, **kwargs)
        self.config = config or MetricsConfig()
        self.tasks, self.domains, self.grouped = tasks, domains, grouped
        binary = [t for t, task in enumerate(tasks.values()) if task.kind is TaskKind.binary]
        known = [t for t in binary if list(tasks.values())[t].truth]
        self.num_binary, self.column_tasks = len(binary), binary + known
        for name, among in (("binary", binary), ("known", known)):
            self.register_buffer(name, torch.tensor([t in among for t in range(len(tasks))]), persistent=False)
        self.register_buffer("bounds", self._bounds(binary), persistent=False)
        self._add_states(num_columns=len(self.column_tasks))

    def _bounds(self, binary: list[int]) -> Tensor:
        """Smallest and largest value [2, len(_FIELDS), T] float32 that a row may hold."""
        largest = torch.finfo(torch.float32).max
        high = torch.tensor([largest, largest, largest, len(self.domains) - 1, 1])[:, None].repeat(1, len(self.tasks))
        low = torch.tensor([-largest, -largest, 0, -1, 0])[:, None].repeat(1, len(self.tasks))
        low[1, binary], high[1, binary] = 0, 1
        return torch.stack([low, high])

    def _add_states(self, *, num_columns: int) -> None:
        num_domains = len(self.domains) + 1
        shape = (3, num_columns, num_domains, 0 if self.config.exact else self.config.num_bins)
        sums = torch.zeros(len(_SUMS), len(self.tasks), num_domains, dtype=torch.float64)
        bound = torch.full((num_columns,), math.inf, dtype=torch.float64)
        self.add_state("histogram", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", sums, dist_reduce_fx="sum")
        self.add_state("low", bound, dist_reduce_fx="min")
        self.add_state("high", -bound, dist_reduce_fx="max")
        self.add_state("width", _WIDTHS[:1].repeat(num_columns), dist_reduce_fx="max")
        self.add_state("level", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("kept_keys", [], dist_reduce_fx="cat")
        self.add_state("kept_values", [], dist_reduce_fx="cat")

    # ---- rows come in

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        domain_id: Tensor,
        group_id: Tensor | None = None,
        truth: Tensor | None = None,
    ) -> None:
        """Add a batch of rows; on CUDA, waits for the device.

        Args:
            logits: [B, T] float; the prediction itself for a regression task.
            labels: [B, T] float, 0 to 1 for a binary task.
            weights: [B, T] float, >= 0; 0 masks the row for the task.
            domain_id: [B] integer, an index into `domains`; -1 for a domain that is none of them.
            group_id: [B] integer, any value; needed where `grouped`.
            truth: [B, T] float, 0 to 1, the true probability; read for the binary tasks that have a `truth` column.

        Raises:
            ValueError: naming the task, the value and the row, where a row that counts holds what it must not.
        """
        self._check_shapes(logits, labels, weights, domain_id, group_id, truth)
        if not len(logits):
            return
        batch = self._selected(logits, labels, weights, domain_id, truth)
        domain_id = batch[3, 0].long().remainder(len(self.domains) + 1)  # the unknown one is the last
        self._add_sums(batch, domain_id)
        columns = self._columns(batch, with_truth=truth is not None)
        if not self.config.exact:
            self._add_to_histogram(columns, domain_id)
        if self.grouped or not self.level:
            self._keep_rows(columns, domain_id, group_id)

    def _check_shapes(self, logits: Tensor, *others: Tensor | None) -> None:
        shape = (len(logits), len(self.tasks))
        batch = dict(
            zip(("logits", "labels", "weights", "domain_id", "group_id", "truth"), (logits, *others), strict=True)
        )
        for name, tensor in batch.items():
            expected = shape[:1] if name.endswith("_id") else shape
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}, expected {list(expected)}: [B] or [B, T], T tasks"
                )
        if self.grouped and batch["group_id"] is None:
            raise ValueError(
                "group_id is None, expected integers [B]: pass them, or build the metrics with grouped=False"
            )

    def _selected(
        self, logits: Tensor, labels: Tensor, weights: Tensor, domain_id: Tensor, truth: Tensor | None
    ) -> Tensor:
        """The batch as [len(_FIELDS), T, B] float32, masked values replaced by harmless ones, the others checked.

        Replaced, not multiplied by 0, which leaves NaN; rows last, so that sums and extremes run along memory.
        """
        mask = weights > 0
        domain = torch.where(mask.any(1), domain_id, 0)[:, None].expand_as(mask)
        truth = torch.full_like(logits, 0.5) if truth is None else torch.where(mask & self.known, truth, 0.5)
        fields = (torch.where(mask, logits, 0), torch.where(mask, labels, 0), weights, domain, truth)
        batch = torch.stack([field.T.float() for field in fields])
        lowest, highest = self.bounds
        low, high = batch.amin(2), batch.amax(2)  # NaN spreads, and is then in no range
        if not ((low >= lowest) & (high <= highest)).all():  # waits for the device
            self._refuse(batch, ~((batch >= lowest[..., None]) & (batch <= highest[..., None])))
        return batch

    def _refuse(self, batch: Tensor, wrong: Tensor) -> None:
        field, task, row = wrong.nonzero()[0].tolist()
        lowest, highest = self.bounds[:, field, task].tolist()
        raise ValueError(
            f"{_FIELDS[field]} of task '{list(self.tasks)[task]}' is {batch[field, task, row].item():g} in row {row} of the"
            f" batch, expected {lowest:g} to {highest:g} ({int(wrong[field, task].sum())} such values): mend the column, or"
            " mask the row with weight 0"
        )

    def _add_sums(self, batch: Tensor, domain_id: Tensor) -> None:
        logits, labels, weights = batch[:3]
        preds = torch.where(self.binary[:, None], logits.sigmoid(), logits)
        # Of the logits, since log(1 - pred) of a rounded pred is nothing; in a form in which no two large terms cancel.
        logloss = softplus(-logits.abs()) + logits.relu() - logits * labels
        error = preds - labels
        soft = ((labels > 0) & (labels < 1)).to(labels.dtype)
        log_error = logsigmoid(logits).clamp(min=_MIN_LOG) - labels.log().clamp(min=_MIN_LOG)
        log_error = torch.where(soft > 0, log_error.abs(), 0)
        parts = [labels, preds, logloss, soft, log_error, error.abs(), error]
        sums = torch.stack([(weights > 0).float(), labels, weights, *(weights * part for part in parts)]).double()
        sums[-1] *= error  # squared in float64: it may not fit float32
        self.sums.scatter_add_(2, domain_id.expand(sums.shape), sums)

    def _columns(self, batch: Tensor, *, with_truth: bool) -> Tensor:
        """Scores, labels and weights [3, C, B]: of the binary tasks, then of the known truths as logits."""
        columns = batch[:3, self.column_tasks]
        columns[0, self.num_binary :] = batch[4, self.column_tasks[self.num_binary :]].logit()
        columns[2, self.num_binary :] *= with_truth
        return columns

    # ---- histogram of logits

    def _add_to_histogram(self, columns: Tensor, domain_id: Tensor) -> None:
        scores, labels, weights = columns
        limit = self.config.logit_range
        scores = scores.clamp(-limit, limit * (1 - 2**-23))  # half open, so that it takes a whole number of bins
        low = torch.where(weights > 0, scores, math.inf).amin(1)
        high = torch.where(weights > 0, scores, -math.inf).amax(1)
        self._widen(torch.minimum(self.low, low), torch.maximum(self.high, high))
        num_columns, num_domains, num_bins = self.histogram.shape[1:]
        cell = torch.arange(num_columns, device=scores.device)[:, None] * num_domains + domain_id  # [C, B]
        index = (cell * num_bins + _bin(scores, self.width[:, None]).remainder(num_bins)).flatten()
        positives = weights * labels
        for channel, value in enumerate((weights - positives, positives, weights * scores.sigmoid())):
            self.histogram[channel].view(-1).scatter_add_(0, index, value.flatten().double())

    def _widen(self, low: Tensor, high: Tensor) -> None:
        """Let the bins span `low` to `high` [C], merging neighbours where they must grow.

        Bin n of the endless grid lies in slot n modulo num_bins, so a grid that only moves needs no copying.
        """
        if torch.equal(low, self.low) and torch.equal(high, self.high):
            return
        num_bins = self.histogram.shape[-1]
        widths = _WIDTHS.to(low.device)
        too_narrow = (high[:, None] / widths).floor() - (low[:, None] / widths).floor() >= num_bins  # [C, widths]
        width = torch.maximum(widths[too_narrow.sum(1)], self.width)
        if not torch.equal(width, self.width):
            slots = torch.arange(num_bins, device=low.device)
            first = self._first_bin()[:, None]
            bins = first + (slots - first).remainder(num_bins)  # [C, num_bins], what the slots hold
            merged = bins.div((width / self.width).long()[:, None], rounding_mode="floor").remainder(num_bins)
            index = merged[:, None].expand_as(self.histogram)
            self.histogram = torch.zeros_like(self.histogram).scatter_add_(-1, index, self.histogram)
        self.low, self.high, self.width = low, high, width

    def _first_bin(self) -> Tensor:
        """Number of the lowest bin in use [C] int64; 0 where there were no rows."""
        return _bin(torch.where(self.low.isfinite(), self.low, 0), self.width)

    # ---- rows kept for group AUC, or all of them

    def _keep_rows(self, columns: Tensor, domain_id: Tensor, group_id: Tensor | None) -> None:
        # Without groups all rows are one, and none are left as soon as they are too many.
        group = mix(group_id.long() if self.grouped and group_id is not None else torch.zeros_like(domain_id))
        keep = (columns[2] > 0).any(0) & _in_sample(group, int(self.level))
        self.kept_keys.append(torch.stack([group, domain_id], dim=1)[keep])
        self.kept_values.append(columns[:, :, keep].permute(2, 0, 1).float())
        if not self.config.exact and sum(map(len, self.kept_keys)) > self.config.kept_rows:
            self._thin(_rows_by_level(torch.cat(self.kept_keys)[:, 0]))

    def _thin(self, rows_by_level: Tensor) -> None:
        """Raise the level, each step halving the share of groups, until at most `kept_rows` rows are left.

        The outcome depends on the rows alone: a level too low for some of them is too low for all of them.
        """
        level = max(int((rows_by_level > self.config.kept_rows).sum()), int(self.level))
        keys, values = torch.cat(self.kept_keys), torch.cat(self.kept_values)
        keep = _in_sample(keys[:, 0], level)
        self.kept_keys, self.kept_values = [keys[keep]], [values[keep]]
        self.level = torch.full_like(self.level, level)

    # ---- ranks meet

    def sync(
        self,
        dist_sync_fn: Callable | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable | None = None,
    ) -> None:
        """Bring the ranks' states onto one grid and one sample, then let torchmetrics reduce them. A collective."""
        available = distributed_available or self.distributed_available_fn
        if should_sync and not self._is_synced and available is not None and available():
            self._agree(process_group or self.process_group)
        super().sync(dist_sync_fn or self._gather, process_group, should_sync, distributed_available)

    def _agree(self, group: Any | None) -> None:
        # A rank without rows still needs tensors of the right shape to be gathered.
        self.kept_keys.append(torch.zeros(0, 2, dtype=torch.int64, device=self.device))
        self.kept_values.append(torch.zeros(0, 3, len(self.column_tasks), device=self.device))
        if self.config.exact:
            return
        bounds = torch.cat([-self.low, self.high])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
        self._widen(-bounds[: len(self.low)], bounds[len(self.low) :])
        dist.all_reduce(self.level, op=dist.ReduceOp.MAX, group=group)
        rows = _rows_by_level(torch.cat(self.kept_keys)[:, 0])
        dist.all_reduce(rows, group=group)
        self._thin(rows)

    def _gather(self, state: Tensor, group: Any | None = None) -> list[Tensor]:
        """What torchmetrics asks of a `dist_sync_fn`, without holding a copy of the histogram from every rank."""
        if state is self.histogram or state is self.sums:
            total = state.clone()
            dist.all_reduce(total, group=group)
            return [total]
        return gather_all_tensors(state, group)

    # ---- numbers come out

    def compute(self) -> EvalResult:
        """The metrics over all rows of all ranks since the last `reset`. A collective: call it on every rank."""
        slices = {task: self._slices(t) for t, task in enumerate(self.tasks)}  # [1 + D] each, all rows first
        return EvalResult(
            metrics={task: values[0] for task, values in slices.items()},
            domains={task: dict(zip(self.domains, values[1:], strict=True)) for task, values in slices.items()},
        )

    def _slices(self, task: int) -> list[MetricValues]:
        """The metrics of one task: over all rows, then in each domain."""
        sums = self.sums[:, task].T.cpu().numpy()
        totals = [dict(zip(_SUMS, row, strict=True)) for row in [sums.sum(0).tolist(), *sums[:-1].tolist()]]
        if task not in self.column_tasks:
            return [regression_metrics(total) | {"log_mae": None} for total in totals]
        own, *known = (self._curves(c) for c, t in enumerate(self.column_tasks) if t == task)
        truths = known[0] if known else [None] * len(totals)
        gaucs = self._gaucs(self.column_tasks.index(task))
        found = [
            binary_metrics(total, curve=curve, truth=truth, gauc=gauc, ece_bins=self.config.ece_bins) | _log_mae(total)
            for total, curve, truth, gauc in zip(totals, own, truths, gaucs, strict=True)
        ]
        found[0]["field_ece"] = field_ece(
            [values["ece"] for values in found[1:]], [total["weight"] for total in totals[1:]]
        )
        return found

    def _curves(self, column: int) -> list[Curve]:
        """The curve of a column: over all rows, then in each domain."""
        if not self.level:  # every row is at hand
            keys, scores, labels, weights = self._kept_rows(column)
            among = [slice(None), *(keys[:, 1] == d for d in range(len(self.domains)))]
            return [exact_curve(scores[rows], labels=labels[rows], weights=weights[rows]) for rows in among]
        first = int(self._first_bin()[column])
        bins = self.histogram[:, column].roll(-first % self.config.num_bins, dims=-1).cpu().numpy()
        return [curve[:, curve[:2].any(0)] for curve in [bins.sum(1), *bins.swapaxes(0, 1)[:-1]]]

    def _gaucs(self, column: int) -> list[float | None]:
        """Group AUC of a column: over all rows, then in each domain."""
        if not self.grouped:
            return [None] * (1 + len(self.domains))
        keys, scores, labels, weights = self._kept_rows(column)
        mean_auc = partial(group_auc, keys[:, 0], scores=scores, labels=labels, weights=weights)
        return mean_auc() + mean_auc(domain_id=keys[:, 1], num_domains=len(self.domains) + 1)[:-1]

    def _kept_rows(self, column: int) -> list[np.ndarray]:
        """Keys [R, 2], scores, labels and weights [R] of a column's rows that were kept, over all ranks."""
        if len(self.kept_keys) == 0:
            return [np.zeros((0, 2), dtype=np.int64), *np.zeros((3, 0))]
        # dim_zero_cat, since torchmetrics makes one tensor of a list when ranks meet
        keys, values = dim_zero_cat(self.kept_keys), dim_zero_cat(self.kept_values)[:, :, column]
        counts = values[:, 2] > 0
        return [keys[counts].cpu().numpy(), *values[counts].double().cpu().numpy().T]


def _log_mae(total: dict[str, float]) -> MetricValues:
    return {"log_mae": total["log_error"] / total["soft"] if total["soft"] else None}


def _bin(scores: Tensor, width: Tensor) -> Tensor:
    """Number of a score's bin on the endless grid, int64."""
    return (scores / width).floor().long()


def _in_sample(group: Tensor, level: int) -> Tensor:
    return group & (1 << level) - 1 == 0


def _rows_by_level(group: Tensor) -> Tensor:
    """How many rows [64] int64 each level would keep; never more at a higher level."""
    return torch.stack([_in_sample(group, level).sum() for level in range(64)])
