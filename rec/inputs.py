"""What the tables say, histories summarised for the candidate, and dense columns become one vector a row."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from rec.embeddings import Embedded
from rec.histories import HistoryConfig, build_history
from rec.schema import ConfigError, DataConfig, FeatureKind, nearest


def check_histories(histories: Sequence[HistoryConfig], data: DataConfig) -> None:
    """Refuse histories that are no sequences, or whose candidate is no id of the same table.

    Raises:
        ConfigError: naming the feature, what was expected, and the nearest that would do.
    """
    names = [history.feature for history in histories]
    for name, history in zip(names, histories, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"model.histories has '{name}' {names.count(name)} times, expected each feature once")
        where, feature = f"model.histories of '{name}'", data.features.get(name)
        if feature is None or feature.kind is not FeatureKind.sequence or feature.max_length is None:
            ordered = [n for n, f in data.features.items() if f.kind is FeatureKind.sequence and f.max_length]
            raise ConfigError(f"{where}: expected a sequence feature with a max_length; {nearest(name, ordered)}")
        table = data.table_of(name)
        ids = [n for n, f in data.sparse_features.items() if f.kind is FeatureKind.id and data.table_of(n) == table]
        if history.candidate not in ids:
            raise ConfigError(
                f"{where}: candidate is '{history.candidate}', expected an id feature that reads the history's table '{table}'; "
                f"{nearest(history.candidate, ids)}"
            )


class Inputs(nn.Module):
    """The features of one tower side by side.

    Args:
        data: description of the data set.
        names: the features that it reads.
        histories: the sequences among them that are summarised for a candidate; the others are pooled.
    """

    def __init__(self, data: DataConfig, names: Collection[str], *, histories: Sequence[HistoryConfig] = ()) -> None:
        super().__init__()
        self.sparse = [name for name in data.sparse_features if name in names]
        self.dense = [column for name, columns in data.dense_columns.items() if name in names for column in columns]
        dims = {name: data.tables[data.table_of(name)].embedding_dim for name in self.sparse}
        self.out_features = sum(dims.values()) + len(self.dense)
        self.every_column = self.dense == [*range(data.num_dense)]
        chosen = {config.feature: config for config in histories if config.feature in names}
        self.candidates = {name: config.candidate for name, config in chosen.items()}
        self.histories = nn.ModuleDict(
            {
                name: build_history(config, embedding_dim=dims[name], max_length=data.features[name].max_length or 1)
                for name, config in chosen.items()
            }
        )

    def forward(self, embedded: Embedded, dense: Tensor) -> Tensor:
        """B rows -> [B, d]: sparse features and then dense ones, in the order of the configuration."""
        summaries = {}
        for name, candidate in self.candidates.items():
            history = embedded.histories[name]
            summary = self.histories[name](history.values, history.mask, embedded.pooled[candidate])
            summaries[name] = summary.to(dense.dtype)
        parts = [summaries.get(name, embedded.pooled[name]) for name in self.sparse]
        return torch.cat([*parts, dense if self.every_column else dense[:, self.dense]], dim=1)
