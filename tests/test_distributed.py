import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, torchrun

WORKER = "tests/workers/ending_worker.py"


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_failing_rank_ends_the_job_with_its_traceback_last_and_once(toy: Path, tmp_path: Path, failing: str) -> None:
    started = time.monotonic()
    done = torchrun(WORKER, str(toy), str(tmp_path / "run"), failing, check=False)
    assert time.monotonic() - started < 60  # starting takes most of it; a rank left waiting would take minutes
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert output.count("RuntimeError: the disk is on fire") == 1
    assert output.count("in fail") == 1  # the frame that raised
    last = output[output.index("Root Cause") :]
    assert "the disk is on fire" in last and f"rank      : {failing} " in last


def test_an_exception_without_torchrun_prints_one_traceback_and_fails() -> None:
    code = "from rec.distributed import run_entry\ndef boom(): raise KeyError('lost')\nrun_entry(boom)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 and done.stderr.rstrip().endswith("KeyError: 'lost'")


def test_messages_for_users_come_without_a_traceback() -> None:
    code = "from rec.distributed import run_entry\ndef boom(): raise ValueError('lr is -1')\nrun_entry(boom, quiet=(ValueError,))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "ValueError: lr is -1\n")


@pytest.mark.slow
def test_fifty_endings_in_a_row_are_clean(toy: Path, tmp_path: Path) -> None:
    for number in range(50):
        done = torchrun(WORKER, str(toy), str(tmp_path / str(number)), ranks=2)
        assert "all steps done at step 4" in done.stdout
        assert not re.search(r"terminate called|Traceback|SIGABRT", done.stderr), done.stderr
