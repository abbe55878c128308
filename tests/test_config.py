import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from rec import config as configuration
from rec.config import CONF, compose, compose_dict, load, plain, save, to_typed
from rec.experts import EXPERTS_KINDS
from rec.interaction import INTERACTION_KINDS
from rec.model import Ranker
from rec.schema import ConfigError, FeatureKind, ShardingType
from rec.towers import TOWERS_KINDS
from rec.train import ABOUT
from rec.widen import dense_parameters
from tests.conftest import CONF as TEST_CONF
from tests.conftest import ROOT

TOY = ["data=toy", "data.path=/nowhere"]
KINDS = {"experts": EXPERTS_KINDS, "interaction": INTERACTION_KINDS, "towers": TOWERS_KINDS}
NEEDED = {"linear": ["model.linear.features=[price,user_id]"], "dot": ["model.towers.item_features=[listing_id]"]}
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))


def toy(*overrides: str) -> configuration.Config:
    return compose([*TOY, *overrides], config_dir=str(TEST_CONF))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        toy(*overrides)
    return str(caught.value)


@pytest.fixture
def own_conf(tmp_path: Path) -> Path:
    """A user's folder of YAML, at a path that Hydra's grammar would trip over unquoted."""
    folder = tmp_path / "my conf, v=2 (it's new)"
    for group in ("data", "experiment", "experts"):
        (folder / group).mkdir(parents=True)
    (folder / "data" / "toy.yaml").write_text((TEST_CONF / "data" / "toy.yaml").read_text())
    return folder


@pytest.fixture
def empty_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def saved_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save(toy(), path)
    return path.read_text()


@pytest.fixture
def saved(saved_text: str, tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(saved_text)
    return tmp_path / "config.yaml"


def deltas(name: str) -> tuple[dict[str, str], DictConfig]:
    """The choices and the settings of an experiment, after those of the experiment that it builds on."""
    settings = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
    choices: dict[str, str] = {}
    merged = OmegaConf.create()
    for line in settings.pop("defaults", []):
        if isinstance(line, dict):
            choices |= {key.removeprefix("override /"): value for key, value in line.items()}
        elif line != "_self_":
            choices, merged = deltas(line)
    return choices, OmegaConf.merge(merged, settings)


class TestEveryFile:
    def test_files_are_found(self) -> None:
        assert {"data", "experiment", "experts", "interaction"} <= {group for group, _ in OPTIONS}

    @pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda part: part)
    def test_composes_builds_a_ranker_and_loads_back(self, tmp_path: Path, group: str, option: str) -> None:
        config = compose([f"{group}={option}", *NEEDED.get(option if group == "towers" else group, [])])
        if group in KINDS:
            chosen = getattr(config.model, group)
            assert type(chosen) is KINDS[group][chosen.kind]
            assert chosen.kind == option or option not in KINDS[group]
        weights = Ranker(config.model, config.data, device=torch.device("meta")).state_dict()
        for name, table in config.data.tables.items():
            (weight,) = (
                w for key, w in weights.items() if key.endswith(f".{name}.weight") and key.startswith("embeddings.")
            )
            assert tuple(weight.shape) == (table.num_embeddings, table.embedding_dim)
        save(config, tmp_path / "config.yaml")
        assert load(tmp_path / "config.yaml") == config

    @pytest.mark.parametrize("group", KINDS)
    def test_every_kind_has_a_file_of_its_name(self, group: str) -> None:
        assert {option for g, option in OPTIONS if g == group} >= set(KINDS[group])

    @pytest.mark.parametrize("name", [option for group, option in OPTIONS if group == "experiment"])
    def test_experiment_changes_what_it_says_and_no_more(self, name: str) -> None:
        text = (CONF / "experiment" / f"{name}.yaml").read_text()
        assert f"-m rec.train experiment={name}" in text
        choices, settings = deltas(name)
        typed = to_typed(
            OmegaConf.merge(compose_dict([f"{group}={option}" for group, option in choices.items()]), settings)
        )
        assert plain(compose([f"experiment={name}"])) == plain(typed)

    def test_architectures_that_are_compared_are_of_one_size(self) -> None:
        bottom, mmoe = (dense_parameters(compose([f"experiment=etsy_{name}"])) for name in ("shared_bottom", "mmoe"))
        assert bottom == pytest.approx(mmoe, rel=0.01)


