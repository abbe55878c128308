"""The network as it is served: a program on plain tensors that needs torch alone, and a description of what they mean."""

import copy
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from rec.calibration import Calibrators
from rec.checkpoint import Info
from rec.columns import LISTS, TEXTS, is_any, plain_type
from rec.config import Config
from rec.embeddings import Embedded, Embeddings, padded
from rec.features import Batch
from rec.hashing import hash_ints, hash_strings
from rec.mixtures import GatedConfig
from rec.model import Ranker
from rec.schema import DataConfig, FeatureConfig, FeatureKind, TaskConfig, TaskKind

VERSION = 1  # of the description's format


class Served(nn.Module):
    """The network as it is served: plain tensors -> preds [B, S] float32 of the S served tasks.

    Args:
        ranker: filled with weights; it is pruned, and shares its weights with this module.
        data: description of the data set.
        calibrators: of the served tasks, in their order; None leaves logits as they are.
    """

    binary: Tensor  # [S] bool

    def __init__(self, ranker: Ranker, data: DataConfig, *, calibrators: Calibrators | None) -> None:
        super().__init__()
        ranker.prune(data)
        self.embeddings = LocalEmbeddings(ranker.embeddings)
        del ranker.embeddings  # of TorchRec, which a server need not have
        ranker.bf16 = False
        self.ranker = ranker
        self.calibrators = calibrators
        binary = [data.tasks[name].kind is TaskKind.binary for name in data.served_tasks]
        self.register_buffer("binary", torch.tensor(binary))
        self.eval().requires_grad_(False)

    def forward(
        self, values: dict[str, Tensor], lengths: dict[str, Tensor], dense: Tensor, domain_id: Tensor
    ) -> Tensor:
        """Predictions [B, S]: probabilities, of a regression the prediction.

        Args:
            values: feature -> ids of all rows [n] int64, one row after another.
            lengths: feature -> number of ids of each row [B] int64.
            dense: [B, F] float32.
            domain_id: [B] int64; what is no domain's number is calibrated by the curve of all rows.
        """
        embedded = self.embeddings(values, lengths)
        items = self.ranker.items(embedded, dense) if self.ranker.item_inputs else None
        return self.predict(embedded, dense, items=items, domain_id=domain_id)

    def predict(self, embedded: Embedded, dense: Tensor, *, items: Tensor | None, domain_id: Tensor) -> Tensor:
        """Predictions [B, S] of rows whose ids are embedded, and, with two towers, of items whose vectors [B, r] are known."""
        draws = domain_id.new_zeros(0, 2)  # only training reads them
        logits = self.ranker.score(embedded, dense, items=items, domain_id=domain_id, draws=draws).logits
        if self.calibrators is not None:
            logits = self.calibrators(logits, domain_id)
        return torch.where(self.binary, logits.sigmoid(), logits)


class LocalEmbeddings(nn.Module):
    """The same tables as plain tensors, read as `rec/embeddings.py` reads them.

    Args:
        embeddings: of one device, filled; the weights are shared with it.
    """

    def __init__(self, embeddings: Embeddings) -> None:
        super().__init__()
        self.table_of, self.linear_of = embeddings.table_of, embeddings.linear_of
        self.averaged, self.max_lengths = embeddings.averaged, embeddings.max_lengths
        weights = {key.split(".")[-2]: weight for key, weight in embeddings.named_parameters()}
        self.tables = nn.ParameterDict({name: weights[name] for name in embeddings.configs})

    def only(self, keys: list[str]) -> "LocalEmbeddings":
        """The same of some features, with their tables alone."""
        some = copy.copy(self)
        some.table_of = {key: self.table_of[key] for key in keys}
        some.linear_of = {key: table for key, table in self.linear_of.items() if key in keys}
        read = {*some.table_of.values(), *some.linear_of.values()}
        some._modules = {"tables": nn.ParameterDict({name: self.tables[name] for name in self.tables if name in read})}
        return some

    def forward(self, values: dict[str, Tensor], lengths: dict[str, Tensor]) -> Embedded:
        """Ids [n] and lengths [B] of each feature -> what the tables say of the rows."""
        pooled, histories, linear = {}, {}, {}
        for key, table in self.table_of.items():
            torch._assert_async(
                lengths[key].sum() == values[key].shape[0], f"lengths of '{key}' do not add up to its ids"
            )
            sums = self._sums(table, values[key], lengths[key])
            pooled[key] = sums / lengths[key].clamp(min=1).unsqueeze(1) if self.averaged[key] else sums
            if key in self.max_lengths:
                vectors = F.embedding(values[key], self.tables[table])
                histories[key] = padded(vectors, lengths[key], max_length=self.max_lengths[key])
            if key in self.linear_of:
                linear[key] = self._sums(self.linear_of[key], values[key], lengths[key])
        return Embedded(pooled, histories, linear)

    def _sums(self, table: str, values: Tensor, lengths: Tensor) -> Tensor:
        """[B, D], the sum of each row's vectors."""
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        return F.embedding_bag(values, self.tables[table], offsets, mode="sum", include_last_offset=True)


