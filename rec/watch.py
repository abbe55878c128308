"""Who stands still? Every rank gives signs of life; one that stops moving is named, with the stack of every thread.

A thread of every rank tells the others, through torchrun's store, what its main thread is doing and since when. Where nothing has moved
for `stall_s` seconds, each rank writes its stacks into `stacks/rank_N.txt` of the run folder, rank 0 says which rank is behind all
others, and rank 1 says so of rank 0. Of a process that cannot even do that, because something in it holds the interpreter, a rank on
the same host has `faulthandler` show the stacks. Not by its timer: that goes off while threads run, when a process was stopped and
goes on, and walking frames that change can crash it.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from rec.distributed import Rank
from rec.storage import is_local

_SHOW_STACKS = signal.SIGRTMAX - 1  # to standard error; no scheduler uses it
_DONE = "done"
_PATIENCE_S = 60  # after SIGTERM a rank that does not move for so long will not come to save


@dataclass
class Beat:
    """A sign of life.

    Attributes:
        step: steps done.
        doing: what the main thread is doing.
        moves: how often it has said so.
        seconds: since it last did.
        host, pid: where it runs.
        born: when the process began, as the kernel counts: tells it from another of the same number.
    """

    step: int = 0
    doing: str = "starting"
    moves: int = 0
    seconds: float = 0.0
    host: str = ""
    pid: int = 0
    born: str = ""


class Watch:
    """Watches this rank, and from rank 0 all of them, while it is entered.

    Args:
        rank: this process among its peers.
        run_dir: the run's folder.
        stall_s: seconds without any movement after which a rank is reported; less than the time-out of collectives.
        report: what is done with a report, on the rank that makes it.
        told: whether this process was told to stop; if so, it ends itself when it cannot come to that.
    """

    def __init__(
        self,
        rank: Rank,
        run_dir: Path,
        *,
        stall_s: float,
        report: Callable[[str], None],
        told: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank = rank
        self.stall_s = stall_s
        self.folder = (run_dir if is_local(run_dir) else Path(tempfile.gettempdir()) / f"rec_{os.getpid()}") / "stacks"
        self._report = report
        self._told = told
        self._own = Beat(host=socket.gethostname(), pid=os.getpid(), born=_process(os.getpid())[1])
        self._moved = time.monotonic()
        self._ended = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last beat, and when that came
        self._reported: set[tuple[int, int]] = set()  # (rank, moves)

    def moving(self, doing: str, *, step: int) -> None:
        """Say what the main thread begins to do; costs less than a microsecond."""
        own = self._own
        own.doing, own.step, own.moves, self._moved = doing, step, own.moves + 1, time.monotonic()

    def __enter__(self) -> "Watch":
        if sys.__stderr__:
            faulthandler.register(_SHOW_STACKS, file=sys.__stderr__)  # for good: without it the signal would kill
        self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(timeout=5)
        if kind is None and not self._thread.is_alive():  # else the store may be out of reach
            self._own.doing = _DONE
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._tell()

    def _run(self) -> None:
        written, pause = -1, 0.0
        while not self._ended.wait(pause):
            pause = min(5.0, self.stall_s / 4)
            if self._own.moves != written and self._still() > self.stall_s:
                written = self._own.moves
                self._write_stacks()
            try:
                self._tell()
                self._look()
            except (dist.DistError, RuntimeError) as error:  # the store is gone: its host has ended
                if not self._ended.is_set():
                    print(f"[rank {self.rank.rank}] no store to tell signs of life to: {error}", file=sys.stderr)
                return
            if self._told() and self._still() > _PATIENCE_S and self._own.doing != "saving":
                print(
                    f"[rank {self.rank.rank}] told to stop, and stuck in {self._own.doing} of step {self._own.step}",
                    file=sys.stderr,
                )
                os._exit(1)

    def _write_stacks(self) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"{names.get(ident, 'thread')} ({ident}):\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
        ]
        text = "\n".join(reversed(stacks))  # the main thread's first
        with contextlib.suppress(OSError):  # somebody has removed the run's folder, or filled its disk
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"rank_{self.rank.rank}.txt").write_text(text)

    def _still(self) -> float:
        return time.monotonic() - self._moved

    def _tell(self) -> None:
        self._own.seconds = round(self._still(), 1)
        self._store.set(f"beat/{self.rank.rank}", json.dumps(vars(self._own)))

    def _look(self) -> None:
        """Rank 0 looks at all ranks; rank 1 at rank 0, which cannot report itself."""
        ranks = range(self.rank.world_size) if self.rank.is_main else [0] * (self.rank.rank == 1)
        beats = {}
        for other in ranks:
            said = self._store.get(f"beat/{other}").decode() if self._store.check([f"beat/{other}"]) else ""
            if said != self._seen.get(other, ("-", 0.0))[0]:
                self._seen[other] = said, time.monotonic()
            beat = Beat(**json.loads(said or "{}"))
            if said and beat.doing != _DONE:
                beats[other] = beat
        silent = {other: time.monotonic() - self._seen[other][1] for other in beats}
        for other, seconds in silent.items():
            if seconds > self.stall_s:
                self._say(other, beats[other], f"has given no sign of life for {seconds:.0f} s", ask=True)
        still = [beat for beat in beats.values() if beat.seconds > self.stall_s]
        if self.rank.is_main and len(still) == len(beats) and not any(s > self.stall_s for s in silent.values()):
            behind = min(beat.moves for beat in beats.values())
            for other, beat in beats.items():
                if beat.moves == behind:
                    self._say(
                        other, beat, f"has not moved for {beat.seconds:.0f} s, in {beat.doing} of step {beat.step}"
                    )

    def _say(self, other: int, beat: Beat, what: str, *, ask: bool = False) -> None:
        if (other, beat.moves) in self._reported:
            return
        self._reported.add((other, beat.moves))
        stacks = self.folder / f"rank_{other}.txt"
        why = f": {self._ask(beat)}" if ask else f"; stacks of its threads: {stacks}"
        self._report(f"rank {other} ({beat.host}, process {beat.pid}) {what}{why}")
        if not ask and stacks.is_file():  # else they are of an earlier time
            print(stacks.read_text(), file=sys.stderr, flush=True)

    def _ask(self, beat: Beat) -> str:
        """Why a process is silent; where it can be asked for its stacks, it is."""
        state, born = _process(beat.pid)
        if beat.host != self._own.host or (born and born != beat.born):  # or of another container
            return f"its process is stopped, its interpreter is blocked (py-spy dump --pid {beat.pid} shows where), or its host is cut off"
        if not born:
            return "its process is gone"
        if state in "Tt":
            return "its process is stopped"
        with contextlib.suppress(OSError):
            os.kill(beat.pid, _SHOW_STACKS)
        return "its interpreter is blocked; the stacks of its threads are in what it prints"


def _process(pid: int) -> tuple[str, str]:
    """State and time of birth of a process of this host, as /proc has them; empty where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