# One misspelling at each level that an override can reach: what was written, the key at fault, the name that was meant.
TYPOS = [
    ("seeed=1", "seeed", "seed"),
    ("trainr.max_steps=1", "trainr", "trainer"),
    ("trainer.max_stps=1", "trainer.max_stps", "max_steps"),
    ("optim.sparce.lr=1", "optim.sparce", "sparse"),
    ("optim.dense.lrr=1", "optim.dense.lrr", "lr"),
    ("model.experts.num_exprts=1", "model.experts.num_exprts", "num_experts"),
    ("model.interaction.low_rnk=1", "model.interaction.low_rnk", "low_rank"),
    ("model.towers.layer_sizs=[1]", "model.towers.layer_sizs", "layer_sizes"),
    ("data.tables.usr.num_embeddings=1", "data.tables.usr", "user"),
    ("data.tables.user.embeding_dim=8", "data.tables.user.embeding_dim", "embedding_dim"),
    ("data.features.itm.kind=id", "data.features.itm", "item"),
    ("data.features.item.knd=id", "data.features.item.knd", "kind"),
    ("data.tasks.clik.label=x", "data.tasks.clik", "click"),
    ("data.tasks.click.lable=x", "data.tasks.click.lable", "label"),
    ("data.domain.colum=x", "data.domain.colum", "column"),
    ("expert=mmoe", "expert", "experts"),
    ("experiments=quickstart", "experiments", "experiment"),
    ("interaction=dcn", "dcn", "dcn_v2"),
    ("data=markt", "markt", "market"),
    ("experiment=quickstrt", "quickstrt", "quickstart"),
    # Hydra adds what a leading + asks for, and a struct of its own would let it
    ("+seeed=1", "seeed", "seed"),
    ("++trainr.max_steps=1", "trainr", "trainer"),
    ("+trainer.max_stps=1", "trainer.max_stps", "max_steps"),
    ("+data.tables.user.embeding_dim=8", "data.tables.user.embeding_dim", "embedding_dim"),
    # names among values
    ("trainer.monitor=auk", "auk", "auc"),
    ("trainer.monitor_tasks=[click,purchse]", "purchse", "purchase"),
    ("data.features.history.table=itm", "itm", "item"),
    ("data.tasks.purchase.condition=clck", "clck", "click"),
]


@pytest.mark.parametrize(("override", "key", "meant"), TYPOS, ids=[override for override, _, _ in TYPOS])
def test_typo_is_refused_with_the_nearest_name(override: str, key: str, meant: str) -> None:
    message = refusal(override)
    assert f"'{key}'" in message
    assert f"did you mean '{meant}'?" in message
    assert "\n" not in message


# The same, in a YAML file of one's own: a group, what is written wrong, where the message says it is, what was meant.
FILES = [
    ("experiment", "# @package _global_\ntrainr: {max_steps: 1}", "trainr", "trainer"),
    ("experiment", "# @package _global_\ntrainer: {max_stps: 1}", "trainer.max_stps", "max_steps"),
    ("experiment", "# @package _global_\noptim: {dense: {lrr: 1}}", "optim.dense.lrr", "lr"),
    ("experiment", "# @package _global_\ndata: {tables: {user: {dims: 8}}}", "data.tables.user.dims", None),
    (
        "experts",
        "# @package model.experts\ndefaults: [base_mmoe, _self_]\nnum_exprts: 2",
        "model.experts.num_exprts",
        "num_experts",
    ),
    ("data", ("user: {kind", "user: {knd"), "data.features.user.knd", "kind"),
    ("data", ("kind: sequence, table", "kind: sequence, tabel"), "data.features.history.tabel", "table"),
    ("data", ("num_embeddings: 997", "num_embedings: 997"), "data.tables.user.num_embedings", "num_embeddings"),
    ("data", ("condition: click, loss", "conditon: click, loss"), "data.tasks.purchase.conditon", "condition"),
    ("data", ("tasks:", "task:"), "data.task", "tasks"),
]


