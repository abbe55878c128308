"""What a data set is: its columns, the tables they feed, its tasks. Described once, in `conf/data/<name>.yaml`.

Everything downstream (reader, features, embeddings, towers, losses, metrics) is built from a `DataConfig`, so adding a
column or a task is a change of YAML. This module imports neither torch nor Arrow.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class ConfigError(ValueError):
    """A configuration that cannot be run: the message names the key, its value, what was expected and the fix."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Words that send a misspelt `name` to the nearest of the `valid` names.

    >>> nearest("listng", ["query", "listing", "user"])
    "did you mean 'listing'? valid: listing, query, user"
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}valid: {', '.join(names) or 'none'}"


def check_range(where: str, value: float | None, low: float, high: float) -> None:
    """Raise `ConfigError` unless `value` is None or `low <= value <= high`."""
    if value is not None and not low <= value <= high:
        raise ConfigError(f"{where} is {value}, expected a value from {low} to {high}")


class FeatureKind(Enum):
    """What one input column holds, row by row."""

    id = "id"  # one id
    bag = "bag"  # a list of ids, in no order
    sequence = "sequence"  # a list of ids, newest last
    dense = "dense"  # one float
    vector = "vector"  # a list of `size` floats (a text embedding)


SPARSE_KINDS = (FeatureKind.id, FeatureKind.bag, FeatureKind.sequence)


class Transform(Enum):
    """What is done to a dense value before the network sees it."""

    none = "none"
    log1p = "log1p"  # sign(x) * log(1 + |x|)


@dataclass
class FeatureConfig:
    """One input column."""

    kind: FeatureKind = MISSING
    column: str | None = None  # column in the files; default: the feature's name
    table: str | None = None  # sparse kinds: the table it reads; default: the feature's name
    hashed: bool = False  # sparse kinds: hash every id into the table (strings need it); else ids are rows of the table
    allow_null: bool = False  # a null is no id (sparse) or 0 (dense), counted; else it is an error
    allow_invalid: bool = False  # an id outside its table is no id, NaN and infinity are 0, counted; else an error
    dropout: float = 0.0  # sparse kinds, 0 to 1: share of training rows that lose this feature's ids
    max_length: int | None = None  # bag, sequence: ids kept a row (the newest, which are the last)
    size: int = 1  # vector: floats a row
    transform: Transform = Transform.none  # dense, vector

    def __post_init__(self) -> None:
        check_range("a feature's dropout", self.dropout, 0, 1)
        check_range("a feature's max_length", self.max_length, 1, 1_000_000)
        check_range("a feature's size", self.size, 1, 1_000_000)
        if self.hashed and self.allow_invalid:
            raise ConfigError(
                "a feature has hashed and allow_invalid: a hash is always in its table; remove allow_invalid"
            )


class Pooling(Enum):
    """How the embeddings of a row's ids become one vector. A property of the table, as in TorchRec."""

    mean = "mean"
    sum = "sum"


class ShardingType(Enum):
    """Where a table's shards may live; `auto` leaves it to the planner."""

    auto = "auto"
    row_wise = "row_wise"
    table_wise = "table_wise"
    column_wise = "column_wise"
    table_row_wise = "table_row_wise"
    grid_shard = "grid_shard"


@dataclass
class TableConfig:
    """One embedding table, which several features may share."""

    num_embeddings: int = MISSING  # rows
    embedding_dim: int = 32  # columns, a multiple of 4
    pooling: Pooling = Pooling.mean
    sharding: ShardingType | None = None  # default: `sharding.default`
    init_range: float | None = None  # weights start uniform in +-init_range; default: embeddings.init_range
    lr_factor: float = 1.0  # >= 0; optim.sparse.lr times this: 0 freezes the table, below 1 slows it down

    def __post_init__(self) -> None:
        check_range("a table's num_embeddings", self.num_embeddings, 1, 2**40)
        check_range("a table's lr_factor", self.lr_factor, 0, 1e3)
        if self.embedding_dim < 4 or self.embedding_dim % 4:
            raise ConfigError(f"a table's embedding_dim is {self.embedding_dim}, expected a positive multiple of 4")


class TaskKind(Enum):
    """What a task predicts."""

    binary = "binary"  # a probability; labels in [0, 1]
    regression = "regression"  # a real number


class Scale(Enum):
    """What two predictions are compared in."""

    probability = "probability"
    log = "log"  # the probability's logarithm, in which rare events count as much as frequent ones


class Debias(Enum):
    """How a step that only clicked rows show is learned over all rows (ESCM2, Wang et al., SIGIR 2022)."""

    none = "none"
    ips = "ips"  # clicked rows weigh 1 / p(click)
    dr = "dr"  # doubly robust: the same of what a tower that imputes the loss leaves over