def to_program(served: Served, *, num_dense: int) -> ExportedProgram:
    """The network as a program that needs none of this project's code, for any number of rows and of ids."""
    rows, batch = 3, Dim("batch", min=1)
    ids = {key: Dim(f"ids_{i}", min=0) for i, key in enumerate(served.embeddings.table_of)}
    inputs = {
        "values": {key: torch.zeros(4, dtype=torch.int64) for key in ids},
        "lengths": {key: torch.tensor([1, 0, 3]) for key in ids},
        "dense": torch.zeros(rows, num_dense),
        "domain_id": torch.zeros(rows, dtype=torch.int64),
    }
    shapes = {
        "values": {key: {0: count} for key, count in ids.items()},
        "lengths": {key: {0: batch} for key in ids},
        "dense": {0: batch},
        "domain_id": {0: batch},
    }
    return torch.export.export(served, (), inputs, dynamic_shapes=shapes)


def inputs_of(batch: Batch, num_rows: int) -> dict[str, Any]:
    """The first `num_rows` rows of a batch, at most those it has, as `Served` takes them."""
    num_rows = min(num_rows, batch.num_rows)
    values, lengths = {}, {}
    for key in batch.sparse_features.keys():  # noqa: SIM118 - it is no dict
        feature = batch.sparse_features[key]
        lengths[key] = feature.lengths()[:num_rows].long()
        values[key] = feature.values()[: int(lengths[key].sum())]
    dense, domain_id = batch.dense[:num_rows], batch.domain_id[:num_rows]
    return {"values": values, "lengths": lengths, "dense": dense, "domain_id": domain_id}


# ---- its description


def describe(config: Config, *, types: pa.Schema, info: Info, path: Path, calibrators: Calibrators | None) -> dict:
    """What `schema.json` says, less the check.

    Args:
        config: of the run.
        types: columns of the files.
        info: of the checkpoint.
        path: of the checkpoint.
        calibrators: those in the program.
    """
    data, experts = config.data, config.model.experts
    served = data.served_tasks
    calibrated = calibrators.calibrated if calibrators else []
    composed = {name for task in served for name in data.funnel(task)} - set(served)
    return {
        "version": VERSION,
        "data": data.name,
        "checkpoint": {"name": path.name, "step": info.step, "rows": info.rows},
        "inputs": {
            "values": "feature -> [n] int64, ids of all rows, one row after another; n from 0",
            "lengths": "feature -> [B] int64, number of ids of each row, adding up to n; B from 1",
            "dense": f"[B, {data.num_dense}] float32, the columns of `dense` side by side",
            "domain_id": "[B] int64, position in `domains`; any other number takes the calibration of all rows",
        },
        "features": {name: _sparse(data, name, types) for name in data.sparse_features},
        "dense": _dense(data),
        "transforms": {"log1p": "sign(x) * log(1 + |x|)"},
        "domains": data.domains,
        "domain_column": data.domain.column if data.domain else None,
        "hashes": _hashes(),
        "output": f"[B, {len(served)}] float32, a column for each of `tasks`, in their order",
        "tasks": {name: _task(data.tasks[name]) | {"calibrated": name in calibrated} for name in served},
        "network": {
            "precision": "float32",
            "trained_in": "bfloat16" if config.model.bf16 else "float32",
            "gate_temperature": experts.temperature if isinstance(experts, GatedConfig) else None,
            "kept_for_others": [name for name in data.tasks if name in composed],
            "pruned": [name for name in data.tasks if name not in composed | set(served)],
        },
        "calibration": _calibration(calibrators) if calibrators else None,
    }


