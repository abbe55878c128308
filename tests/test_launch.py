"""The scripts run for real, in a copy of launch/ where Python, torchrun and Slurm are stand-ins that log calls."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rec.config import compose

ROOT = Path(__file__).resolve().parents[1]
VERSION = platform.python_version()
SCRIPTS = [
    *sorted(p for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch") and p.name != "env.sh"),
    ROOT / ".ci" / "run",
]

# Logs the calls `-m venv`, `-m pip`, `-m pytest` and `-m rec.*` and fakes them; any other goes to a real Python.
# A file `fail` holds a word: calls that contain it fail. A file `installed` lists the distributions.
PYTHON_STUB = r"""#!/usr/bin/env bash
case "$*" in
"-m pip --version") exit 0 ;;
"-m pip show"*) grep -qx -- "${@: -1}" installed; exit ;;
"-m "*) echo "$*" >>calls ;;
*) exec REAL_PYTHON "$@" ;;
esac
if [[ -f fail && "$*" == *"$(<fail)"* ]]; then exit 1; fi
if [[ "$2" == venv ]]; then
    rm -rf .venv && mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    cp stubs/torchrun .venv/bin/torchrun
    echo "version = REAL_VERSION" >.venv/pyvenv.cfg
fi
"""
LOG_STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $* OMP=${OMP_NUM_THREADS:-}" >>calls
"""


