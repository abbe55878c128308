"""Widen one network to another's size, so that a comparison compares architectures and not numbers of weights.

    python -m rec.widen experiment=etsy_shared_bottom --like experiment=etsy_mmoe

prints the setting that brings the dense weights of the first configuration as near as can be to those of the second.
"""

import argparse
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from rec.config import Config, compose
from rec.model import Ranker
from rec.schema import ConfigError

_WIDEST = 2**20


def dense_parameters(config: Config) -> int:
    """Weights of the network but for its tables; nothing is allocated."""
    with torch.device("meta"):
        model = Ranker(config.model, config.data)
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings."))


def closest_width(count: Callable[[int], int], target: int) -> int:
    """The width from 1 on whose `count`, which grows with the width, is closest to `target`.

    >>> closest_width(lambda width: 100 * width + width * width, 13056)
    75
    """
    above = bisect_left(range(1, _WIDEST), target, key=count) + 1
    return min((width for width in (above - 1, above) if width >= 1), key=lambda width: abs(count(width) - target))


def widened(config: Config, *, target: int) -> list[int]:
    """`model.experts.layer_sizes`, scaled to bring `dense_parameters` closest to `target`.

    The last width stays, since towers read it, unless it is the only one.

    Raises:
        ConfigError: the other parts alone have more weights.
    """
    sizes = list(config.model.experts.layer_sizes)
    free = max(1, len(sizes) - 1)
    largest = max(sizes[:free])

    def scaled(width: int) -> list[int]:
        return [max(1, round(size * width / largest)) for size in sizes[:free]] + sizes[free:]

    def count(width: int) -> int:
        config.model.experts.layer_sizes = scaled(width)
        return dense_parameters(config)

    try:
        if count(1) > target:
            raise ConfigError(
                f"with experts 1 wide there are {count(1):,} dense weights already, expected at most {target:,}"
            )
        return scaled(closest_width(count, target))
    finally:
        config.model.experts.layer_sizes = sizes


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    p = argparse.ArgumentParser(
        prog="python -m rec.widen", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("overrides", nargs="+", help="the configuration to widen, as overrides of conf/config.yaml")
    p.add_argument(
        "--like", nargs="+", required=True, metavar="override", help="the configuration whose size it shall have"
    )
    p.add_argument("--config-dir", help="a folder laid out like conf/, searched as well")
    args = p.parse_intermixed_args(argv)
    try:
        config = compose(args.overrides, config_dir=args.config_dir)
        target = dense_parameters(compose(args.like, config_dir=args.config_dir))
        before, sizes = dense_parameters(config), widened(config, target=target)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    config.model.experts.layer_sizes = sizes
    print(f"model.experts.layer_sizes={str(sizes).replace(' ', '')}")
    said = f"{before:,} -> {dense_parameters(config):,} dense weights; {' '.join(args.like)} has {target:,}"
    print(said, file=sys.stderr)  # apart from the setting, which a script may take as it is


if __name__ == "__main__":
    main()
