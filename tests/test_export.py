import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rec import config as configuration
from rec import export as exporting
from rec.calibration import CalibratorKind, Calibrators
from rec.config import Config
from rec.export import CheckRows, Ran, largest_difference, replacing, run_alone
from rec.features import Batch
from rec.model import Ranker
from rec.schema import ConfigError
from rec.serving import Served, inputs_of
from tests.conftest import start_ranks, toy_overrides, toy_table
from tests.test_checkpoint import contents, one_process
from tests.test_serving import batch_of, expected_preds, fitted
from tests.test_train import weights

# runs a program on inputs, with torch alone
ALONE = """
import sys, torch
model = torch.export.load(sys.argv[1]).module()
torch.save([model(**inputs) for inputs in torch.load(sys.argv[2])], sys.argv[3])
assert not {"rec", "torchrec", "fbgemm_gpu"} & set(sys.modules)
"""


def alone(model: Path, inputs: list[dict], folder: Path) -> list[torch.Tensor]:
    torch.save(inputs, folder / "inputs.pt")
    files = [str(path) for path in (model, folder / "inputs.pt", folder / "preds.pt")]
    subprocess.run([sys.executable, "-I", "-c", ALONE, *files], check=True, timeout=120, cwd=folder)
    return torch.load(folder / "preds.pt")


def export(run_dir: Path, *arguments: str) -> dict[str, Any]:
    """What schema.json says after `rec.export`, run in this process."""
    with one_process():
        exporting.run([f"run_dir={run_dir}", *arguments])
    return json.loads((run_dir / "export" / "schema.json").read_text())


