"""How tasks use the experts: which ones each gate mixes, what tasks share, whether experts differ.

`ExpertHealth` sees gate weights [B, T, N] and expert outputs [B, N, H] and gives a `HealthResult` of plain numbers;
`advice` says in words what is wrong with them and what to try, `table_of_health` shows them. gbar^k is the gate of task k,
averaged over all rows.

No number is enough by itself. Effective experts say how many a task mixes, but gates that are alike for all tasks (OMoE,
Ma et al., KDD 2018) can mix all of them; so overlap says how much two tasks mix the same ones. Both are blind to experts
that compute the same thing; so specialisation compares their outputs.
"""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from rec.schema import check_range

_CKA_COLUMNS = 2048  # units of all experts together that are compared; their products take 32 MiB
_DEAD = 0.1  # a dead expert has less than this share of an even gate's 1/N, in every task
_POLARISED = 0.9  # a polarised gate gives one expert more than this
_ALIKE = 0.05  # experts of less specialisation than this do the same
_HEALTHY_OVERLAP = (0.3, 0.9)
_LITTLE_OVERLAP = 0.1
_TEMPERATURE = "model.experts.temperature"
_DROPOUT = "model.experts.expert_dropout=0.1"


@dataclass
class TaskHealth:
    """How one task uses the experts."""

    gate_weights: list[float]  # gbar [N], 0 to 1, summing to 1
    effective_experts: float  # exp(entropy of gbar), 1 to N: experts that the task uses at all; healthy above N/2
    effective_experts_per_row: float  # exp(mean entropy of a row's gate), 1 to N: experts that mix in one row
    largest: float  # of gbar, 1/N to 1
    primary: int  # expert of the largest weight in gbar
    secondary: int | None  # expert of the second largest; None where no other has any


@dataclass
class HealthResult:
    """What gates and experts do over all rows; plain numbers and None, ready for JSON. Pairs of tasks are named "a/b"."""

    rows: int  # that were counted
    num_experts: int  # N
    tasks: dict[str, TaskHealth]
    overlap: dict[str, float]  # sum_i min(gbar^a_i, gbar^b_i), 0 (no expert shared) to 1; healthy from 0.3 to 0.9
    overlap_per_row: dict[str, float]  # the same of each row's gates, then averaged over rows
    js: dict[str, float]  # Jensen-Shannon divergence of gbar^a and gbar^b in nats, 0 (alike) to ln 2
    specialisation: float | None  # 1 - mean linear CKA over pairs of experts, 0 (the same) to 1; None without a pair
    dead: list[
        int
    ]  # experts to which every task gives less than 0.1 / N on average, in the rows in which it reaches them
    polarised: list[str]  # tasks that give one expert more than 0.9 on average
    constant: list[int]  # experts whose output is the same in every row that was compared; not in specialisation