def _sparse(data: DataConfig, name: str, types: pa.Schema) -> dict[str, Any]:
    feature, table = data.features[name], data.table_of(name)
    num_embeddings = data.tables[table].num_embeddings
    kind = plain_type(types.field(data.column_of(name)).type)
    of_ids = plain_type(kind.value_type) if is_any(kind, LISTS) else kind
    hashed = ("strings" if is_any(of_ids, TEXTS) else "integers") if feature.hashed else None
    return {
        "column": data.column_of(name),
        "column_type": str(kind),
        "kind": feature.kind.name,
        "ids": f"hash(id) modulo {num_embeddings}" if hashed else f"0 to {num_embeddings - 1}, as they are",
        "hash": hashed,
        "max_length": 1 if feature.kind is FeatureKind.id else feature.max_length,
        "longer": None if feature.max_length is None else "the last max_length ids are taken",
        "null": _null(feature, "no ids"),
        "invalid": "no id" if feature.allow_invalid else "not expected",
        "table": table,
        "num_embeddings": num_embeddings,
        "embedding_dim": data.tables[table].embedding_dim,
    }


def _dense(data: DataConfig) -> dict[str, dict[str, Any]]:
    found, first = {}, 0
    for name, feature in data.dense_features.items():
        size = feature.size if feature.kind is FeatureKind.vector else 1
        found[name] = {
            "column": data.column_of(name),
            "kind": feature.kind.name,
            "columns": [*range(first, first + size)],
            "transform": feature.transform.name,
            "null": _null(feature, "zeros" if size > 1 else "0"),
            "invalid": "0" if feature.allow_invalid else "not expected",
        }
        first += size
    return found


def _null(feature: FeatureConfig, becomes: str) -> str:
    return becomes if feature.allow_null else "not expected"


def _task(task: TaskConfig) -> dict[str, Any]:
    binary = task.kind is TaskKind.binary
    return {
        "label": task.label,
        "kind": task.kind.name,
        "meaning": ("probability" if binary else "prediction") + (f" given {task.condition}" if task.condition else ""),
        "label_transform": task.label_transform.name,  # a regression predicts the transformed label
        "product_with": task.product,  # a factor of the probability already
    }


def _hashes() -> dict[str, Any]:
    """The functions of `rec/hashing.py`, with values to test another implementation against."""
    numbers, texts = [0, 7, -1], ["", "query", "größe"]
    return {
        "integers": (
            "x = id modulo 2**64, then x += 0x9E3779B97F4A7C15, x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9, "
            "x = (x ^ x >> 27) * 0x94D049BB133111EB, x ^= x >> 31, all modulo 2**64 (SplitMix64)"
        ),
        "strings": (
            "the hash of the integer n + sum of (b[i] + 1) * 1099511628211**i modulo 2**64, over the n bytes b of the UTF-8 string"
        ),
        "examples": {
            "integers": dict(zip(map(str, numbers), map(str, hash_ints(torch.tensor(numbers).numpy())), strict=True)),
            "strings": dict(zip(texts, map(str, hash_strings(pa.array(texts))), strict=True)),
        },
    }


def _calibration(calibrators: Calibrators) -> dict[str, Any]:
    fitted = calibrators.fitted_on_
    own = {name: of.domains for name, of in calibrators.cells_.items() if name in calibrators.calibrated}
    return {
        "kind": calibrators.config.kind.name,
        "fitted_on": vars(fitted),
        "domains": {name: [d for d, cell in cells.items() if cell.has_curve] for name, cells in own.items()},
    }