class Repository:
    """A copy of the scripts with stand-ins for what they call."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(ROOT / "launch", root / "launch")
        shutil.copytree(ROOT / ".ci", root / ".ci")
        shutil.copy(ROOT / "pyproject.toml", root)
        (root / "installed").touch()
        self.write(
            "bin/python3.13", PYTHON_STUB.replace("REAL_PYTHON", sys.executable).replace("REAL_VERSION", VERSION)
        )
        self.write("stubs/torchrun", LOG_STUB)

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        path = f"{self.root / 'bin'}:/usr/bin:/bin"
        return {"PATH": path, "HOME": str(self.root), "CUDA_VISIBLE_DEVICES": ""} | variables

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(self.root / script), *arguments],
            env=self.environment(**variables),
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[str]:
        """The calls since the last time this was asked."""
        log = self.root / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


@pytest.fixture
def installed(repository):
    """A repository after a successful set-up."""
    assert repository.run("launch/setup.sh").returncode == 0
    repository.calls()
    return repository


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_is_executable_strict_and_parses(script):
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_prints_the_header_and_does_nothing(repository, script, flag):
    done = repository.run(str(script.relative_to(ROOT)), flag)
    assert (done.returncode, done.stderr) == (0, "")
    header = script.read_text().splitlines()[1]
    assert done.stdout.splitlines()[0] == header.removeprefix("# ")
    assert f"{script.parent.name}/{script.name}" in done.stdout
    assert not any(word in done.stdout for word in ("#SBATCH --", "set -euo"))
    assert repository.calls() == []


class TestSetup:
    def test_installs_torch_first_and_torchrec_last(self, repository):
        done = repository.run("launch/setup.sh")
        assert done.returncode == 0, done.stderr
        venv, torch, rec, torchrec, doctor = repository.calls()
        assert venv == "-m venv --clear .venv"
        assert torch == "-m pip install --quiet torch==2.13.0"
        assert rec == "-m pip install --quiet -e .[cpu,test]"
        assert torchrec == "-m pip install --quiet --no-deps torchrec==1.8.0"
        assert doctor == "-m rec.doctor"

    def test_second_run_does_nothing(self, installed):
        start = time.monotonic()
        done = installed.run("launch/setup.sh")
        assert time.monotonic() - start < 1
        assert (done.returncode, done.stdout) == (0, f"[setup] .venv is up to date (cpu, Python {VERSION})\n")
        assert installed.calls() == []

    def test_changed_pyproject_installs_into_the_same_venv(self, installed):
        with (installed.root / "pyproject.toml").open("a") as file:
            file.write("# changed\n")
        assert installed.run("launch/setup.sh").returncode == 0
        calls = installed.calls()
        assert len(calls) == 4
        assert not any("venv" in call for call in calls)

    def test_fresh_makes_the_venv_again(self, installed):
        assert installed.run("launch/setup.sh", "--fresh").returncode == 0
        assert installed.calls()[0] == "-m venv --clear .venv"

    @pytest.mark.parametrize("step", ["torch==", "[cpu,test]", "torchrec==", "rec.doctor", "venv"])
    def test_failed_step_leaves_no_stamp_and_runs_again(self, repository, step):
        (repository.root / "fail").write_text(step)
        done = repository.run("launch/setup.sh")
        assert done.returncode == 1
        assert "[setup] FAILED: " in done.stderr
        assert not (repository.root / ".venv" / "setup-stamp").exists()
        assert step in repository.calls()[-1]  # nothing after the step that failed
        (repository.root / "fail").unlink()
        assert repository.run("launch/setup.sh").returncode == 0

    def test_failure_after_a_success_spoils_it(self, installed):
        pyproject = installed.root / "pyproject.toml"
        before = pyproject.read_text()
        pyproject.write_text(before + "# changed\n")
        (installed.root / "fail").write_text("torchrec==")
        assert installed.run("launch/setup.sh").returncode == 1
        pyproject.write_text(before)  # what was installed for the change is still in .venv
        assert installed.run("launch/setup.sh").returncode == 1

    def test_failed_download_names_the_remedies(self, repository):
        (repository.root / "fail").write_text("torch==")
        done = repository.run("launch/setup.sh")
        for word in ("install torch==2.13.0", "again", "HTTPS_PROXY", "PIP_CERT", "PIP_DEFAULT_TIMEOUT"):
            assert word in done.stderr

    def test_other_device_removes_both_builds_of_fbgemm_first(self, installed):
        (installed.root / "installed").write_text("fbgemm-gpu-cpu\n")
        assert installed.run("launch/setup.sh", REC_DEVICE="cuda").returncode == 0
        remove, torch, rec, *_ = installed.calls()
        assert remove == "-m pip uninstall --quiet --yes fbgemm-gpu fbgemm-gpu-cpu torch"
        assert torch == "-m pip install --quiet torch==2.13.0,!=2.13.0+cpu"
        assert rec.endswith(".[cuda,test]")

    def test_gpus_choose_cuda(self, repository):
        repository.write("bin/nvidia-smi", '#!/bin/sh\necho "GPU 0: NVIDIA"\n')
        environment = repository.environment()
        del environment["CUDA_VISIBLE_DEVICES"]
        script = repository.root / "launch" / "setup.sh"
        subprocess.run([script], env=environment, check=True, capture_output=True)
        assert any(call.endswith(".[cuda,test]") for call in repository.calls())

    def test_moved_checkout_is_noticed(self, installed, tmp_path_factory):
        moved = tmp_path_factory.mktemp("moved") / "rec"
        shutil.copytree(installed.root, moved)
        subprocess.run([moved / "launch" / "setup.sh"], env=installed.environment(), check=True, capture_output=True)
        assert (moved / "calls").exists()

    def test_no_usable_python_says_what_was_tried(self, repository):
        old = '#!/bin/sh\necho "$0" >&2\nexit 1\n'
        for name in ("python3.13", "python3.12", "python3.11", "python3"):
            repository.write(f"bin/{name}", old)
        done = repository.run("launch/setup.sh")
        assert done.returncode == 1
        assert "tried python3.13 python3.12 python3.11 python3, need 3.11, 3.12 or 3.13" in done.stderr
        assert not (repository.root / ".venv").exists()

    def test_named_python_that_is_missing(self, repository):
        done = repository.run("launch/setup.sh", PYTHON="/no/such/python")
        assert done.returncode == 1
        assert "tried /no/such/python" in done.stderr

    def test_named_python_of_another_version_makes_the_venv_again(self, installed):
        python = str(installed.root / "bin" / "python3.13")
        assert installed.run("launch/setup.sh", PYTHON=python).returncode == 0
        assert installed.calls() == []
        (installed.root / ".venv" / "pyvenv.cfg").write_text("version = 3.12.1\n")
        assert installed.run("launch/setup.sh", PYTHON=python).returncode == 0
        assert installed.calls()[0] == "-m venv --clear .venv"

    @pytest.mark.skipif(shutil.which("flock") is None, reason="without flock two set-ups do not wait for each other")
    def test_second_setup_waits_for_the_first(self, repository):
        script, environment = repository.root / "launch" / "setup.sh", repository.environment()
        both = [subprocess.Popen([script], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        printed = sorted(setup.communicate(timeout=30)[0] for setup in both)
        assert "up to date" in printed[0]
        assert len(repository.calls()) == 5

    def test_bad_arguments(self, repository):
        assert "'--frsh'" in repository.run("launch/setup.sh", "--frsh").stderr
        done = repository.run("launch/setup.sh", REC_DEVICE="gpu")
        assert done.returncode == 1
        assert "REC_DEVICE is 'gpu', expected cpu or cuda" in done.stderr


class TestTest:
    def test_default_leaves_out_slow_and_gpu(self, installed):
        done = installed.run("launch/test.sh")
        assert installed.calls() == ["-m pytest -m not slow and not gpu --numprocesses 2 --dist loadfile"]
        assert "+ .venv/bin/python -m pytest -m" in done.stdout

    def test_arguments_are_passed_on(self, installed):
        installed.run("launch/test.sh", "tests/test_a.py", "-k", "a b")
        assert installed.calls() == ["-m pytest tests/test_a.py -k a b"]

    def test_failure_is_the_exit_code(self, installed):
        (installed.root / "fail").write_text("pytest")
        assert installed.run("launch/test.sh").returncode == 1


class TestQuickstart:
    def test_runs_everything_in_order(self, installed):
        done = installed.run("launch/quickstart.sh", "seed=1", ROWS="1000", OMP_NUM_THREADS="7")
        assert done.returncode == 0, done.stderr
        torchrun = "torchrun --standalone --nproc-per-node 2 -m"
        assert installed.calls() == [
            "-m rec.simulate --out data/market --rows 1000 --seed 0",
            f"{torchrun} rec.train experiment=quickstart run_dir=runs/quickstart checkpoint.resume=auto seed=1 OMP=7",
            f"{torchrun} rec.calibrate run_dir=runs/quickstart OMP=7",
            "-m rec.export run_dir=runs/quickstart",
            f"{torchrun} rec.evaluate run_dir=runs/quickstart predictions=true OMP=7",
        ]
        assert "runs/quickstart/metrics.jsonl" in done.stdout
        assert "tensorboard --logdir runs" in done.stdout

    @pytest.mark.parametrize("step", ["rec.simulate", "rec.train", "rec.calibrate", "rec.export", "rec.evaluate"])
    def test_stops_where_a_step_fails(self, installed, step):
        installed.write(".venv/bin/torchrun", '#!/bin/bash\n[[ "$*" != *"$(<fail)"* ]]\n')
        (installed.root / "fail").write_text(step)
        done = installed.run("launch/quickstart.sh")
        assert done.returncode == 1
        assert step in done.stdout.strip().splitlines()[-1]  # the last command that was echoed

    def test_evaluates_the_run_that_was_trained(self, installed):
        done = installed.run("launch/quickstart.sh", "run_dir=runs/other")
        assert "run_dir=runs/other predictions=true OMP" in installed.calls()[-1]
        assert "runs/other/metrics.jsonl" in done.stdout


class TestStudy:
    def test_etsy_trains_every_arm_in_every_world_and_compares(self, installed):
        done = installed.run("launch/study.sh", "etsy", "optim.dense.lr=0.1", SEEDS="0 7", ROWS="1000", OUT="out")
        assert done.returncode == 0, done.stderr
        calls = installed.calls()
        experiments = [p.stem for p in sorted((ROOT / "conf" / "experiment").glob("etsy_*.yaml"))]
        for seed in ("0", "7"):
            assert f"-m rec.simulate --out data/worlds/{seed} --rows 1000 --seed {seed}" in calls
            for name in experiments:
                folder = f"run_dir=out/etsy/{name}/{seed}"
                (trained,) = (i for i, call in enumerate(calls) if "rec.train" in call and f"{folder} " in call)
                assert f"seed={seed} {folder} experiment={name} data.path=data/worlds/{seed} " in calls[trained]
                assert calls[trained].endswith("optim.dense.lr=0.1 OMP=1")
                assert calls[trained + 1].endswith(f"rec.evaluate {folder} predictions=true OMP=1")
        assert len(calls) == 2 + 2 * 2 * len(experiments) + 2
        assert "--reference out/etsy/etsy_mmoe/0 out/etsy/etsy_mmoe/7 --candidate" in calls[-1]
        names = calls[-2].partition(" --names ")[2].split(" --")[0].split()
        assert sorted(names) == experiments and names[0] == "etsy_shared_bottom"
        sides = [f"out/etsy/{name}/0 out/etsy/{name}/7" for name in names]
        assert f"rec.compare --reference {' --candidate '.join(sides)} --names" in calls[-2]
        assert "tables are in out/etsy" in done.stdout

    def test_what_is_done_is_not_done_again(self, installed):
        installed.write("out/etsy/etsy_mmoe/0/predictions/test/part-00000.parquet", "")
        installed.run("launch/study.sh", "etsy", SEEDS="0", OUT="out")
        assert not [call for call in installed.calls() if "run_dir=out/etsy/etsy_mmoe/0 " in call]

    def test_kuairand_compares_architectures_of_one_size_and_calibrates(self, installed):
        done = installed.run("launch/study.sh", "kuairand", SEEDS="3", RAW="/raw", OUT="out")
        assert done.returncode == 0, done.stderr
        calls = installed.calls()
        assert calls[0] == "-m rec.prepare kuairand --raw /raw --out data/kuairand"
        trained = [call.split("experts=")[1].split()[0] for call in calls if "rec.train" in call and "experts=" in call]
        assert trained == ["shared_bottom", "mmoe", "ple"]
        assert sum("-m rec.widen experiment=kuairand experts=" in call for call in calls) == 3
        assert "rec.calibrate run_dir=out/kuairand/calibrated" in calls[-1] and "--valid-days 1" in calls[-3]

    @pytest.mark.parametrize(
        ("study", "trained", "compared"),
        [
            ("taobao", 10, 3),
            ("apps", 6, 1),
            ("mtmd", 4 + 4, 1),
            ("kuairand_din", 2, 1),
            ("kuairand_tabs", 2 + 15, 1),
            ("census", 7 + 7, 0),
            ("adult", 7 + 7, 0),
        ],
    )
    def test_every_arm_of_a_study_is_trained_and_every_override_composes(self, installed, study, trained, compared):
        done = installed.run("launch/study.sh", study, SEEDS="3", RAW="/raw", OUT="out")
        assert done.returncode == 0, done.stderr
        calls = installed.calls()
        trained_with = [call.split("rec.train ")[1] for call in calls if "rec.train " in call]
        trainings = [[word for word in call.split() if not word.startswith("OMP=")] for call in trained_with]
        assert len(trainings) == trained
        assert sum("rec.compare" in call for call in calls) == compared
        for overrides in trainings:
            compose(overrides)

    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            ([], 1, "name a study, e.g. etsy"),
            (["esty"], 2, "study 'esty' is not known"),
            (["kuairand"], 2, "set RAW"),
            (["census"], 2, "set RAW"),
            (["apss"], 2, "names them: etsy taobao apps mtmd kuairand kuairand_din kuairand_tabs census | adult"),
        ],
    )
    def test_bad_arguments(self, installed, arguments, code, said):
        done = installed.run("launch/study.sh", *arguments)
        assert done.returncode == code and said in done.stderr


class TestTrain:
    def test_one_rank_a_gpu(self, installed):
        done = installed.run("launch/train.sh", "seed=1", REC_DEVICE="cpu", NPROC="3", MAX_RESTARTS="4")
        assert done.returncode == 0, done.stderr
        assert installed.calls()[0].startswith(
            "torchrun --standalone --max-restarts 4 --nproc-per-node 3 -m rec.train seed=1"
        )

    def test_ranks_follow_the_visible_gpus(self, installed):
        installed.run("launch/train.sh", REC_DEVICE="cuda")  # sets up again, for that device
        installed.calls()
        installed.run("launch/train.sh", REC_DEVICE="cuda", CUDA_VISIBLE_DEVICES="0,2,5")
        assert "--nproc-per-node 3 " in installed.calls()[0]

    @pytest.mark.parametrize("flag", ["-m", "--multirun"])
    def test_a_sweep_starts_its_own_torchruns(self, installed, flag):
        installed.run("launch/train.sh", "seed=0,1", flag)
        assert installed.calls() == [f"-m rec.train seed=0,1 {flag}"]

    def test_nproc_that_is_no_number(self, installed):
        done = installed.run("launch/train.sh", NPROC="two")
        assert done.returncode == 2
        assert "NPROC is 'two'" in done.stderr


FULL = {"NNODES": "2", "MASTER": "node-a:29500", "JOB_ID": "7"}


# Ranks under torchrun: TERM makes them write the file, as far as `writes` is there, and torchrun end with 1.
STOPPING_TORCHRUN = """#!/usr/bin/env bash
echo "timeout $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >>calls
trap 'echo told >>calls; if [[ -f writes ]]; then echo 12 >"$REC_STOPPED_FILE"; fi; sleep 0.3; exit 1' TERM
echo "$REC_STOPPED_FILE" >file.new; mv file.new file
for _ in {1..400}; do sleep 0.05; done
"""


@pytest.mark.parametrize("script", ["train.sh", "node.sh"])
class TestStop:
    """The scripts stand between a scheduler's signals and torchrun, and between torchrun's exit code and the scheduler."""

    @pytest.fixture
    def start(self, installed, script):
        installed.write(".venv/bin/torchrun", STOPPING_TORCHRUN)
        jobs = []

        def heed_signals():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(
                    number, signal.SIG_DFL
                )  # nohup ignores one, `&` of a script another, and shells cannot undo it

        def start_and_wait(**variables):
            job = subprocess.Popen(
                [str(installed.root / "launch" / script)],
                env=installed.environment(**FULL, **variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=heed_signals,
            )
            jobs.append(job)
            until = time.monotonic() + 10
            while not (installed.root / "file").exists():
                assert time.monotonic() < until and job.poll() is None, "torchrun was not called"
                time.sleep(0.02)
            return job

        yield start_and_wait
        for job in jobs:
            job.kill()
            job.communicate()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_signal_is_handed_on_and_a_checkpoint_gives_75(self, installed, start, number):
        (installed.root / "writes").touch()
        job = start()
        job.send_signal(number)
        printed, errors = job.communicate(timeout=20)
        assert job.returncode == 75, errors
        assert "stopped at step 12" in printed and "have 150 s" in errors
        assert installed.calls() == ["timeout 150", "told"]
        assert not Path((installed.root / "file").read_text().strip()).exists()

    def test_no_checkpoint_is_torchruns_own_code(self, start):
        job = start()
        job.terminate()
        printed, _ = job.communicate(timeout=20)
        assert job.returncode == 1 and "stopped at step" not in printed

    def test_torchrun_hears_of_it_once(self, installed, start):
        """At a second signal it waits anew, at a third it leaves its ranks behind."""
        (installed.root / "writes").touch()
        job = start(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="40")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            job.send_signal(number)
            time.sleep(0.08)
        _, errors = job.communicate(timeout=20)
        assert job.returncode == 75
        assert "have 40 s" in errors
        assert installed.calls() == ["timeout 40", "told"]

    @pytest.mark.parametrize(
        ("torchrun", "code"),
        [
            ('echo 7 >"$REC_STOPPED_FILE"; exit 1', 75),  # the ranks of another host were told
            ('echo 7 >"$REC_STOPPED_FILE"; exit 0', 0),  # stopped once, gone on, done
            ("exit 3", 3),
            ("exit 0", 0),
        ],
    )
    def test_exit_code_without_a_signal(self, installed, script, torchrun, code):
        installed.write(".venv/bin/torchrun", f"#!/bin/bash\n{torchrun}\n")
        assert installed.run(f"launch/{script}", **FULL).returncode == code


class TestNode:
    @pytest.mark.parametrize("missing", ["NNODES", "MASTER", "JOB_ID"])
    def test_missing_variable_is_named(self, installed, missing):
        variables = {name: value for name, value in FULL.items() if name != missing}
        done = installed.run("launch/node.sh", **variables)
        assert done.returncode == 2
        assert f"{missing} is not set, expected" in done.stderr
        assert installed.calls() == []

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("NNODES", "0"),
            ("NNODES", "0:2"),
            ("NNODES", "4:2"),
            ("NNODES", "1:2:3"),
            ("MASTER", "node-a"),
            ("NODE_RANK", "x"),
            ("MAX_RESTARTS", "some"),
            ("RDZV_CONF", "join_timeout"),
        ],
    )
    def test_wrong_variable_is_named_with_its_value(self, installed, name, value):
        done = installed.run("launch/node.sh", **FULL | {name: value})
        assert done.returncode == 2
        assert f"{name} is '{value}', expected" in done.stderr

    def test_all_problems_at_once(self, repository):
        done = repository.run("launch/node.sh")
        assert done.stderr.count("not set") == 3
        assert "run ./launch/setup.sh once" in done.stderr

    @pytest.mark.parametrize(
        ("variable", "rank", "host"),
        [("NODE_RANK", "0", "true"), ("SLURM_NODEID", "1", "false"), ("JOB_COMPLETION_INDEX", "0", "true")],
    )
    def test_rendezvous(self, installed, variable, rank, host):
        done = installed.run("launch/node.sh", "seed=1", NPROC="4", **FULL, **{variable: rank})
        assert done.returncode == 0, done.stderr
        rendezvous = f"--rdzv-backend c10d --rdzv-endpoint node-a:29500 --rdzv-id 7 --rdzv-conf is_host={host}"
        (call,) = installed.calls()
        start = "torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 0"
        assert call.startswith(f"{start} {rendezvous} -m rec.train seed=1")

    def test_without_a_rank_torchrun_finds_the_host(self, installed):
        installed.run("launch/node.sh", **FULL)
        assert "--rdzv-conf" not in installed.calls()[0]

    @pytest.mark.parametrize(
        ("variables", "restarts", "own_store"),
        [
            ({}, 0, ""),
            ({"MAX_RESTARTS": "2"}, 2, "1"),
            ({"NNODES": "1:4"}, 10, "1"),
            ({"NNODES": "1:4", "MAX_RESTARTS": "0"}, 0, "1"),
        ],
    )
    def test_range_restarts_and_ranks_get_a_new_store_each_time(self, installed, variables, restarts, own_store):
        installed.write(
            ".venv/bin/torchrun", LOG_STUB.replace("OMP=", "store=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-} OMP=")
        )
        installed.run("launch/node.sh", **FULL | variables)
        (call,) = installed.calls()
        assert f"--nnodes {variables.get('NNODES', 2)} " in call
        assert f"--max-restarts {restarts} " in call
        assert f"store={own_store} " in call

    def test_address_and_more_of_the_rendezvous(self, installed):
        more = {"RDZV_CONF": "join_timeout=60,last_call_timeout=5", "LOCAL_ADDR": "10.0.0.2", "NODE_RANK": "1"}
        installed.run("launch/node.sh", **FULL, **more)
        wanted = "--rdzv-conf is_host=false,join_timeout=60,last_call_timeout=5 --local-addr 10.0.0.2 -m rec.train"
        assert wanted in installed.calls()[0]


class TestSlurm:
    """`srun` logs what the job exported and waits to be ended by `scancel`, as a training would."""

    @pytest.fixture
    def cluster(self, installed):
        log = 'echo "$(basename "$0") $*" >>calls\n'
        installed.write("bin/scontrol", f"#!/bin/bash\n{log}[[ $1 == show ]] && printf 'node-a\\nnode-b\\n'; exit 0\n")
        installed.write("bin/scancel", f"#!/bin/bash\n{log}kill -TERM $(<step)\n")
        installed.write("bin/squeue", "#!/bin/bash\n[[ $3 == 12345 ]] && cat state\n")
        (installed.root / "state").write_text("RUNNING\n")
        waiting = "echo $$ >step.new; mv step.new step; exec sleep 60\n"
        installed.write("bin/srun", f"#!/bin/bash\necho $NNODES $MASTER $JOB_ID\n{log}{waiting}")
        return installed

    def environment(self, cluster):
        slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_SUBMIT_DIR": str(cluster.root)}
        return cluster.environment(**slurm)

    def start(self, cluster):
        # Slurm runs a copy of the script.
        copied = shutil.copy(cluster.root / "launch" / "slurm.sbatch", cluster.root / "slurm_script")
        return subprocess.Popen(
            [copied, "seed=1"], env=self.environment(cluster), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for_step(self, cluster):
        for _ in range(200):
            if (cluster.root / "step").exists():
                return
            time.sleep(0.02)
        raise AssertionError("srun was not called")

    def ended_at_its_limit(self, cluster, code):
        """A job to which Slurm sends SIGTERM and whose step then ends with `code`."""
        waiting = (
            f"trap 'exit {code}' TERM; echo $$ >step.new; mv step.new step; for _ in {{1..400}}; do sleep 0.05; done"
        )
        cluster.write("bin/srun", f'#!/bin/bash\necho $NNODES $MASTER $JOB_ID\necho "srun $*" >>calls\n{waiting}\n')
        job = self.start(cluster)
        self.wait_for_step(cluster)
        job.send_signal(signal.SIGTERM)
        printed, errors = job.communicate(timeout=20)
        assert job.returncode == code, errors
        return printed

    def test_time_limit_ends_the_ranks_and_queues_again(self, cluster):
        assert self.ended_at_its_limit(cluster, 75).startswith("2 node-a:29745 12345-0\n")
        assert cluster.calls() == [
            "scontrol show hostnames node-[a-b]",
            "srun --kill-on-bad-exit=0 --wait=60 --ntasks-per-node=1 ./launch/node.sh run_dir=runs/slurm-12345 seed=1",
            "scancel --signal=TERM 12345",
            "scontrol requeue 12345",
        ]

    @pytest.mark.parametrize(("code", "queued"), [(137, True), (1, False), (0, False)])
    def test_at_the_time_limit_too_slow_is_no_failure(self, cluster, code, queued):
        self.ended_at_its_limit(cluster, code)
        assert ("scontrol requeue 12345" in cluster.calls()) == queued

    @pytest.mark.parametrize(("code", "queued"), [(75, True), (0, False), (1, False), (2, False), (137, False)])
    def test_exit_code_is_that_of_the_training_and_75_queues_again(self, cluster, code, queued):
        """75 without a signal to the script: Slurm told the steps alone, as it does to preempt."""
        cluster.write("bin/srun", f"#!/bin/bash\nexit {code}\n")
        job = self.start(cluster)
        job.communicate(timeout=20)
        assert job.returncode == code
        assert ("scontrol requeue 12345" in cluster.calls()) == queued

    @pytest.mark.parametrize("state", ["COMPLETING\n", ""])
    def test_cancelled_job_is_not_queued_again(self, cluster, state):
        (cluster.root / "state").write_text(state)
        assert "left to Slurm" in self.ended_at_its_limit(cluster, 75)
        assert "scontrol requeue 12345" not in cluster.calls()

    def test_outside_slurm(self, installed):
        done = installed.run("launch/slurm.sbatch")
        assert done.returncode == 2
        assert "submit it with sbatch" in done.stderr


class TestContinuousIntegration:
    @pytest.fixture
    def linted(self, installed):
        for tool in ("ruff", "mypy"):
            installed.write(f".venv/bin/{tool}", LOG_STUB)
        return installed

    def test_runs_the_tests_the_linters_and_the_slow_tests(self, linted):
        done = linted.run(".ci/run")
        assert done.returncode == 0, done.stderr
        assert [call.removesuffix(" OMP=") for call in linted.calls()] == [
            "-m pytest -m not slow and not gpu --numprocesses 2 --dist loadfile",
            "ruff check .",
            "ruff format --check .",
            "mypy ",
            "-m pytest -m slow and not gpu --numprocesses 2 --dist loadfile --no-loadscope-reorder",
        ]

    @pytest.mark.parametrize("tool", ["ruff", "mypy"])
    def test_one_failure_fails_the_run_after_all_stages(self, linted, tool):
        linted.write(f".venv/bin/{tool}", "#!/bin/bash\nexit 1\n")
        done = linted.run(".ci/run")
        assert done.returncode == 1
        assert "[ci] FAILED: " in done.stderr
        assert "-m pytest -m slow and not gpu --numprocesses 2 --dist loadfile --no-loadscope-reorder" in linted.calls()

    def test_failed_setup_fails_the_run(self, repository):
        (repository.root / "fail").write_text("venv")
        done = repository.run(".ci/run")
        assert done.returncode == 1

    def test_tests_on_real_data_must_run(self, linted):
        linted.write(".venv/bin/ruff", '#!/bin/bash\necho "REC_REQUIRE_DATA=$REC_REQUIRE_DATA" >>calls\n')
        linted.run(".ci/run")
        assert "REC_REQUIRE_DATA=1" in linted.calls()


def test_kubernetes_manifest_agrees_with_itself_and_with_node_sh():
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["NNODES"])
    name = job["metadata"]["name"]
    assert environment["MASTER"].startswith(f"{name}-0.{service['metadata']['name']}:")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert (ROOT / container["command"][0]).exists()
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    actions = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)  # one of them, says Kubernetes
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"] and rule["onExitCodes"]["operator"] == "In"
            actions |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
    assert actions == {75: "Ignore", 2: "FailJob"}
    assert pod["restartPolicy"] == "Never"  # else a podFailurePolicy is refused


def test_pre_commit_hooks_are_local():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert {hook["id"] for hook in repo["hooks"]} == {"ruff-check", "ruff-format", "mypy"}
