"""The one-device network spread over ranks: tables by TorchRec's planner, everything else replicated.

TorchRec offers CPU ranks table-wise and column-wise sharding only, though row-wise works there as well; the sharders here offer
all kinds. Replicating tables (data_parallel) is left out: without a fused kernel its gradients are as large as the tables.

A column-wise piece of a row has a row-wise Adagrad accumulator of its own, so how a table is cut is part of what is trained.
Pieces therefore have a configured width, the same on any number of ranks, and `auto` chooses among kinds that keep rows whole.
"""

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.optim.keyed import KeyedOptimizer

from rec.embeddings import Embeddings
from rec.model import Ranker
from rec.optim import SparseConfig, fused_params
from rec.schema import ConfigError, ShardingType, check_range

_KINDS = [kind.name for kind in ShardingType if kind is not ShardingType.auto]
_OF_SEQUENCES = ["row_wise", "table_wise", "column_wise"]
_WHOLE_ROWS = ["row_wise", "table_wise", "table_row_wise"]
_INIT_ROWS = 4096  # rows of a table that are drawn together


@dataclass
class ShardingConfig:
    """Where tables live, and how they start."""

    default: ShardingType = (
        ShardingType.auto
    )  # of tables that do not say; auto: the planner's choice of kinds that keep rows whole
    column_width: int = 16  # columns of a piece, a multiple of 4, where a kind splits rows (column_wise, grid_shard)
    init_range: float = 0.05  # > 0; tables that do not say start uniform in +-init_range

    def __post_init__(self) -> None:
        check_range("sharding.init_range", self.init_range, 0, 1e3)
        if self.column_width < 4 or self.column_width % 4:
            raise ConfigError(f"sharding.column_width is {self.column_width}, expected a positive multiple of 4")


class _BagSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder of pooled tables, with every kind of sharding on every device."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return _KINDS


class _SequenceSharder(EmbeddingCollectionSharder):
    """TorchRec's sharder of tables that give a vector an id, with every kind that it has, on every device."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return _OF_SEQUENCES


def plan_tables(
    model: Ranker,
    config: ShardingConfig,
    *,
    sharders: list[ModuleSharder],
    device: torch.device,
    local_batch_size: int,
) -> ShardingPlan:
    """Let TorchRec's planner place every table, within the configuration's constraints. Ranks wait for each other here.

    Raises:
        ConfigError: the planner finds no place for some table.
    """
    world_size = dist.get_world_size()
    constraints = {}
    for name, table in model.embeddings.configs.items():
        kinds = _kinds(table.sharding or config.default, name, sequence=name in model.embeddings.in_sequences)
        constraints[name] = ParameterConstraints(
            sharding_types=kinds,
            compute_kernels=["fused"],
            min_partition=math.gcd(config.column_width, table.embedding_dim),
        )
    topology = Topology(
        world_size=world_size,
        local_world_size=local_world_size(),
        compute_device=device.type,
        hbm_cap=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=local_batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
    )
    try:
        return planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    except Exception as error:  # the planner's own class of error says why in many lines
        raise ConfigError(
            f"no place found for the tables on {world_size} {device.type} ranks; try sharding.default=row_wise, smaller tables or more "
            f"ranks. The planner said: {error}"
        ) from error


def _kinds(kind: ShardingType, table: str, *, sequence: bool) -> list[str]:
    if kind is ShardingType.auto:
        return [name for name in _WHOLE_ROWS if not sequence or name in _OF_SEQUENCES]
    if sequence and kind.name not in _OF_SEQUENCES:
        raise ConfigError(
            f"table '{table}' is read by an attended history and its sharding is {kind.name}, expected auto or one of "
            f"{', '.join(_OF_SEQUENCES)}; set data.tables.{table}.sharding"
        )
    return [kind.name]


def local_world_size() -> int:
    """Ranks on this host, as torchrun says; all of them without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def shard(
    model: Ranker,
    config: ShardingConfig,
    *,
    sparse: SparseConfig,
    device: torch.device,
    local_batch_size: int,
    seed: int,
) -> DistributedModelParallel:
    """Spread `model` (tables on the meta device) over the ranks of the process group and fill its tables.

    The weights depend on `seed` alone, not on world size or plan. Ranks wait for each other here.
    """
    fused = fused_params(sparse, device)
    sharders: list[ModuleSharder] = [_BagSharder(fused_params=fused), _SequenceSharder(fused_params=fused)]
    plan = plan_tables(model, config, sharders=sharders, device=device, local_batch_size=local_batch_size)
    parallel = DistributedModelParallel(
        module=model,
        env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        device=device,
        plan=plan,
        sharders=sharders,
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
    )
    init_tables(parallel.module.embeddings, config, seed=seed)
    return parallel