@pytest.fixture(scope="module")
def run_dir(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks: clicks auxiliary, purchases corrected for sampling and calibrated, dwell time a regression."""
    run_dir = tmp_path_factory.mktemp("served") / "run"
    changes = [
        "experts=cgc",
        "model.experts.temperature=2",
        "model.experts.expert_dropout=0.3",
        "sharding.default=column_wise",
        "data.tasks.click.auxiliary=true",
        "data.tasks.purchase.negatives_kept=0.5",
        "optim.dense.lr=0.01",
        "trainer.max_steps=20",
        "trainer.eval_split=null",
    ]
    jobs = [toy_overrides(toy, f"run_dir={run_dir}", *changes)]
    start_ranks("tests/workers/train_worker.py", json.dumps(jobs), ranks=2)
    return run_dir


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> dict[str, Any]:
    """What schema.json says of it."""
    data = configuration.load(run_dir / "config.yaml").data
    (path,) = (run_dir / "checkpoints").glob("step_*")
    fitted(data, CalibratorKind.platt).save(path)
    return export(run_dir)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs in this process, which saves the start of another."""

    def run_here(programs: Path, rows: CheckRows) -> Ran:
        program = torch.export.load(programs / "model.pt2").module()
        return Ran(torch.cat([program(**inputs) for inputs in rows.inputs]), dict.fromkeys(rows.timed, 0.5))

    monkeypatch.setattr(exporting, "run_alone", run_here)


@pytest.fixture
def config(run_dir: Path) -> Config:
    return configuration.load(run_dir / "config.yaml")


def trained(config: Config, run_dir: Path) -> Ranker:
    """The whole network, filled from the checkpoint's tensors by name."""
    ranker = Ranker(config.model, config.data).eval()
    state = {key.removeprefix("model."): value for key, value in weights(run_dir).items()}
    ranker.load_state_dict({name: state[name] for name in ranker.state_dict()})
    return ranker


class TestArtifact:
    def test_is_what_was_trained_on_rows_it_has_not_seen(
        self, exported: dict[str, Any], run_dir: Path, config: Config, tmp_path: Path
    ) -> None:
        """At several batch sizes, in a process that knows nothing of `rec`, from columns read as schema.json says."""
        batches: list[Batch] = [batch_of(config.data, num_rows, seed=77) for num_rows in (1, 7, 50)]
        inputs = [inputs_of(batch, batch.num_rows) for batch in batches]
        assert any((given["lengths"]["tags"] == 0).any() for given in inputs)
        unknown = inputs[1] | {"domain_id": torch.tensor([-1, 2, 9, 2**40, -7, 2, 2])}
        read = inputs_as_described(exported, toy_table(50, seed=77).to_pylist())
        *got, got_unknown, got_read = alone(run_dir / "export" / "model.pt2", [*inputs, unknown, read], tmp_path)

        ranker = trained(config, run_dir)
        (path,) = (run_dir / "checkpoints").glob("step_*")
        tasks = {name: config.data.tasks[name] for name in config.data.served_tasks}
        calibrators = Calibrators.load(path, tasks, domains=config.data.domains)
        expected = [expected_preds(ranker, config.data, batch, calibrators) for batch in batches]
        for preds, right in zip(got, expected, strict=True):
            torch.testing.assert_close(preds, right, rtol=0, atol=1e-5)
        torch.testing.assert_close(got_read, expected[2], rtol=0, atol=1e-5)

        line = json.loads((path / "calibration.json").read_text())["tasks"]["purchase"]["global"]
        with torch.no_grad():
            logits = ranker(batches[1]).logits[:, 1].double().numpy()  # corrected for sampling already
        right = 1 / (1 + np.exp(-(line["a"] * logits + line["b"])))
        np.testing.assert_allclose(got_unknown[:, 0].numpy(), right, atol=1e-5)
        assert not np.allclose(got[1][:, 0].numpy(), right, atol=1e-3)  # a domain's own line is another
        assert torch.equal(got_unknown[:, 1], got[1][:, 1])

    def test_schema_says_what_it_is(self, exported: dict[str, Any], run_dir: Path) -> None:
        folder = run_dir / "export"
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "model.pt2", "schema.json"]
        assert list(exported["tasks"]) == ["purchase", "dwell"]
        assert exported["tasks"]["purchase"] == {
            "label": "purchase",
            "kind": "binary",
            "meaning": "probability given click",
            "label_transform": "none",
            "product_with": None,
            "calibrated": True,
        }
        dwell = exported["tasks"]["dwell"]
        assert (dwell["kind"], dwell["label_transform"], dwell["calibrated"]) == ("regression", "log1p", False)
        network = exported["network"]
        assert (network["gate_temperature"], network["pruned"], network["kept_for_others"]) == (2.0, ["click"], [])
        assert exported["calibration"] == {
            "kind": "platt",
            "fitted_on": {"split": "valid", "step": 3, "rows": 3000},
            "domains": {"purchase": ["home", "search"]},
        }
        assert exported["domains"] == ["home", "search"] and exported["domain_column"] == "tab"
        assert (exported["version"], exported["checkpoint"]["step"]) == (1, 20)
        said = exported["check"]
        assert (said["split"], said["rows"]) == ("test", 1004) and said["max_difference"] < 1e-5
        assert configuration.load(folder / "config.yaml") == configuration.load(run_dir / "config.yaml")

    @pytest.mark.usefixtures("quick")
    def test_again_without_calibrators_and_of_a_network_in_bfloat16(
        self, exported: dict[str, Any], run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Into another folder, over an older export there."""
        folder = Path(shutil.copytree(run_dir / "export", tmp_path / "served"))
        export(run_dir, f"out={folder}", "calibrated=false", "check_split=valid", "model.bf16=true", "data.learn=null")
        said = json.loads((folder / "schema.json").read_text())
        assert said["calibration"] is None and not said["tasks"]["purchase"]["calibrated"]
        assert said["check"]["split"] == "valid" and said["network"]["trained_in"] == "bfloat16"
        printed = capsys.readouterr().out
        assert "step_000000020: purchase, dwell, not calibrated" in printed and "left out: click" in printed
        assert "which differs by up to" in printed and "ms for 256 rows" in printed and str(folder) in printed
        assert [path.name for path in tmp_path.iterdir()] == ["served"]


def inputs_as_described(schema: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Inputs made of raw rows by schema.json alone, value by value."""
    hashes = {"integers": hash_integer, "strings": hash_string}
    for kind, examples in schema["hashes"]["examples"].items():
        for value, expected in examples.items():
            assert hashes[kind](int(value) if kind == "integers" else value) == int(expected)
    values, lengths = {}, {}
    for name, feature in schema["features"].items():
        column = [row[feature["column"]] for row in rows]
        lists = [[ids] for ids in column] if feature["kind"] == "id" else column
        lists = [ids[-feature["max_length"] :] if feature["max_length"] else ids for ids in lists]
        if feature["hash"]:
            lists = [[hashes[feature["hash"]](i) % feature["num_embeddings"] for i in ids] for ids in lists]
        values[name] = torch.tensor([i for ids in lists for i in ids])
        lengths[name] = torch.tensor([len(ids) for ids in lists])
    dense = torch.zeros(len(rows), sum(len(part["columns"]) for part in schema["dense"].values()))
    for part in schema["dense"].values():
        floats = torch.tensor([row[part["column"]] for row in rows]).view(len(rows), -1)
        dense[:, part["columns"]] = floats.sign() * floats.abs().log1p() if part["transform"] == "log1p" else floats
    domain_id = torch.tensor([schema["domains"].index(row[schema["domain_column"]]) for row in rows])
    return {"values": values, "lengths": lengths, "dense": dense, "domain_id": domain_id}


def hash_integer(value: int) -> int:
    x = (value + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def hash_string(value: str) -> int:
    text = value.encode()
    return hash_integer((len(text) + sum((b + 1) * 1099511628211**i for i, b in enumerate(text))) % 2**64)


class TestRefused:
    @pytest.mark.usefixtures("quick")
    def test_a_network_that_differs_is_not_published(
        self, exported: dict[str, Any], run_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load = exporting.load_served

        def tampered(*arguments: Any, **options: Any) -> Served:
            served = load(*arguments, **options)
            list(served.ranker.towers.parameters())[-1][0] += 1e-3  # the bias of a logit
            return served

        monkeypatch.setattr(exporting, "load_served", tampered)
        before = contents(run_dir)
        with pytest.raises(
            ConfigError, match=r"gives 0\.\d+ for task 'purchase' in row \d+ .* expected the same to 1e-05"
        ):
            export(run_dir)
        assert contents(run_dir) == before

    def test_any_difference_counts(self) -> None:
        expected = torch.tensor([[0.5, 0.25], [0.5, 2000.0]])
        assert largest_difference(expected.clone(), expected, tasks=["a", "b"]) == 0
        close = expected + torch.tensor([[0, 5e-6], [0, 1e-2]])
        assert largest_difference(close, expected, tasks=["a", "b"]) == pytest.approx(5e-6, rel=0.02)
        for wrong in (torch.nan, torch.inf, 1.1e-5):
            preds = expected.clone()
            preds[0, 1] += wrong
            with pytest.raises(ConfigError, match=r"gives \S+ for task 'b' in row 0 of the check, the trainer 0\.25,"):
                largest_difference(preds, expected, tasks=["a", "b"])
            with pytest.raises(ConfigError, match=r"gives 0\.25 for task 'b' in row 0"):
                largest_difference(expected, preds, tasks=["a", "b"])

    def test_a_program_that_does_not_run(self, tmp_path: Path) -> None:
        (tmp_path / "model.pt2").write_bytes(b"no program")
        with pytest.raises(ConfigError, match="does not run with torch alone, so nothing was written:\n(?s:.*)Error"):
            run_alone(tmp_path, CheckRows([], {}, torch.zeros(1, 1)))

    def test_folder_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "schema.json").touch()
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(ConfigError, match=r"something else than an export \(thesis.tex\)"), replacing(tmp_path):
            pass
        with pytest.raises(ConfigError, match="a file"), replacing(tmp_path / "thesis.tex"):
            pass
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_failure_leaves_the_older_one(self, tmp_path: Path) -> None:
        folder = tmp_path / "export"
        for text in ("first", "second"):
            with replacing(folder) as draft:
                (draft / "schema.json").write_text(text)
                assert not folder.exists() or (folder / "schema.json").read_text() == "first"
        with pytest.raises(FileNotFoundError), replacing(folder) as draft:
            shutil.copy("no such file", draft / "schema.json")
        assert (folder / "schema.json").read_text() == "second" and list(tmp_path.iterdir()) == [folder]

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("check_split=tset", "has no split 'tset': did you mean 'test'"),
            ("checkpoint=3", "no checkpoint '3' in .*; expected latest, best or one of the steps 20"),
            ("calibrated=maybe", "calibrated is 'maybe', expected true or false"),
            ("chekpoint=best", "no setting 'chekpoint'; did you mean 'checkpoint'"),
        ],
    )
    def test_argument(self, exported: dict[str, Any], run_dir: Path, argument: str, said: str) -> None:
        before = contents(run_dir)
        with pytest.raises(ConfigError, match=said):
            export(run_dir, argument)
        assert contents(run_dir) == before

    def test_several_processes(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="is one process, .*; start it with python, not torchrun"):
            exporting.run([f"run_dir={run_dir}"])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run_dir=x", "-h"]], ids=str)
def test_help(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    exporting.main()
    said = capsys.readouterr().out
    for word in ("python -m rec.export run_dir=DIR", "checkpoint", "out", "calibrated", "check_split", "schema.json"):
        assert word in said
    assert "RANK" not in os.environ
