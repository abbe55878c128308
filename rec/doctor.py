"""Is this machine fit to train? `python -m rec.doctor` looks at everything at once and says what to do.

With settings of a run, `python -m rec.doctor experiment=quickstart data.path=DIR`, it also looks at their data and the room they
take, see `rec/checkup.py`.

The commonest trouble with TorchRec is its installation: torch, torchrec and fbgemm-gpu are compiled against each other
and fail at import when they come from different releases, and fbgemm-gpu and fbgemm-gpu-cpu overwrite each other.
"""

import argparse
import logging
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from rec.findings import Finding, render

DISTRIBUTION = "shardrank"
# The dependency group of pyproject.toml: a distribution's metadata does not hold groups. A test compares the two.
TORCHREC = "torchrec==1.8.0"
FBGEMM = ("fbgemm-gpu-cpu", "fbgemm-gpu")  # same files, same folder
SETUP = "./launch/setup.sh"
FRESH = "./launch/setup.sh --fresh"


def requirements() -> dict[str, Requirement]:
    """What this project was tested with, by canonical distribution name; `torchrec` alone where it is not installed."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        declared = []
    parsed = [Requirement(text) for text in [*declared, TORCHREC]]
    return {canonicalize_name(r.name): r for r in parsed}


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, else None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_python() -> list[Finding]:
    """The interpreter, and that this project is installed in it."""
    version = platform.python_version()
    try:
        wanted = SpecifierSet(metadata.metadata(DISTRIBUTION)["Requires-Python"])
    except metadata.PackageNotFoundError:
        problem = f"{DISTRIBUTION} is not installed in {sys.prefix}, so its requirements are unknown"
        return [Finding("python", version, problem, f"{SETUP}, then use .venv/bin/python")]
    if not wanted.contains(version, prereleases=True):
        problem = f"Python is {version}, expected {wanted}"
        return [Finding("python", version, problem, f"PYTHON=/path/to/python3.12 {FRESH}")]
    return [Finding("python", version)]


def check_version(requirement: Requirement) -> Finding:
    """One installed distribution against what was tested."""
    name, wanted = requirement.name, requirement.specifier
    version = installed_version(name)
    if version is None:
        return Finding(name, "missing", f"{name} is not installed, expected {wanted}", FRESH)
    if not wanted.contains(version, prereleases=True):
        return Finding(name, version, f"{name} is {version}, expected {wanted}, with which this was tested", FRESH)
    return Finding(name, version)


def check_versions() -> list[Finding]:
    """Every distribution that is needed on every machine."""
    pins = requirements().values()
    return [check_version(pin) for pin in pins if pin.marker is None or pin.marker.evaluate({"extra": ""})]


def check_fbgemm() -> list[Finding]:
    """Exactly one of fbgemm-gpu-cpu and fbgemm-gpu, in the version that fits torch."""
    versions = {name: version for name in FBGEMM if (version := installed_version(name))}
    value = ", ".join(f"{name} {version}" for name, version in versions.items()) or "missing"
    if len(versions) == 2:
        problem = f"{value} are both installed; they share one folder, so which one runs is an accident"
        return [Finding("fbgemm", value, problem, FRESH)]
    if not versions:
        return [Finding("fbgemm", value, f"neither {' nor '.join(FBGEMM)} is installed, expected one", FRESH)]
    (name,) = versions
    pin = requirements().get(name)
    return [check_version(pin) if pin else Finding(name, versions[name])]


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the warnings that torch and torchrec give when they are imported; none of them asks for anything."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def train_one_step() -> str:
    """One step of gradient descent in fbgemm's fused kernel, against the same by hand.

    Returns the kind of device it ran on. Raises `ArithmeticError` if the numbers are wrong, and whatever the imports
    raise.
    """
    with quiet():
        import torch
        from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
        from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

        cuda = torch.cuda.is_available() and installed_version("fbgemm-gpu") is not None
        device = torch.device("cuda" if cuda else "cpu")
        table = EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=3, feature_names=["f"])
        model = FusedEmbeddingBagCollection([table], torch.optim.SGD, {"lr": 0.5}, device=device)
        (weight,) = model.state_dict().values()  # [3, 4]
        before = weight.detach().clone()
        ids, lengths = torch.tensor([0, 2, 2], device=device), torch.tensor([2, 1], device=device)
        pooled = model(KeyedJaggedTensor.from_lengths_sync(["f"], ids, lengths))["f"]  # [2, 4]
        pooled.sum().backward()
    expected = torch.stack([before[0] + before[2], before[2]])
    # Row 0 occurs once, row 2 twice; the gradient of the sum is 1 an occurrence.
    updated = before - 0.5 * torch.tensor([[1.0], [0.0], [2.0]], device=device)
    if not (torch.allclose(pooled, expected, atol=1e-6) and torch.allclose(weight, updated, atol=1e-6)):
        raise ArithmeticError(f"pooled {pooled.tolist()}, expected {expected.tolist()}; weight {weight.tolist()}")
    return device.type


def check_kernels() -> list[Finding]:
    """That torch, fbgemm-gpu and torchrec can be imported together and train a table."""
    try:
        device = train_one_step()
    except Exception as error:  # an ImportError, an OSError of the loader, a missing operator: all mean the same
        cause = str(error).strip().splitlines() or [""]
        problem = f"a training step with torch, fbgemm-gpu and torchrec failed: {type(error).__name__}: {cause[0]}"
        return [Finding("kernels", "failed", problem, FRESH)]
    return [Finding("kernels", f"a training step of an EmbeddingBagCollection on {device} is right")]


def count_nvidia_gpus() -> int:
    """GPUs that the driver lists; 0 where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=60)
    return sum(line.startswith("GPU") for line in listed.stdout.splitlines())


