import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from rec import doctor
from tests.conftest import CONF, toy_overrides

PYPROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())


def declared() -> list[str]:
    """What the metadata of an installed shardrank would declare."""
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].items()
    return project["dependencies"] + [f'{r}; extra == "{name}"' for name, rs in extras for r in rs]


@pytest.fixture
def machine(monkeypatch):
    """Versions of distributions: what is installed here, as after a set-up for the CPU; tests change some."""
    versions = {
        "torch": "2.13.0+cpu",
        "torchrec": "1.8.0",
        "torchmetrics": "1.9.0",
        "hydra-core": "1.3.8",
        "numpy": "2.3.1",
        "scipy": "1.17.1",
        "pyarrow": "21.0.0",
        "tensorboard": "2.20.0",
        "tqdm": "4.67.1",
        "tensordict": "0.10.0",
        "pyre-extensions": "0.0.32",
        "iopath": "0.1.10",
        "fsspec": "2025.9.0",
        "universal-pathlib": "0.3.10",
        "fbgemm-gpu-cpu": "1.8.0",
    }

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: declared())
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": PYPROJECT["project"]["requires-python"]})
    return versions


def problems(findings):
    return [f for f in findings if f.problem]


def test_pin_of_torchrec_is_that_of_pyproject():
    assert PYPROJECT["dependency-groups"]["torchrec"] == [doctor.TORCHREC]


def test_a_sound_machine_has_no_problems(machine):
    findings = [*doctor.check_python(), *doctor.check_versions(), *doctor.check_fbgemm()]
    assert problems(findings) == []
    assert {f.name for f in findings} == {"python", *machine}


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("torch", "2.12.0"),
        ("torch", "2.13.1+cpu"),
        ("torchrec", "1.7.0"),
        ("torchmetrics", "1.0.3"),
        ("numpy", "1.26.4"),
    ],
)
def test_a_wrong_version_is_named_with_both_versions_and_a_remedy(machine, name, version):
    machine[name] = version
    (finding,) = problems(doctor.check_versions())
    assert name in finding.problem
    assert version in finding.problem
    assert str(doctor.requirements()[name].specifier) in finding.problem
    assert "setup.sh" in finding.remedy


def test_all_problems_are_found_at_once(machine):
    del machine["torchmetrics"]
    machine["torch"] = "2.12.0"
    machine["hydra-core"] = "1.1.0"
    assert {f.name for f in problems(doctor.check_versions())} == {"torch", "hydra-core", "torchmetrics"}


def test_a_wrong_version_of_fbgemm_is_found(machine):
    machine["fbgemm-gpu-cpu"] = "1.9.0"
    (finding,) = problems(doctor.check_fbgemm())
    assert "fbgemm-gpu-cpu is 1.9.0, expected ==1.8.0" in finding.problem


def test_both_builds_of_fbgemm_are_a_problem(machine):
    machine["fbgemm-gpu"] = "1.8.0"
    (finding,) = problems(doctor.check_fbgemm())
    assert "fbgemm-gpu-cpu 1.8.0, fbgemm-gpu 1.8.0 are both installed" in finding.problem
    assert finding.remedy == doctor.FRESH


def test_neither_build_of_fbgemm_is_a_problem(machine):
    del machine["fbgemm-gpu-cpu"]
    (finding,) = problems(doctor.check_fbgemm())
    assert "neither fbgemm-gpu-cpu nor fbgemm-gpu is installed" in finding.problem


def test_an_old_python_is_a_problem(machine, monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.10.13")
    (finding,) = problems(doctor.check_python())
    assert "Python is 3.10.13, expected" in finding.problem


def test_a_project_that_is_not_installed_is_a_problem(machine, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", absent)
    monkeypatch.setattr(metadata, "requires", absent)
    (finding,) = problems(doctor.check_python())
    assert "shardrank is not installed" in finding.problem
    assert problems(doctor.check_versions()) == []  # torchrec's pin is known all the same


def test_kernels_run_here():
    assert doctor.train_one_step() in ("cpu", "cuda")


def test_a_failing_import_is_a_finding(monkeypatch):
    def undefined_symbol():
        raise OSError("fbgemm_gpu_py.so: undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(doctor, "train_one_step", undefined_symbol)
    (finding,) = doctor.check_kernels()
    assert finding.problem.endswith("OSError: fbgemm_gpu_py.so: undefined symbol: _ZN3c10")


def test_gpus_that_fbgemm_cannot_use_are_a_problem(machine, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: f"GPU {i}")
    (finding,) = doctor.check_gpus()
    assert finding.value == "GPU 0, GPU 1"
    assert "REC_DEVICE=cuda" in finding.remedy
    machine["fbgemm-gpu"] = "1.8.0"
    assert problems(doctor.check_gpus()) == []


def test_gpus_that_torch_cannot_use_are_a_problem(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(doctor, "count_nvidia_gpus", lambda: 4)
    (finding,) = doctor.check_gpus()
    assert "lists 4 GPUs" in finding.problem
    monkeypatch.setattr("torch.version.cuda", None)  # a CPU build leaves GPUs alone on purpose
    assert problems(doctor.check_gpus()) == []


def test_memory_is_that_of_the_container():
    assert 2**28 < doctor.memory_bytes() < 2**50


def test_without_settings_nothing_heavy_is_imported():
    words = "import sys, rec.doctor; sys.exit(len({'torch', 'rec.config', 'rec.checkup'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0


def sound(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr(doctor, "CHECKS", [lambda: [doctor.Finding("torch", "2.13.0")]])
    monkeypatch.setattr(sys, "argv", ["doctor", *argv])


@pytest.mark.parametrize(
    ("argv", "nproc", "ranks"), [((), "", 2), ((), "3", 3), (("--ranks", "5"), "3", 5)], ids=["default", "env", "flag"]
)
def test_settings_are_looked_at_for_as_many_ranks_as_start_here(toy, monkeypatch, capsys, argv, nproc, ranks):
    monkeypatch.setenv("NPROC", nproc)
    monkeypatch.setattr(doctor, "count_nvidia_gpus", lambda: 0)
    sound(monkeypatch, *toy_overrides(toy, f"run_dir={toy}/run"), "-cd", str(CONF), *argv)
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert f"memory of {ranks} ranks" in printed and "1,004 rows looked at" in printed and "all is well" in printed


def test_a_bad_setting_is_a_problem_like_any_other(toy, monkeypatch, capsys):
    sound(
        monkeypatch, *toy_overrides(toy, "data.splits.valid=nowhere", "data.features.user.hashed=1.5"), "-cd", str(CONF)
    )
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "! configuration  refused" in printed and "1 problem:" in printed and "remedy: \n" not in printed


def test_what_cannot_be_imported_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "rec.checkup", None)
    (finding,) = doctor.check_configuration(["data=toy"], ranks=2, config_dir=None)
    assert "the configuration was not looked at: " in finding.problem and finding.remedy == doctor.FRESH


@pytest.mark.parametrize("problem", [None, "torch is broken"])
def test_exit_code_and_report(monkeypatch, capsys, problem):
    monkeypatch.setattr(doctor, "CHECKS", [lambda: [doctor.Finding("torch", "2.13.0", problem, "reinstall")]])
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == (0 if problem is None else 1)
    printed = capsys.readouterr().out
    assert ("all is well" in printed) == (problem is None)
    assert ("remedy: reinstall" in printed) == (problem is not None)