@pytest.mark.parametrize(("group", "text", "key", "meant"), FILES, ids=[f"{group}-{key}" for group, _, key, _ in FILES])
def test_typo_in_a_file_is_refused(
    own_conf: Path, group: str, text: str | tuple[str, str], key: str, meant: str | None
) -> None:
    toy_yaml = (own_conf / "data" / "toy.yaml").read_text()
    if isinstance(text, tuple):
        assert text[0] in toy_yaml
        text = toy_yaml.replace(*text, 1)
    (own_conf / group / "mine.yaml").write_text(text)
    choices = [f"{group}=mine"] if group == "data" else ["data=toy", f"{group}=mine"]
    with pytest.raises(ConfigError, match=rf"^{group}/mine.yaml: no setting '{key}'; ") as caught:
        compose([*choices, "data.path=/nowhere"], config_dir=str(own_conf))
    assert meant is None or f"did you mean '{meant}'?" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {max_steps: 1}", "'# @package' line"),  # without it, the file would set experiment.trainer
        ("# @package _global_\ntrainer: {max_steps: 1", "mine.yaml"),
        ("# @package _global_\noptim: {dense: {lr: fast}}", "experiment/mine.yaml: optim.dense.lr: Value 'fast'"),
        ("# @package _global_\ndefaults: [{override /exprts: mmoe}]", "'exprts'; did you mean 'experts'?"),
        ("# @package _global_\ndefaults: [{override /experts: mmo}]", "'mmo'; did you mean 'mmoe'?"),
    ],
)
def test_other_mistakes_in_a_file(own_conf: Path, text: str, said: str) -> None:
    (own_conf / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose([*TOY, "experiment=mine"], config_dir=str(own_conf))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=abc", "seed: Value 'abc'"),
        ("seed=null", "seed: field 'seed' is not Optional"),
        ("seed=${sed}", "seed: Interpolation key 'sed' not found"),
        ("trainer.max_steps=1.5", "trainer.max_steps: Value '1.5'"),
        ("trainer=3", "trainer: Invalid type"),
        ("optim.dense.lr=fast", "optim.dense.lr: Value 'fast'"),
        ("reader.shuffle=maybe", "reader.shuffle: Value 'maybe'"),
        ("model.experts.layer_sizes=[a]", "model.experts.layer_sizes[0]: Value 'a'"),
        ("data.features.item.kind=bagg", "data.features.item.kind: Invalid value 'bagg'"),
        ("checkpoint.resume=nevr", "expected one of [auto, never]"),
        ("experiment=null", "a group takes the name of one of its choices"),
        ("+data.features.x={kind: id}", "write new entries in YAML"),
        ("model.experts.kind=shared_bottom", "choose with experts=NAME, one of shared_bottom, mmoe"),
        ("model.interaction.kind=nonsense", "choose with interaction=NAME"),
        ("seed=1,2", "--multirun"),
        ("a b=3", "a b=3"),
    ],
)
def test_wrong_type_is_refused(override: str, said: str) -> None:
    assert said in refusal(override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.num_epochs=0", "trainer.num_epochs is 0, expected a value from 1"),
        ("reader.global_batch_size=0", "reader.global_batch_size is 0"),
        ("optim.dense.lr=nan", "optim.dense.lr is nan"),
        ("optim.schedule.final_factor=1.5", "optim.schedule.final_factor is 1.5, expected a value from 0 to 1"),
        ("sharding.column_width=6", "sharding.column_width is 6, expected a positive multiple of 4"),
        ("data.tables.user.embedding_dim=6", "embedding_dim is 6, expected a positive multiple of 4"),
        ("data.features.item.dropout=2", "dropout is 2"),
        ("data.features.price.dropout=0.5", "data.features.price is dense"),
        ("data.tasks.click.loss_weight=-1", "loss_weight is -1"),
        ("model.experts.temperature=0", "model.experts.temperature is 0"),
        ("model.experts.layer_sizes=[]", "model.experts.layer_sizes is []"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last is 0"),
    ],
)
def test_value_out_of_range_is_refused(override: str, said: str) -> None:
    assert said in refusal(override)


