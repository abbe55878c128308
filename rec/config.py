"""One typed, validated `Config` from YAML and overrides.

The dataclasses stand beside the classes they build; this module composes them. Hydra composes `conf/` over the schema, so a
misspelt or mistyped key is refused before anything runs, with the nearest valid name. A run's resolved `config.yaml` loads
back into the same types: where a section has several (the experts, say), its `kind` tells which.
"""

import argparse
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from rec import storage
from rec.checkpoint import CheckpointConfig
from rec.data import ReaderConfig
from rec.experts import EXPERTS_KINDS
from rec.interaction import INTERACTION_KINDS
from rec.metrics import MetricsConfig
from rec.model import ModelConfig
from rec.optim import OptimConfig
from rec.schema import ConfigError, DataConfig, nearest
from rec.sharding import ShardingConfig
from rec.towers import TOWERS_KINDS
from rec.trainer import TrainerConfig
from rec.weighting import WeightingConfig

CONF = Path(__file__).resolve().parents[1] / "conf"

# Sections with several types: where they lie, the group that chooses, and `kind` -> type.
_CHOICES: dict[str, tuple[str, dict[str, type]]] = {
    "model.experts": ("experts", EXPERTS_KINDS),
    "model.interaction": ("interaction", INTERACTION_KINDS),
    "model.towers": ("towers", TOWERS_KINDS),
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
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        for name in self.trainer.monitor_tasks or []:
            if name not in self.data.tasks:
                raise ConfigError(f"trainer.monitor_tasks has '{name}'; {nearest(name, self.data.tasks)}")
        self.model.check(self.data)


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
    search = [_searchpath(Path(config_dir))] if config_dir else []
    for override in overrides:
        if override.lstrip("+~").startswith(("hydra.", "hydra/")):
            raise ConfigError(f"'{override}': a run takes no Hydra settings; set run_dir=DIR to choose its folder")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="rec"):
        try:
            return hydra_compose("config", overrides=[*overrides, *search])
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_explain(error)) from error
        except yaml.YAMLError as error:
            raise ConfigError(f"a file of the configuration is not readable YAML: {error}") from error
        except ValueError as error:  # Hydra's for a group set to null or a number
            raise ConfigError(f"{error}; a group takes the name of one of its choices, group=name") from error


def _searchpath(folder: Path) -> str:
    """The override that has Hydra search `folder` too; quoted, for paths with spaces and commas."""
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {folder} is no folder; expected one laid out like {CONF}")
    quoted = str(folder.resolve()).replace("'", r"\'")
    return f"hydra.searchpath=['file://{quoted}']"


def to_typed(tree: DictConfig) -> Config:
    """The dataclasses that a composed tree describes, each validated.

    Raises:
        ConfigError: a missing or out-of-range value, or a setting that does not exist.
    """
    try:
        config = OmegaConf.to_object(tree)
    except MissingMandatoryValue as error:
        missing = ", ".join(sorted(OmegaConf.missing_keys(tree)))
        raise ConfigError(f"{missing}: no value; give it one (key=value, or in the YAML)") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(config, Config)
    _check_names(config)
    for package, (group, kinds) in _CHOICES.items():
        chosen = attrgetter(package)(config)
        if type(chosen) is not kinds.get(chosen.kind):
            name = type(chosen).__name__
            raise ConfigError(
                f"{package}.kind is '{chosen.kind}' on a {name}; choose with {group}=NAME, one of {', '.join(kinds)}"
            )
    return config