@dataclass
class TaskConfig:
    """One thing to predict."""

    label: str = MISSING  # column in the files
    kind: TaskKind = TaskKind.binary
    condition: str | None = None  # another task: only rows where its label is positive count (purchase given click)
    loss_weight: float = 1.0  # >= 0
    weight: str | None = None  # column with a weight a row for this task, >= 0
    allow_null: bool = False  # rows with a null label do not count for this task (counted); else it is an error
    truth: str | None = None  # column of true probabilities (a product's: of its step), or several joined by " * "
    auxiliary: bool = False  # trained for the sake of the others: evaluated, but neither calibrated nor served
    positive_weight: float = 1.0  # > 0, binary; what a positive weighs in the loss; the probability is corrected for it
    negatives_kept: float = 1.0  # above 0 to 1, binary; share of negatives that each step keeps; corrected for as well
    negatives_logged: float = 1.0  # above 0 to 1, binary; share of negatives in the training files; corrected for
    product: str | None = None  # another task: the probability is that one's times the tower's, on every row (ESMM)
    via: str | None = None  # another task on the way: its tower splits this one's into with and without it (ESM2)
    label_transform: Transform = Transform.none  # regression
    domains: list[str] | None = None  # domains in which the task exists: rows elsewhere do not count; null: all
    teacher: bool = False  # binary; the label is another model's probability; the loss is KL(label || prediction)
    align: float = 0.0  # >= 0, of a teacher's task: weight of |log p - log label| in its loss, over labels above 0
    at_most: str | None = None  # binary; another task, whose probability this one's should not exceed (AITM)
    at_most_weight: float = 0.6  # >= 0; weight of the excess in this task's loss
    at_most_of: Scale = Scale.probability  # what the excess is measured in
    debias: Debias = Debias.none  # binary, with condition (replaces its loss) or product (is added to its loss)
    debias_weight: float = 1.0  # >= 0; weight of the loss that `debias` estimates
    propensity_floor: float = 1 / 15  # above 0 to 1; p(click) is taken as no less, so that no row counts for too much

    def __post_init__(self) -> None:
        check_range("a task's positive_weight", self.positive_weight, 1e-6, 1e6)
        for key in ("negatives_kept", "negatives_logged", "propensity_floor"):
            check_range(f"a task's {key}", getattr(self, key), 1e-9, 1)
        for key in ("loss_weight", "align", "at_most_weight", "debias_weight"):
            check_range(f"a task's {key}", getattr(self, key), 0, 1e9)
        for words, wrong in self._contradictions().items():
            if wrong:
                raise ConfigError(f"the task on '{self.label}' {words}")

    def _contradictions(self) -> dict[str, object]:
        """Words that refuse what cannot be asked of one task -> whether it is asked."""
        of_binary = (self.correction, self.product, self.via, self.teacher, self.at_most, self.is_debiased)
        return {
            "is a regression: positive_weight, negatives_kept, negatives_logged, product, via, teacher, at_most and debias "
            "belong to binary tasks": self.kind is TaskKind.regression and any(of_binary),
            f"has condition '{self.condition}' and product '{self.product}': a product is trained on every row; remove one of "
            "them": self.product and self.condition,
            f"has align {self.align:g} and no teacher; set teacher=true or align=0": self.align and not self.teacher,
            "has a teacher, whose labels are probabilities of every row: positive_weight, negatives_kept and negatives_logged "
            "must be 1, and debias none": self.teacher and (self.correction or self.is_debiased),
            f"has debias {self.debias.name}, which needs a condition or a product, and no via; set "
            "debias=none": self.is_debiased and (not self.given or self.via),
        }

    @property
    def given(self) -> str | None:
        """The task whose positives this one's own step is taken from; None for a task of every row."""
        return self.condition or self.product

    @property
    def is_debiased(self) -> bool:
        """Whether its step is learned over the rows of the task that it is `given`."""
        return self.debias is not Debias.none

    @property
    def truth_columns(self) -> list[str]:
        """Columns whose product is the true probability.

        >>> TaskConfig(label="bought", truth="true_click * true_purchase").truth_columns
        ['true_click', 'true_purchase']
        """
        return [column.strip() for column in self.truth.split(" * ")] if self.truth else []

    @property
    def correction(self) -> float:
        """What to add to the logit so that it is of the log's own odds, not of those that the loss saw.

        A kept share w of negatives multiplies the odds by 1 / w, a positive weight by itself.

        >>> TaskConfig(label="click", negatives_kept=0.5, positive_weight=2.0).correction
        -1.3862943611198906
        """
        return math.log(self.negatives_kept * self.negatives_logged / self.positive_weight)