@torch.no_grad()
def init_tables(embeddings: Embeddings, config: ShardingConfig, *, seed: int) -> None:
    """Fill tables, sharded or whole, with values that depend on seed, table, row and column only."""
    for key, weight in embeddings.state_dict().items():
        name = key.split(".")[-2]
        table = embeddings.configs[name]
        limit = config.init_range if table.init_range is None else table.init_range
        for tensor, (row, column) in local_parts(weight):
            _fill(
                tensor,
                seed=zlib.crc32(name.encode()) + (seed << 32),
                row=row,
                column=column,
                width=table.embedding_dim,
                limit=limit,
            )


def local_parts(weight: Tensor | ShardedTensor) -> list[tuple[Tensor, Sequence[int]]]:
    """The pieces of a table that live here, each with the row and column where it begins."""
    if isinstance(weight, ShardedTensor):
        return [(part.tensor, part.metadata.shard_offsets) for part in weight.local_shards()]
    return [(weight, (0, 0))]


def _fill(part: Tensor, *, seed: int, row: int, column: int, width: int, limit: float) -> None:
    """Draw the table in runs of `_INIT_ROWS` whole rows, each from a generator of its own, and keep what lies in `part`."""
    generator = torch.Generator()
    for start in range(row // _INIT_ROWS * _INIT_ROWS, row + len(part), _INIT_ROWS):
        generator.manual_seed(hash((seed, start)) & 0x7FFF_FFFF_FFFF_FFFF)
        run = torch.empty(_INIT_ROWS, width).uniform_(-limit, limit, generator=generator)
        low, high = max(start, row), min(start + _INIT_ROWS, row + len(part))
        part[low - row : high - row] = run[low - start : high - start, column : column + part.shape[1]]


def describe_plan(parallel: DistributedModelParallel) -> dict[str, dict]:
    """Table -> how it is sharded, over which ranks, and its size in MiB; for the log."""
    described = {}
    for module in parallel.plan.plan.values():
        for name, sharding in module.items():
            shards = sharding.sharding_spec.shards if sharding.sharding_spec else []
            elements = sum(shard.shard_sizes[0] * shard.shard_sizes[1] for shard in shards)
            described[name] = {
                "sharding": sharding.sharding_type,
                "ranks": sharding.ranks,
                "mib": round(elements * 4 / 2**20, 3),
            }
    return described


def table_statistics(parallel: DistributedModelParallel, fused: KeyedOptimizer) -> dict[str, dict[str, float | None]]:
    """Table -> root mean square and largest absolute weight, and the share of its rows that were ever updated.

    The share is read off the optimizer's accumulators, None where it keeps none. Ranks wait for each other here.
    """
    weights = {key.split(".")[-2]: weight for key, weight in parallel.module.embeddings.state_dict().items()}
    accumulators: dict[str, Tensor | ShardedTensor] = {}
    for key, state in fused.state_dict()["state"].items():
        found = [value for name, value in state.items() if name.endswith("momentum1")]
        accumulators.update({key.split(".")[-2]: value for value in found[:1]})
    device = parallel.device
    sums, largest = (
        torch.zeros(len(weights), 4, dtype=torch.float64, device=device),
        torch.zeros(len(weights), device=device),
    )
    for i, name in enumerate(weights):
        for tensor, _ in local_parts(weights[name]):
            sums[i, 0] += tensor.numel()
            sums[i, 1] += tensor.double().square().sum()
            largest[i] = torch.maximum(largest[i], tensor.abs().max()) if tensor.numel() else largest[i]
        for tensor, _ in local_parts(accumulators[name]) if name in accumulators else []:
            sums[i, 2] += len(tensor)
            sums[i, 3] += (tensor.reshape(len(tensor), -1) != 0).any(dim=1).sum()
    dist.all_reduce(sums)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return {
        name: {
            "rms": (squares / max(1.0, count)) ** 0.5,
            "max_abs": top,
            "rows_trained": trained / rows if rows else None,
        }
        for name, (count, squares, rows, trained), top in zip(weights, sums.tolist(), largest.tolist(), strict=True)
    }
