"""Towers' logits become tasks' logits: products of probabilities along a funnel, and corrections for sampling.

ESMM (Ma et al., SIGIR 2018): p(click and buy) = p(click) p(buy | click), trained on every impression, so that the second factor
is learned where it is used. ESM2 (Wen et al., SIGIR 2020): p(buy | click) = p(cart) p(buy | cart) + (1 - p(cart)) p(buy | no cart).
Everything is computed in logarithms: a product of small probabilities keeps its digits, and so does its complement.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rec.schema import Debias, TaskConfig


def tower_of(tasks: dict[str, TaskConfig]) -> list[int]:
    """The task of each tower.

    First one a task; after these a second one for each task that goes `via` another; last an imputation tower for each task
    whose `debias` is dr, which only training reads (see `imputation_towers`).

    >>> tower_of({"cart": TaskConfig(label="cart"), "buy": TaskConfig(label="buy", via="cart")})
    [0, 1, 1]
    >>> tower_of({"click": TaskConfig(label="c"), "buy": TaskConfig(label="b", condition="click", debias=Debias.dr)})
    [0, 1, 1]
    """
    second = [t for t, task in enumerate(tasks.values()) if task.via]
    return [*range(len(tasks)), *second, *(t for t, task in enumerate(tasks.values()) if task.debias is Debias.dr)]


def imputation_towers(tasks: dict[str, TaskConfig]) -> dict[int, int]:
    """Task -> the tower that imputes its loss, for the tasks whose `debias` is dr; indices into tasks and towers.

    >>> imputation_towers({"click": TaskConfig(label="c"), "buy": TaskConfig(label="b", product="click", debias=Debias.dr)})
    {1: 2}
    """
    first = len(tasks) + sum(task.via is not None for task in tasks.values())
    return {t: first + i for i, t in enumerate(tower_of(tasks)[first:])}


def needed_towers(tasks: dict[str, TaskConfig], outputs: list[str]) -> list[int]:
    """Towers, ascending, that the logits of `outputs` are made of, given all tasks that these are composed of as `outputs`.

    No imputation tower is among them. A `Funnel` of `outputs` alone composes what is left.

    >>> tasks = {"click": TaskConfig(label="c"), "buy": TaskConfig(label="b", product="click", debias=Debias.dr)}
    >>> needed_towers(tasks, ["click", "buy"])
    [0, 1]
    """
    kept = {t for t, name in enumerate(tasks) if name in outputs}
    imputing = set(imputation_towers(tasks).values())
    return [i for i, t in enumerate(tower_of(tasks)) if t in kept and i not in imputing]


class Funnel(nn.Module):
    """Composes the towers' logits into one logit a task. Imputation towers, which come last, may be there or not.

    Args:
        tasks: what the towers are of, see `tower_of`.
        outputs: the O tasks whose logits are given, in that order; by default all.
    """

    correction: Tensor

    def __init__(self, tasks: dict[str, TaskConfig], *, outputs: list[str] | None = None) -> None:
        super().__init__()
        names = list(tasks)
        self.outputs = [names.index(name) for name in outputs or names]
        self.products = [names.index(task.product) if task.product else None for task in tasks.values()]
        self.ways = [names.index(task.via) if task.via else None for task in tasks.values()]
        with_second = [t for t, way in enumerate(self.ways) if way is not None]
        self.second = {t: len(tasks) + i for i, t in enumerate(with_second)}
        composed = any(task.product or task.via for task in tasks.values())
        self.plain = not composed and self.outputs == [*range(len(tasks))]
        correction = [tasks[names[t]].correction for t in self.outputs]
        self.register_buffer("correction", torch.tensor(correction), persistent=False)

    def forward(self, towers: Tensor) -> Tensor:
        """[B, towers] -> [B, O]; outside training corrected to the log's own odds."""
        own = towers[:, : len(self.outputs)]  # all there is, less imputation towers
        logits = own if self.plain else torch.stack([self._logit(towers, t) for t in self.outputs], dim=1)
        return logits if self.training else logits + self.correction

    def _logit(self, towers: Tensor, task: int) -> Tensor:
        """[B], the task's logit, its product with those before it included."""
        own, before = self._step(towers, task), self.products[task]
        if before is None:
            return own
        log_p = logsigmoid(own) + logsigmoid(self._logit(towers, before))
        return log_p - log_complement(log_p)

    def _step(self, towers: Tensor, task: int) -> Tensor:
        """[B], the logit of the task given the one it is a product with."""
        way = self.ways[task]
        if way is None:
            return towers[:, task]
        cart, with_cart, without = towers[:, way], towers[:, task], towers[:, self.second[task]]
        paths = [torch.stack([logsigmoid(s * z) for s, z in path]) for path in self._paths(cart, with_cart, without)]
        yes, no = (path.unflatten(0, (2, 2)).sum(dim=1).logsumexp(dim=0) for path in paths)
        return yes - no

    @staticmethod
    def _paths(cart: Tensor, with_cart: Tensor, without: Tensor) -> list[list[tuple[int, Tensor]]]:
        """Signed logits whose logsigmoids add up to the two ways of a yes, and to the two ways of a no."""
        return [[(1, cart), (sign, with_cart), (-1, cart), (sign, without)] for sign in (1, -1)]


def log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p) of log(p) below 0, without losing digits at either end (Maechler 2012).

    >>> log_complement(torch.tensor([-1e-6, -50.0]).double())
    tensor([-1.3816e+01, -1.9287e-22], dtype=torch.float64)
    """
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).tiny)
    small = log_p < -0.6931
    # each branch sees only its own side, since the other's gradient is infinite there
    far, near = torch.where(small, log_p, -1.0), torch.where(small, -0.5, log_p)
    return torch.where(small, torch.log1p(-far.exp()), torch.log(-torch.expm1(near)))