class ExpertHealth(Metric):
    """Diagnostics of gates and experts over all rows of all ranks, in memory that does not grow with rows.

    Sums are float64 and exact up to rounding, so the result is the same on any number of ranks. Specialisation is a
    property of the first steps' rows, until they are `cka_rows` over all ranks, and where the experts have more than 2048
    units together, of the first 2048 // N of each; linear CKA as in Kornblith et al., ICML 2019, equation 3. It costs
    rows (N H)^2 products and is biased: independent Gaussian experts have a CKA of about H / (H + rows), not 0.

    `update` raises ValueError where shapes disagree. `compute` raises ValueError where gates of counted rows do not sum to 1,
    or outputs are not finite; it waits for all ranks: call it on every rank or on none, each after at least one `update` (of
    padding alone, if a rank has no rows). It gives None where no rank counted a row.

    >>> health = ExpertHealth(["click", "purchase"])
    >>> gate_weights = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
    >>> health.update(gate_weights, torch.rand(1, 3, 8), torch.tensor([True]), rows_before=0)
    >>> result = health.compute()
    >>> result.tasks["click"].effective_experts, result.tasks["purchase"].primary, result.overlap, result.polarised
    (2.0, 2, {'click/purchase': 0.0}, ['purchase'])
    """

    full_state_update = False

    # The shape of a state comes with the first batch: all begin as a zero that broadcasts.
    rows: Tensor  # [] int64
    gates: Tensor  # [T, N] float64
    reached: Tensor  # [T, N] float64, rows in which the task gives the expert anything: a domain's expert has few
    entropy: Tensor  # [T] float64, nats
    shared: Tensor  # [T, T] float64, sum_i min(g^a_i, g^b_i)
    compared: Tensor  # [] int64, rows in the two below
    outputs: Tensor  # [N h] float64; h units of each expert
    products: Tensor  # [N h, N h] float64

    def __init__(self, tasks: list[str], *, cka_rows: int = 4096, **kwargs: Any) -> None:
        """For `tasks` by name; `cka_rows`, at least 2, are compared; `kwargs` as for every torchmetrics metric."""
        # Not torchmetrics' gather, which holds the products of every rank. As to the cache, see MultitaskMetrics.
        super().__init__(**{"dist_sync_fn": _total, "compute_with_cache": False} | kwargs)
        check_range("cka_rows", cka_rows, 2, 1e9)
        self.tasks, self.cka_rows = list(tasks), cka_rows
        for name in ("rows", "compared"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
        for name in ("gates", "reached", "entropy", "shared", "outputs", "products"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    # ---- rows come in

    def update(self, gate_weights: Tensor, expert_outputs: Tensor, counts: Tensor, *, rows_before: int) -> None:
        """Add a batch of rows; never waits for the device.

        Args:
            gate_weights: [B, T, N] float, 0 to 1, summing to 1 over N; exactly 0 where a task cannot reach an expert.
            expert_outputs: [B, N, H] float.
            counts: [B] bool, False for padding, which may hold anything.
            rows_before: rows of the steps before this one over all ranks, padding included: step times global batch size.
                Of the step, not of the rank, so that any number of ranks compares experts on the same rows.
        """
        self._check_shapes(gate_weights, expert_outputs, counts)
        gates = torch.where(counts[:, None, None], gate_weights, 0).double()  # times 0 would leave NaN
        shared = [torch.minimum(gates, gates[:, [task]]).sum((0, 2)) for task in range(len(self.tasks))]
        self.rows = self.rows + counts.sum()
        self.gates = self.gates + gates.sum(0)
        self.reached = self.reached + (gates > 0).double().sum(0)
        self.entropy = self.entropy + torch.special.entr(gates).sum((0, 2))
        self.shared = self.shared + torch.stack(shared)
        if rows_before < self.cka_rows:
            self._compare(expert_outputs, counts)

    def _compare(self, expert_outputs: Tensor, counts: Tensor) -> None:
        units = max(1, _CKA_COLUMNS // expert_outputs.shape[1])
        outputs = torch.where(counts[:, None, None], expert_outputs, 0)[..., :units].double().flatten(1)  # [B, N h]
        self.compared = self.compared + counts.sum()
        self.outputs = self.outputs + outputs.sum(0)
        self.products = self.products + outputs.T @ outputs

    def _check_shapes(self, gate_weights: Tensor, expert_outputs: Tensor, counts: Tensor) -> None:
        rows, num_tasks, num_experts = len(counts), len(self.tasks), gate_weights.shape[-1]
        if gate_weights.shape != (rows, num_tasks, num_experts):
            raise ValueError(
                f"gate_weights has shape {list(gate_weights.shape)}, expected [{rows}, {num_tasks}, N] for {rows} rows"
                f" in counts and the tasks {', '.join(self.tasks)}: pass Outputs.gate_weights of the same batch"
            )
        if expert_outputs.dim() != 3 or expert_outputs.shape[:2] != (rows, num_experts):
            raise ValueError(
                f"expert_outputs has shape {list(expert_outputs.shape)}, expected [{rows}, {num_experts}, H] for {rows} rows"
                f" and {num_experts} experts in gate_weights: pass Outputs.expert_outputs of the same batch"
            )
        if counts.dtype != torch.bool or counts.dim() != 1:
            raise ValueError(
                f"counts is {list(counts.shape)} {counts.dtype}, expected [{rows}] torch.bool: pass row_id >= 0"
            )

    # ---- numbers come out

    def compute(self) -> HealthResult | None:
        """The diagnostics over all rows of all ranks since the last `reset`. A collective: call it on every rank."""
        if not self.rows:
            return None
        gates, entropy, shared = ((state / self.rows).cpu() for state in (self.gates, self.entropy, self.shared))
        self._check_gates(gates, entropy)
        given = (self.gates / self.reached.clamp(min=1)).cpu()  # where there is anything to give
        num_experts = gates.shape[1]
        pairs = {f"{self.tasks[a]}/{self.tasks[b]}": (a, b) for a, b in combinations(range(len(self.tasks)), 2)}
        tasks = {name: _task_health(*of_task) for name, *of_task in zip(self.tasks, gates, entropy, strict=True)}
        cka = self._cka(num_experts)
        constant = cka.diagonal().isnan().nonzero().flatten().tolist() if self.compared > 1 else []
        between = cka[*torch.triu_indices(num_experts, num_experts, offset=1)]
        known = between[~between.isnan()]
        return HealthResult(
            rows=int(self.rows),
            num_experts=num_experts,
            tasks=tasks,
            overlap={pair: torch.minimum(gates[a], gates[b]).sum().item() for pair, (a, b) in pairs.items()},
            overlap_per_row={pair: shared[a, b].item() for pair, (a, b) in pairs.items()},
            js={pair: _js(gates[a], gates[b]) for pair, (a, b) in pairs.items()},
            specialisation=max(0.0, 1 - known.mean().item()) if len(known) else None,
            dead=(given.amax(0) < _DEAD / num_experts).nonzero().flatten().tolist(),
            polarised=[name for name, task in tasks.items() if task.largest > _POLARISED and num_experts > 1],
            constant=constant,
        )

    def _check_gates(self, gates: Tensor, entropy: Tensor) -> None:
        # bfloat16 may sum to half a per cent less or more than 1; weights below 0 have an entropy of minus infinity.
        for name, total, finite in zip(self.tasks, gates.sum(1).tolist(), entropy.isfinite().tolist(), strict=True):
            if not (abs(total - 1) < 0.02 and finite):
                raise ValueError(
                    f"gate_weights of task '{name}' sum to {total:g} in the mean of {int(self.rows):,} rows, with an entropy"
                    f" that is {'finite' if finite else 'not finite'}; expected weights from 0 to 1 that sum to 1: pass the"
                    " softmax of the gates' logits, and see whether the logits are finite"
                )

    def _cka(self, num_experts: int) -> Tensor:
        """Linear CKA of every two experts [N, N], 0 to 1; NaN where one of the two is constant."""
        if not self.compared:
            return torch.full((num_experts, num_experts), math.nan)
        moments = self.products.diagonal().view(num_experts, -1).sum(1)
        for expert in (~moments.isfinite()).nonzero().flatten().tolist():
            raise ValueError(f"outputs of expert {expert} hold NaN or infinity: see whether training diverged")
        covariances = self.products - torch.outer(self.outputs, self.outputs) / self.compared
        variances = covariances.diagonal().view(num_experts, -1).sum(1)
        # |X_i' X_j|^2 of centred outputs, which is HSIC up to a factor that cancels
        hsic = covariances.view(num_experts, -1, num_experts, len(covariances) // num_experts).square().sum((1, 3))
        scale = hsic.diagonal().sqrt()
        cka = hsic / torch.outer(scale, scale)
        constant = variances <= 1e-12 * moments  # what rounding float32 leaves of no variance
        return torch.where(constant[:, None] | constant, math.nan, cka).cpu()


def _total(state: Tensor, group: Any | None = None) -> list[Tensor]:
    """What torchmetrics asks of a `dist_sync_fn`, of states that are sums."""
    total = state.clone()
    dist.all_reduce(total, group=group)
    return [total]


def _entropy(gates: Tensor) -> Tensor:
    return torch.special.entr(gates).sum()


def _js(a: Tensor, b: Tensor) -> float:
    """Jensen-Shannon divergence of two distributions [N] in nats (Lin 1991)."""
    return max(0.0, (_entropy((a + b) / 2) - (_entropy(a) + _entropy(b)) / 2).item())  # rounding may fall below 0


def _task_health(gates: Tensor, row_entropy: Tensor) -> TaskHealth:
    primary, *others = gates.argsort(descending=True, stable=True).tolist()
    return TaskHealth(
        gate_weights=gates.tolist(),
        effective_experts=_entropy(gates).exp().item(),
        effective_experts_per_row=row_entropy.exp().item(),
        largest=gates[primary].item(),
        primary=primary,
        secondary=others[0] if others and gates[others[0]] > 0 else None,
    )


# ---- words for people


def advice(result: HealthResult) -> list[str]:
    """What is wrong and what to try: a sentence for each kind of finding, none where all is well."""
    found = (_dead(result), _polarised(result), _unshared(result), _alike(result), _constant(result))
    return [sentence for sentence in found if sentence]


def _dead(result: HealthResult) -> str | None:
    if not result.dead:
        return None
    most = max(task.gate_weights[expert] for task in result.tasks.values() for expert in result.dead)
    return (
        f"{_experts(result.dead, result)} dead: no task gives more than {most:.2g} on average (an even"
        f" gate: {1 / result.num_experts:.2g}); raise {_TEMPERATURE} to 2 to 4, set {_DROPOUT}, or use fewer experts"
    )


def _polarised(result: HealthResult) -> str | None:
    if not result.polarised:
        return None
    tasks = {name: result.tasks[name] for name in result.polarised}
    listed = _some([f"'{name}' gives {task.largest:.2f} to expert {task.primary}" for name, task in tasks.items()])
    return (
        f"polarised gates: {listed} (above {_POLARISED:g}); try {_TEMPERATURE} of 2 to 4 or {_DROPOUT}; in a task with few"
        " positives this is a known pattern and no fault by itself (Ma et al. 2018)"
    )


def _unshared(result: HealthResult) -> str | None:
    pairs = sorted((overlap, pair) for pair, overlap in result.overlap.items() if overlap < _LITTLE_OVERLAP)
    if not pairs:
        return None
    low, high = _HEALTHY_OVERLAP
    listed = _some([f"{pair} {overlap:.2f}" for overlap, pair in pairs])
    return (
        f"tasks share few experts: overlap of {listed} (healthy: {low:g} to {high:g}); raise {_TEMPERATURE} to 2 to 4"
    )


def _alike(result: HealthResult) -> str | None:
    if result.specialisation is None or result.specialisation >= _ALIKE:
        return None
    return (
        f"the {result.num_experts} experts do almost the same: specialisation {result.specialisation:.3f} (below {_ALIKE:g});"
        " use fewer experts, or kinds that differ (experts=mixed)"
    )


def _constant(result: HealthResult) -> str | None:
    if not result.constant:
        return None
    return (
        f"{_experts(result.constant, result)} constant: the same output in every row that was compared, as"
        " of ReLUs that no row activates any more; lower optim.dense.lr or use fewer experts"
    )


def _experts(experts: list[int], result: HealthResult) -> str:
    """Subject and verb of a sentence."""
    many = len(experts) > 1
    return f"expert{'s' if many else ''} {_some(experts)} of {result.num_experts} {'are' if many else 'is'}"


def _some(items: list[Any], *, limit: int = 6) -> str:
    """The first items in words."""
    return ", ".join(map(str, items[:limit])) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def table_of_health(result: HealthResult, *, max_columns: int = 12) -> str:
    """A table for people: a line a task, then what tasks share and how experts differ.

    Up to `max_columns` experts have a column each, "." where a gate cannot reach the expert; of more, the six largest are named.
    """
    few = result.num_experts <= max_columns
    width = max(len("task"), *map(len, result.tasks))
    titles = "".join(f"{expert:6d}" for expert in range(result.num_experts)) if few else " largest gate weights"
    lines = [f"{'task':<{width}}   effective   per row   largest  {titles}"]
    for name, task in result.tasks.items():
        numbers = f"{task.effective_experts:12.2f}{task.effective_experts_per_row:10.2f}{task.largest:10.2f}"
        lines.append(f"{name:<{width}}{numbers}  {_columns(task) if few else _top(task)}")
    return "\n".join([*lines, _summary(result)])


def _columns(task: TaskHealth) -> str:
    return "".join(f"{weight:6.2f}" if weight else "     ." for weight in task.gate_weights)


def _top(task: TaskHealth, *, limit: int = 6) -> str:
    largest = sorted(enumerate(task.gate_weights), key=lambda item: -item[1])[:limit]
    return "".join(f"{f'#{expert}':>5}{weight:5.2f}" for expert, weight in largest if weight)


def _summary(result: HealthResult) -> str:
    """One line: overlaps of the pairs of tasks, the three smallest if there are many, then the experts."""
    pairs = sorted(result.overlap, key=result.overlap.__getitem__) if len(result.overlap) > 3 else list(result.overlap)
    shown = [f"{pair} {result.overlap[pair]:.2f} ({result.overlap_per_row[pair]:.2f} per row)" for pair in pairs[:3]]
    more = f", {len(pairs) - 3} more up to {max(result.overlap.values()):.2f}" if len(pairs) > 3 else ""
    known = result.specialisation is not None
    parts = [
        *([f"overlap {', '.join(shown)}{more}"] if pairs else []),
        f"{result.num_experts} experts, specialisation {f'{result.specialisation:.2f}' if known else '-'}",
        *([f"dead {_some(result.dead)}"] if result.dead else []),
        *([f"constant {_some(result.constant)}"] if result.constant else []),
    ]
    return "; ".join(parts)