@pytest.mark.parametrize("override", ["hydra.run.dir=x", "hydra/launcher=basic", "+hydra.x=1", "++hydra.verbose=true"])
def test_hydra_settings_are_refused(override: str) -> None:
    assert "set run_dir=DIR" in refusal(override)


def test_missing_path_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^data\.path: no value; give it one"):
        compose(["data=toy"], config_dir=str(TEST_CONF))


def test_plus_may_add_to_a_dict_of_strings() -> None:
    assert toy("+data.splits.late=late/*.parquet").data.splits["late"] == "late/*.parquet"


class TestSavedAndLoaded:
    @pytest.mark.parametrize(
        ("experts", "interaction"),
        [("shared_bottom", "none"), ("mmoe", "dcn_v2"), ("shared_bottom", "dcn_v2_low_rank")],
    )
    def test_equal(self, tmp_path: Path, experts: str, interaction: str) -> None:
        changes = ["trainer.max_steps=7", "optim.dense.kind=adamw", "sharding.default=grid_shard", "run_dir=007"]
        config = toy(f"experts={experts}", f"interaction={interaction}", "model.experts.layer_sizes=[5,3]", *changes)
        save(config, tmp_path / "config.yaml")
        back = load(tmp_path / "config.yaml")
        assert back == config
        assert type(back.model.experts) is EXPERTS_KINDS[experts]
        assert type(back.model.interaction) is INTERACTION_KINDS[interaction]
        assert back.sharding.default is ShardingType.grid_shard and back.run_dir == "007"

    def test_file_is_plain_yaml(self, saved_text: str) -> None:
        values = yaml.safe_load(saved_text)
        assert values["data"]["features"]["history"]["kind"] == "sequence"
        assert values["model"]["experts"]["kind"] == "mmoe"
        assert values["run_dir"] is None and values["data"]["domain"]["names"] == ["home", "search"]

    def test_changes(self, saved: Path) -> None:
        config = toy()
        changes = [
            "data.path=/a b=c,d",
            "metrics.exact=true",
            "trainer.monitor_tasks=[click]",
            "data.features.item.kind=bag",
        ]
        got = load(saved, changes)
        assert got.data.path == "/a b=c,d" and got.metrics.exact and got.trainer.monitor_tasks == ["click"]
        assert got.data.features["item"].kind is FeatureKind.bag
        item = replace(config.data.features["item"], kind=FeatureKind.bag)
        data = replace(config.data, path="/a b=c,d", features={**config.data.features, "item": item})
        trainer, metrics = replace(config.trainer, monitor_tasks=["click"]), replace(config.metrics, exact=True)
        assert got == replace(config, data=data, trainer=trainer, metrics=metrics)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("seeed=1", "did you mean 'seed'?"),
            ("trainer.max_stps=1", "no setting 'trainer.max_stps'; did you mean 'max_steps'?"),
            ("data.tables.user.embeding_dim=8", "did you mean 'embedding_dim'?"),
            ("data.tables.usr.embedding_dim=8", "did you mean 'user'?"),
            ("model.experts.num_exprts=8", "did you mean 'num_experts'?"),
            ("+trainer.max_steps=1", "no setting '+trainer'; did you mean 'trainer'?"),
            ("seed=x", "seed: Value 'x'"),
            ("trainer.max_steps=0", "trainer.max_steps is 0"),
            ("data.path=???", "data.path: no value"),
            ("experts=shared_bottom", "the choices of a run are made"),
            ("data=market", "the choices of a run are made"),
            ("model.experts.kind=shared_bottom", "choose with experts=NAME"),
        ],
    )
    def test_changes_refused(self, saved: Path, change: str, said: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load(saved, [change])
        assert said in str(caught.value)

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("seed: 0", "sed: 0", "no setting 'sed'; did you mean 'seed'?"),
            ("max_steps: null", "max_stps: null", "did you mean 'max_steps'?"),
            ("seed: 0", "seed: x", "seed: Value 'x'"),
            ("kind: mmoe", "kind: mmo", "did you mean 'mmoe'?"),
            ("    kind: mmoe\n", "", "model.experts.kind is 'None'"),
            ("num_experts: 6", "num_experts: 0", "model.experts.num_experts is 0"),
        ],
    )
    def test_edited_file_is_refused(self, saved: Path, old: str, new: str, said: str) -> None:
        assert old in saved.read_text()
        saved.write_text(saved.read_text().replace(old, new, 1))
        with pytest.raises(ConfigError) as caught:
            load(saved)
        assert said in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "does not exist: is run_dir the folder of a run?"),
            (b"", "model.experts.kind is 'None'"),
            (b"model: 3", "model.experts.kind is 'None'"),
            (b"[1]", "holds a list"),
            (b"a: [", "not readable YAML"),
            (b"\xff\xfe\x81", "not readable YAML"),
        ],
    )
    def test_damaged_file_is_refused(self, tmp_path: Path, content: bytes | None, said: str) -> None:
        path = tmp_path / "config.yaml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert said in str(caught.value) and str(path) in str(caught.value)


