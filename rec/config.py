"""One typed, validated `Config` from YAML and overrides.

The dataclasses stand beside the classes they build; this module composes them. Hydra composes `conf/` over the schema, so a
misspelt or mistyped key is refused before anything runs, with the nearest valid name. A run's resolved `config.yaml` loads
back into the same types: where a section has several (the experts, say), its `kind` tells which.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rec.checkpoint import CheckpointConfig
from rec.data import ReaderConfig
from rec.experts import EXPERTS_KINDS
from rec.interaction import INTERACTION_KINDS
from rec.metrics import MetricsConfig
from rec.model import ModelConfig
from rec.optim import OptimConfig
from rec.schema import ConfigError, DataConfig, nearest
from rec.sharding import ShardingConfig
from rec.trainer import TrainerConfig

CONF = Path(__file__).resolve().parents[1] / "conf"

# Sections with several types: where they lie, the group that chooses, and `kind` -> type.
_CHOICES: dict[str, tuple[str, dict[str, type]]] = {
    "model.experts": ("experts", EXPERTS_KINDS),
    "model.interaction": ("interaction", INTERACTION_KINDS),
}


@dataclass
class Config:
    """Everything that a run is made from."""

    seed: int = 0  # weights, order of rows, dropped ids
    run_dir: str | None = None  # folder of the run's logs and checkpoints; default: runs/<time>_<id of the launch>
    data: DataConfig = MISSING
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def _schema(kind: type) -> DictConfig:
    """The untouched schema of a dataclass: its defaults, not yet validated, so that parts of it may still be missing."""
    return OmegaConf.structured(kind)


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="data", name="base", node=DataConfig, package="data")
    for package, (group, kinds) in _CHOICES.items():
        for name, kind in kinds.items():
            store.store(group=group, name=f"base_{name}", node=kind, package=package)


_register()


def compose(overrides: Sequence[str] = (), *, config_dir: str | None = None) -> Config:
    """The configuration that `conf/config.yaml` and Hydra `overrides` give.

    Args:
        overrides: as on the command line, e.g. `["experts=mmoe", "trainer.max_steps=100"]`.
        config_dir: a folder laid out like `conf/`, searched as well.

    Raises:
        ConfigError: a key or choice that does not exist (with the nearest that does), a value of the wrong type or out of range.

    """
    return to_typed(compose_dict(overrides, config_dir=config_dir))


def compose_dict(overrides: Sequence[str] = (), *, config_dir: str | None = None) -> DictConfig:
    """As `compose`, but the OmegaConf tree, its values not yet checked against each other."""
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    for override in overrides:
        if override.lstrip("+~").startswith(("hydra.", "hydra/")):
            raise ConfigError(f"'{override}': a run takes no Hydra settings; set run_dir=DIR to choose its folder")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="rec"):
        try:
            return hydra_compose("config", overrides=[*overrides, *search])
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_explain(error)) from error


def to_typed(tree: DictConfig) -> Config:
    """The dataclasses that a composed tree describes, each validated.

    Raises:
        ConfigError: a missing or out-of-range value.

    """
    try:
        config = OmegaConf.to_object(tree)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{_first_line(error)}: give it a value (key=value, or in the YAML)") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(config, Config)
    return config


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load` reads."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(plain(config))))


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run, read from its `config.yaml`, with `key=value` changes.

    Raises:
        ConfigError: no such file, or a key or value that does not fit.

    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: is run_dir the folder of a run?")
    tree = _schema(Config)
    changes = OmegaConf.load(path)
    assert isinstance(changes, DictConfig)
    merged: DictConfig | ListConfig | None = None
    try:
        for package, (_, kinds) in _CHOICES.items():
            kind = OmegaConf.select(changes, package).kind
            if kind not in kinds:
                raise ConfigError(f"{path}: {package}.kind is '{kind}'; {nearest(kind, kinds)}")
            OmegaConf.update(tree, package, _schema(kinds[kind]), merge=False)
        merged = OmegaConf.merge(tree, changes)
        OmegaConf.set_struct(merged, True)
        merged.merge_with_dotlist(list(overrides))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, merged)) from error
    assert isinstance(merged, DictConfig)
    return to_typed(merged)


def plain(value: Any) -> Any:
    """Dataclasses as dicts and enum members as their names."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _explain(error: BaseException, tree: DictConfig | ListConfig | None = None) -> str:
    """One sentence on a composition error, with the nearest valid name where a name is at fault."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    key = str(getattr(cause, "full_key", "") or "")
    at_fault = re.search(r"[Kk]ey '([^']+)'", str(cause or error))
    if cause is not None and at_fault:
        parent, _, name = (key or at_fault[1]).rpartition(".")
        return f"no setting '{key or name}'; {nearest(name, _names_at(parent, cause, tree))}"
    if cause is not None:
        return f"{key}: {_first_line(cause)}" if key else _first_line(cause)
    missing = re.search(r"(?:Could not find|Cannot find primary config) '([^']+)'", str(error))
    if missing and "/" in missing[1]:
        group, _, option = missing[1].rpartition("/")
        options = [line.strip() for line in re.findall(r"^\t(\S+)$", str(error), re.M)]
        return f"no {group} '{option}'; {nearest(option, [o for o in options if not o.startswith('base')])}"
    no_group = re.search(r"Could not override '([^']+)'", str(error))
    if no_group:
        return f"no setting or group '{no_group[1]}'; {nearest(no_group[1], {*_groups(), *(f.name for f in fields(Config))})}"
    return str(error)


def _names_at(parent: str, cause: OmegaConfBaseException, tree: DictConfig | ListConfig | None) -> list[str]:
    """Valid names beside a misspelt one."""
    node = cause.parent_node if isinstance(getattr(cause, "parent_node", None), DictConfig) else None
    if node is None and tree is not None:
        node = OmegaConf.select(tree, parent) if parent else tree
    names = [str(name) for name in node] if isinstance(node, DictConfig) else [f.name for f in fields(Config)]
    return [name for name in names if name != "hydra"] + ([] if parent else [g for g in _groups() if g not in names])


def _groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def main(run: Callable[[Config], None], *, about: str) -> None:
    """Parse the command line of `python -m rec.train`, compose, and run.

    Args:
        run: what to do with the configuration.
        about: text above the help.

    """
    args, overrides = parse(sys.argv[1:], about=about)
    if args.multirun:
        from rec.sweep import sweep

        return sweep(overrides, config_dir=args.config_dir)
    if args.cfg:
        print(OmegaConf.to_yaml(OmegaConf.create(plain(compose(overrides, config_dir=args.config_dir)))), end="")
        return None
    return run(compose(overrides, config_dir=args.config_dir))


def parse(argv: Sequence[str], *, about: str) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and the overrides beside them."""
    choices = "\n".join(f"  {g}: {', '.join(sorted(p.stem for p in (CONF / g).glob('*.yaml')))}" for g in _groups())
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m rec.train",
        description=about,
        epilog=f"Choices (group=name):\n{choices}\nEvery setting with its value: --cfg. Its unit and range: the dataclasses in rec/.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a setting, or choose from a group")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="a torchrun job for every combination of comma-separated values"
    )
    parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder laid out like conf/, for your own YAML")
    args = parser.parse_intermixed_args(list(argv))
    for override in args.overrides:
        if "=" not in override and not override.startswith("~"):
            parser.error(f"'{override}' is no override: write key=value")
    return args, args.overrides