def _check_names(value: Any, where: str = "") -> None:
    """Refuse names that no dataclass has: Hydra adds whatever an override with a leading `+` asks for."""
    if is_dataclass(value):
        names = [f.name for f in fields(value)]
        for name, item in vars(value).items():
            if name not in names:
                raise ConfigError(f"no setting '{where}{name}'; {nearest(name, names)}")
            _check_names(item, f"{where}{name}.")
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_names(item, f"{where}{name}.")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load` reads."""
    with storage.named(path), storage.replacing(path) as draft:
        draft.write_text(to_yaml(config), encoding="utf-8")


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run, read from its `config.yaml`, with `key=value` changes.

    Raises:
        ConfigError: no such file, or a key or value that does not fit.
    """
    changes = _read(path)
    for override in overrides:
        if override.partition("=")[0] in _groups():
            raise ConfigError(
                f"'{override}': the choices of a run are made; only single settings can be changed, key=value"
            )
    merged: DictConfig | ListConfig = _schema(Config)
    try:
        for package, (_, kinds) in _CHOICES.items():
            kind = str(OmegaConf.select(changes, f"{package}.kind"))
            if kind not in kinds:
                raise ConfigError(f"{path}: {package}.kind is '{kind}'; {nearest(kind, kinds)}")
            OmegaConf.update(merged, package, _schema(kinds[kind]), merge=False)
        merged = OmegaConf.merge(merged, changes)
        OmegaConf.set_struct(merged, True)
        merged.merge_with_dotlist(list(overrides))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, merged)) from error
    assert isinstance(merged, DictConfig)
    return to_typed(merged)


def _read(path: Path) -> DictConfig:
    """The settings in a YAML file, whatever they are."""
    with storage.named(path):
        if not storage.is_file(path):
            raise ConfigError(f"{path} does not exist: is run_dir the folder of a run?")
    try:
        settings = OmegaConf.load(io.StringIO(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(settings, DictConfig):
        raise ConfigError(f"{path} holds a list, expected the settings of a run (key: value)")
    return settings


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
    """One sentence on a composition error, with the file where one is at fault and the nearest valid name where a name is."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__  # Hydra raises its own from within, without `from`
    file = re.match(r"In '([^']+)'", str(error))
    where = f"{file[1]}.yaml: " if file else ""
    return _explain_group(error) if cause is None else where + _explain_setting(cause, tree)


def _explain_setting(cause: OmegaConfBaseException, tree: DictConfig | ListConfig | None) -> str:
    key = str(cause.full_key or "")
    at_fault = re.search(r"[Kk]ey '([^']+)'", str(cause))
    if at_fault is None or isinstance(cause, InterpolationResolutionError):
        said = f"{key}: {_first_line(cause)}" if key else _first_line(cause)
        return said + ("; write new entries in YAML" if "dict is not a subclass" in said else "")
    key = key or at_fault[1]
    if key in _groups() and tree is None:
        return f"the file lacks its '# @package' line; copy the one on top of the files in {CONF / key}"
    parent, _, name = key.rpartition(".")
    return f"no setting '{key}'; {nearest(name, _names_at(parent, cause, tree))}"


def _explain_group(error: BaseException) -> str:
    missing = re.search(r"(?:Could not find|Cannot find primary config) '([^']+)'", str(error))
    if missing and "/" in missing[1]:
        group, _, option = missing[1].rpartition("/")
        options = [line.strip() for line in re.findall(r"^\t(\S+)$", str(error), re.M)]
        return f"no {group} '{option}'; {nearest(option, [o for o in options if not o.startswith('base')])}"
    no_group = re.search(r"Could not override '([^']+)'", str(error))
    if no_group:
        names = {*_groups(), *(f.name for f in fields(Config))}
        return f"no setting or group '{no_group[1]}'; {nearest(no_group[1], names)}"
    return str(error)


def _names_at(parent: str, cause: OmegaConfBaseException, tree: DictConfig | ListConfig | None) -> list[str]:
    """Valid names beside a misspelt one."""
    node = cause.parent_node if isinstance(getattr(cause, "parent_node", None), DictConfig) else None
    if node is None and tree is not None:
        node = OmegaConf.select(tree, parent) if parent else tree
    names = [str(name) for name in node] if isinstance(node, DictConfig) else [f.name for f in fields(Config)]
    groups = (
        [] if parent or tree is not None else [g for g in _groups() if g not in names]
    )  # no groups in a finished file
    return [name for name in names if name != "hydra"] + groups


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
        print(to_yaml(compose(overrides, config_dir=args.config_dir)), end="")
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
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "-m", "--multirun", action="store_true", help="a torchrun job for every combination of comma-separated values"
    )
    mode.add_argument("--cfg", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder laid out like conf/, for your own YAML")
    args = parser.parse_intermixed_args(list(argv))
    for override in args.overrides:
        if not re.match("~|[^=]+=", override):
            parser.error(f"'{override}' is no override: write key=value")
    return args, args.overrides