@dataclass
class DomainConfig:
    """The business surface a row was shown on: ad placement, tab, platform."""

    column: str = MISSING  # integers 0 to len(names) - 1, or strings among `names`
    names: list[str] = field(default_factory=list)
    allow_unknown: bool = False  # null and what is not among `names` become domain -1, counted; else it is an error

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ConfigError(f"data.domain.names is {self.names}, expected at least one name and none twice")


@dataclass
class DataConfig:
    """One data set: where it lies, how it is split, what its columns mean."""

    name: str = MISSING
    path: str = MISSING  # folder, or URI of one that Arrow's filesystems can open
    splits: dict[str, str] = field(default_factory=dict)  # split name -> glob or folder below `path`
    features: dict[str, FeatureConfig] = field(default_factory=dict)
    tables: dict[str, TableConfig] = field(default_factory=dict)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    leave_out: list[str] = field(default_factory=list)  # features that the network does not get
    learn: list[str] | None = None  # the tasks to train, in this order; null: all of them
    domain: DomainConfig | None = None
    group: str | None = None  # column of the group for group AUC (the query, the user): integers or strings
    weight: str | None = None  # column with a weight a row for all tasks, >= 0

    def __post_init__(self) -> None:
        if not self.features or not self.tasks:
            raise ConfigError(
                f"data set '{self.name}' has {len(self.features)} features and {len(self.tasks)} tasks: describe at least one of each"
            )
        self._leave_out()
        for name, feature in self.features.items():
            if feature.kind in SPARSE_KINDS:
                table = self.table_of(name)
                if table not in self.tables:
                    raise ConfigError(
                        f"data.features.{name} reads table '{table}', which data.tables lacks: {nearest(table, self.tables)}"
                    )
            elif feature.table or feature.hashed or feature.dropout:
                raise ConfigError(
                    f"data.features.{name} is {feature.kind.name}: table, hashed and dropout belong to id, bag and sequence"
                )
        self._check_hashing()
        self._choose_tasks()
        self._check_tasks()
        self._check_funnel()
        if not self.served_tasks:
            raise ConfigError("every task of data.tasks is auxiliary; leave one that is served")
        unread = set(self.tables) - {self.table_of(n) for n in self.sparse_features}
        if unread:
            raise ConfigError(
                f"data.tables {sorted(unread)}: no feature reads them; remove them or name them in a feature's table"
            )

    def _leave_out(self) -> None:
        """Drop the features in `leave_out`, and the tables that only they read."""
        for name in self.leave_out:
            if name not in self.features:
                raise ConfigError(f"data.leave_out has '{name}'; {nearest(name, self.features)}")
        dropped = {self.table_of(name) for name in self.leave_out}
        self.features = {name: f for name, f in self.features.items() if name not in self.leave_out}
        kept = {self.table_of(name) for name in self.sparse_features}
        self.tables = {name: table for name, table in self.tables.items() if name in kept or name not in dropped}
        self.leave_out = []  # done: the configuration of a run describes what is left

    def _check_hashing(self) -> None:
        """Refuse features of one table of which some hash their ids: an id would have two rows."""
        first: dict[tuple[str, bool], str] = {}
        for name, feature in self.sparse_features.items():
            table = self.table_of(name)
            first.setdefault((table, feature.hashed), name)
            if other := first.get((table, not feature.hashed)):
                raise ConfigError(
                    f"data.features.{name}.hashed is {feature.hashed} and data.features.{other}.hashed {not feature.hashed}, but both "
                    f"read table '{table}', where an id would have two rows: set both alike, or give each a table"
                )

    def _choose_tasks(self) -> None:
        """Leave only the tasks in `learn`."""
        if self.learn is None:
            return
        for name in self.learn:
            if name not in self.tasks:
                raise ConfigError(f"data.learn names task '{name}'; {nearest(name, self.tasks)}")
        if len(set(self.learn)) < max(1, len(self.learn)):
            raise ConfigError(f"data.learn is {self.learn}, expected at least one task and none twice")
        self.tasks = {name: self.tasks[name] for name in self.learn}

    def _check_tasks(self) -> None:
        """Refuse tasks that name no other task, or none of the right kind, and domains that there are not."""
        every, binary = set(self.tasks), {n for n, task in self.tasks.items() if task.kind is TaskKind.binary}
        for name, task in self.tasks.items():
            fit = binary if task.is_debiased else every
            for key, among in (("condition", fit), ("product", binary), ("via", binary), ("at_most", binary)):
                other = getattr(task, key)
                if other is not None and other not in among - {name}:
                    kind = "another task" if among is every else "another binary task"
                    words = f"is '{other}', expected {kind}: {nearest(other, among - {name})}"
                    raise ConfigError(f"data.tasks.{name}.{key} {words}")
            self._check_domains(name, task)
            if task.is_debiased:
                self._check_debias(name, task)

    def _check_domains(self, name: str, task: TaskConfig) -> None:
        names = self.domain.names if self.domain else []
        for domain in task.domains or []:
            if domain not in names:
                raise ConfigError(
                    f"data.tasks.{name}.domains has '{domain}'; data.domain.names: {nearest(domain, names)}"
                )
        if task.domains is not None and len(set(task.domains)) < max(1, len(task.domains)):
            raise ConfigError(f"data.tasks.{name}.domains is {task.domains}, expected at least one and none twice")

    def _check_debias(self, name: str, task: TaskConfig) -> None:
        assert task.given is not None
        click = self.tasks[task.given]
        if task.correction or click.correction:
            raise ConfigError(
                f"data.tasks.{name} has debias {task.debias.name}, whose propensity is p({task.given}): positive_weight, "
                f"negatives_kept and negatives_logged must be 1 on it and on {task.given}"
            )
        if task.domains is not None and set(task.domains) != set(click.domains or []):
            raise ConfigError(
                f"data.tasks.{name} has debias {task.debias.name} and exists in other domains than {task.given}; give both the same"
            )

    def _check_funnel(self) -> None:
        """Refuse products and ways that come back to where they began, or mix unlike tasks."""
        for name, task in self.tasks.items():
            way = self.tasks[task.via] if task.via else None
            if way and (task.product, task.condition) != (way.product, way.condition):
                raise ConfigError(
                    f"data.tasks.{name}.via is '{task.via}', which has another product or condition; give both tasks the same"
                )
            if way and way.via:
                raise ConfigError(
                    f"data.tasks.{name}.via is '{task.via}', which goes via another task itself; expected one step"
                )
            if (task.product or task.via) and (
                task.correction or any(self.tasks[t].correction for t in self.funnel(name)[1:])
            ):
                raise ConfigError(
                    f"data.tasks.{name} is a product or goes via another task: positive_weight, negatives_kept and "
                    f"negatives_logged must be 1 on it and on {', '.join(self.funnel(name)[1:])}; weigh tasks with loss_weight"
                )

    def funnel(self, task: str) -> list[str]:
        """`task`, what it is a product with or goes via, and so on.

        Raises:
            ConfigError: it comes back to a task that it has been at.
        """
        found, ahead = [task], [task]
        while ahead:
            config = self.tasks[ahead.pop()]
            for other in (config.product, config.via):
                if other == task:
                    raise ConfigError(
                        f"data.tasks.{task}: product and via lead back to it; expected a funnel without a circle"
                    )
                if other is not None and other not in found:
                    found.append(other)
                    ahead.append(other)
        return found

    @property
    def served_tasks(self) -> list[str]:
        """Tasks that are calibrated and served: all but the auxiliary ones."""
        return [name for name, task in self.tasks.items() if not task.auxiliary]

    @property
    def sparse_features(self) -> dict[str, FeatureConfig]:
        """Features that read tables, in the order of the configuration."""
        return {n: f for n, f in self.features.items() if f.kind in SPARSE_KINDS}

    @property
    def dense_features(self) -> dict[str, FeatureConfig]:
        """Features that are floats, in the order of the configuration."""
        return {n: f for n, f in self.features.items() if f.kind not in SPARSE_KINDS}

    @property
    def num_dense(self) -> int:
        """Width of the dense input [B, F]: one a dense column, `size` a vector."""
        return sum(f.size if f.kind is FeatureKind.vector else 1 for f in self.dense_features.values())

    @property
    def dense_columns(self) -> dict[str, list[int]]:
        """Dense feature -> its columns in the dense input."""
        found: dict[str, list[int]] = {}
        for name, feature in self.dense_features.items():
            first = sum(map(len, found.values()))
            found[name] = [*range(first, first + (feature.size if feature.kind is FeatureKind.vector else 1))]
        return found

    @property
    def domains(self) -> list[str]:
        """Names of the domains; one, `all`, where the data set has none."""
        return self.domain.names if self.domain else ["all"]

    def table_of(self, feature: str) -> str:
        """Name of the table that `feature` reads."""
        return self.features[feature].table or feature

    def column_of(self, feature: str) -> str:
        """Name of the column that `feature` is read from."""
        return self.features[feature].column or feature
