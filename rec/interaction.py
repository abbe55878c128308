"""Explicit feature crosses: DCN-v2, full or low-rank (Wang et al., WWW 2021, equations 1 and 2)."""

from dataclasses import dataclass

from torch import nn
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet

from rec.schema import check_range


@dataclass
class InteractionConfig:
    """No crosses: the input passes through. Base of the other choices in `conf/interaction/`."""

    kind: str = "none"  # one of INTERACTION_KINDS


@dataclass
class DCNv2Config(InteractionConfig):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, with W_l [d, d]."""

    kind: str = "dcn_v2"
    num_layers: int = 2

    def __post_init__(self) -> None:
        check_range("model.interaction.num_layers", self.num_layers, 1, 100)


@dataclass
class LowRankDCNv2Config(InteractionConfig):
    """x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l, with V_l [r, d] and U_l [d, r]."""

    kind: str = "dcn_v2_low_rank"
    num_layers: int = 2
    low_rank: int = 64  # r, 1 to d; d / 4 kept the full form's accuracy in the paper

    def __post_init__(self) -> None:
        check_range("model.interaction.num_layers", self.num_layers, 1, 100)
        check_range("model.interaction.low_rank", self.low_rank, 1, 100_000)


INTERACTION_KINDS: dict[str, type[InteractionConfig]] = {
    "none": InteractionConfig,
    "dcn_v2": DCNv2Config,
    "dcn_v2_low_rank": LowRankDCNv2Config,
}


def build_interaction(config: InteractionConfig, in_features: int) -> nn.Module:
    """The module that `config` describes: [B, d] -> [B, d]."""
    if isinstance(config, LowRankDCNv2Config):
        return LowRankCrossNet(in_features, config.num_layers, low_rank=min(config.low_rank, in_features))
    if isinstance(config, DCNv2Config):
        return CrossNet(in_features, config.num_layers)
    return nn.Identity()
