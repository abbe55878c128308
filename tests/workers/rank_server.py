"""Starts the ranks of many tests from one process that has imported everything: each is forked, and starts in a second.

Reads a job a line of JSON from stdin: {"script": [PATH, ARGS...], "ranks": N, "log": PATH, "timeout": S}.
Answers each with a line: the exit code, or "timeout". The ranks run under torch's elastic agent, as torchrun has them do;
what they print goes to the log.
"""

import json
import os
import runpy
import signal
import sys
import time
import traceback

from torch.distributed.launcher.api import elastic_launch

from tests.workers.elastic_worker import one_machine  # with it comes all that a rank imports

POLL_S = 0.02


def rank_main(script: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the agent's
    sys.argv = script
    runpy.run_path(script[0], run_name="__main__")


def launch(job: dict) -> None:
    """The job, in a process of its own."""
    os.setpgrp()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    elastic_launch(one_machine(job["ranks"]), rank_main)(job["script"])


def answer(job: dict) -> str:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            launch(job)
            code = 0
        except BaseException:  # whatever it is: this process must not go on as a second server
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + job["timeout"]
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(POLL_S)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timeout"


if __name__ == "__main__":
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)