class TestCommandLine:
    def call(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[configuration.Config]:
        """What `main` ran with these arguments."""
        ran: list[configuration.Config] = []
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        configuration.main(ran.append, about=ABOUT)
        return ran

    def test_help_shows_every_choice(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            self.call(monkeypatch, "--help")
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert ABOUT.splitlines()[0] in said and "--config-dir" in said
        lines = {line.strip().partition(":")[0]: line.partition(": ")[2].split(", ") for line in said.splitlines()}
        for group, option in OPTIONS:
            assert option in lines[group]
        assert not any("base" in name for group in {g for g, _ in OPTIONS} for name in lines[group])

    def test_cfg_prints_what_load_reads(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        overrides = [*TOY, "experts=shared_bottom", "seed=3"]
        assert self.call(monkeypatch, "--cfg", "--config-dir", str(TEST_CONF), *overrides) == []
        (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
        assert load(tmp_path / "config.yaml") == toy("experts=shared_bottom", "seed=3")

    @pytest.mark.parametrize("flag", ["--config-dir", "-cd"])
    def test_config_dir(self, own_conf: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
        (own_conf / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 41\n")
        monkeypatch.chdir(own_conf.parent)
        (ran,) = self.call(monkeypatch, *TOY, "experiment=mine", flag, own_conf.name)
        assert ran.seed == 41 and ran.data.name == "toy"
        (ran,) = self.call(monkeypatch, *TOY, flag, own_conf.name, "experiment=mine", "seed=42")  # the override wins
        assert ran.seed == 42

    def test_config_dir_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"nowhere is no folder"):
            compose(TOY, config_dir=str(tmp_path / "nowhere"))

    @pytest.mark.parametrize("argument", ["max_steps", "trainer.max_steps", "=3"])
    def test_no_override(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            self.call(monkeypatch, "--config-dir", str(TEST_CONF), *TOY, argument)
        assert ended.value.code == 2
        assert f"'{argument}' is no override: write key=value" in capsys.readouterr().err

    @pytest.mark.parametrize("argument", ["--confg-dir=x", "--resume"])
    def test_unknown_flag(self, monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
        with pytest.raises(SystemExit) as ended:
            self.call(monkeypatch, argument, *TOY)
        assert ended.value.code == 2

    def test_cfg_starts_no_sweep(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            self.call(monkeypatch, "--cfg", "--multirun", *TOY)
        assert "not allowed with" in capsys.readouterr().err

    def test_deletion(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (ran,) = self.call(monkeypatch, "--config-dir", str(TEST_CONF), *TOY, "~data.features.text")
        assert "text" not in ran.data.features and "price" in ran.data.features

    def test_nothing_is_written(
        self, empty_cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert len(self.call(monkeypatch, "--config-dir", str(TEST_CONF), *TOY, "run_dir=mine")) == 1
        self.call(monkeypatch, "--cfg", "--config-dir", str(TEST_CONF), *TOY)
        refusal("seeed=1")
        assert Path.cwd() == empty_cwd and list(empty_cwd.iterdir()) == []


def test_the_data_set_of_the_readme_composes(tmp_path: Path) -> None:
    (yaml_block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(yaml_block)
    data = compose(["data=mine"], config_dir=str(tmp_path)).data
    assert list(data.tasks) == ["click", "purchase"] and data.table_of("history") == "item"