def check_gpus() -> list[Finding]:
    """The GPUs that torch sees, and that fbgemm's build can use them."""
    try:
        with quiet():
            import torch

            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception as error:
        return [Finding("GPUs", "unknown", f"torch fails: {type(error).__name__}: {error}", FRESH)]
    value = ", ".join(names) or "none: ranks train on the CPU"
    if names and installed_version("fbgemm-gpu") is None:
        problem = f"torch sees {len(names)} GPUs, but the installed fbgemm runs on the CPU only"
        return [Finding("GPUs", value, problem, f"REC_DEVICE=cuda {SETUP}, or hide them: export CUDA_VISIBLE_DEVICES=")]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if not names and not hidden and torch.version.cuda and (present := count_nvidia_gpus()):
        problem = f"nvidia-smi lists {present} GPUs, but torch, built for CUDA {torch.version.cuda}, can use none"
        return [Finding("GPUs", value, problem, f"update the NVIDIA driver, or REC_DEVICE=cpu {SETUP}")]
    return [Finding("GPUs", value)]


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its container's limit if that is lower."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # cgroup v2; holds bytes or the word max
    words = limit.read_text().strip() if limit.exists() else "max"
    return min(machine, int(words)) if words.isdigit() else machine


def check_machine() -> list[Finding]:
    """Cores and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [Finding("cores", str(cores)), Finding("memory", f"{memory_bytes() / 2**30:.0f} GiB")]


CHECKS: list[Callable[[], list[Finding]]] = [
    check_python,
    check_versions,
    check_fbgemm,
    check_kernels,
    check_gpus,
    check_machine,
]


def default_ranks() -> int:
    """Ranks that the launch scripts would start here: $NPROC, else one a GPU, else 2."""
    return int(os.environ.get("NPROC") or count_nvidia_gpus() or 2)


def check_configuration(overrides: list[str], *, ranks: int, config_dir: str | None) -> list[Finding]:
    """What the overrides configure, against its data and this machine."""
    try:
        with quiet():
            from rec.checkup import checkup  # takes seconds
    except Exception as error:  # as of `check_kernels`
        problem = f"the configuration was not looked at: {type(error).__name__}: {error}"
        return [Finding("configuration", "unknown", problem, FRESH)]
    return checkup(overrides, ranks=ranks, memory=memory_bytes(), config_dir=config_dir)


def parse() -> argparse.Namespace:
    """The command line."""
    description = (
        "Looks at the installation and the machine; with settings, as of rec.train, also whether the configuration composes, "
        "its data can be read, and the run has room. Exits with 1 if something is wrong, and says what to do."
    )
    parser = argparse.ArgumentParser(prog="python -m rec.doctor", description=description)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. experiment=quickstart")
    parser.add_argument("--ranks", type=int, help="ranks on this machine; default: $NPROC, else one a GPU, else 2")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder laid out like conf/, for your own YAML")
    args = parser.parse_intermixed_args()
    if args.ranks is not None and args.ranks < 1:
        parser.error(f"--ranks is {args.ranks}, expected 1 or more")
    return args


def main() -> int:
    """Print the report; exit code 0 if all is well, else 1."""
    args = parse()
    findings = [finding for check in CHECKS for finding in check()]
    if args.overrides:
        ranks = args.ranks or default_ranks()
        findings += check_configuration(args.overrides, ranks=ranks, config_dir=args.config_dir)
    print(render(findings))
    return int(any(f.problem for f in findings))


if __name__ == "__main__":
    sys.exit(main())
