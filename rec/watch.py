"""Who stands still? Every rank gives signs of life; one that stops moving is named, with the stack of every thread.

A thread of every rank tells the others, through torchrun's store, what its main thread is doing and since when. Where nothing has moved for
`stall_s` seconds, rank 0 says which rank is behind all others, and rank 1 says so of rank 0. Stacks are written by `faulthandler`, whose
timer does not need Python to be able to run: into `stacks/rank_N.txt` of the run folder.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from rec.distributed import Rank
from rec.storage import is_local

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
    """

    step: int = 0
    doing: str = "starting"
    moves: int = 0
    seconds: float = 0.0
    host: str = ""
    pid: int = 0


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
        self._own = Beat(host=socket.gethostname(), pid=os.getpid())
        self._moved = time.monotonic()
        self._ended = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last beat, and when that came
        self._reported: set[tuple[int, int]] = set()  # (rank, moves)

    def moving(self, doing: str, *, step: int) -> None:
        """Say what the main thread begins to do; costs less than a microsecond."""
        own = self._own
        own.doing, own.step, own.moves, self._moved = doing, step, own.moves + 1, time.monotonic()

    def __enter__(self) -> "Watch":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stacks = (self.folder / f"rank_{self.rank.rank}.txt").open("w")
        self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        with contextlib.suppress(OSError):  # another rank may be at it too, or somebody has removed the folder
            if not os.path.getsize(self._stacks.name):
                os.unlink(self._stacks.name)
            self.folder.rmdir()  # if it is empty

    def _run(self) -> None:
        moves = -1
        while not self._ended.wait(min(5.0, self.stall_s / 4) if moves >= 0 else 0):
            if self._own.moves != moves:  # else the timer of the last movement goes on
                moves = self._own.moves
                faulthandler.dump_traceback_later(max(0.1, self.stall_s - self._still()), file=self._stacks)
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
            if said:
                beats[other] = Beat(**json.loads(said))
        silent = {other: time.monotonic() - self._seen[other][1] for other in beats}
        for other, seconds in silent.items():
            if seconds > self.stall_s:
                self._say(
                    other,
                    beats[other],
                    f"has given no sign of life for {seconds:.0f} s: its process is stopped, or its host is cut off",
                )
        still = [beat for beat in beats.values() if beat.seconds > self.stall_s]
        if self.rank.is_main and len(still) == len(beats) and not any(s > self.stall_s for s in silent.values()):
            behind = min(beat.moves for beat in beats.values())
            for other, beat in beats.items():
                if beat.moves == behind:
                    self._say(
                        other, beat, f"has not moved for {beat.seconds:.0f} s, in {beat.doing} of step {beat.step}"
                    )

    def _say(self, other: int, beat: Beat, what: str) -> None:
        if (other, beat.moves) in self._reported:
            return
        self._reported.add((other, beat.moves))
        stacks = self.folder / f"rank_{other}.txt"
        text = f"rank {other} ({beat.host}, process {beat.pid}) {what}; stacks of its threads: {stacks}"
        self._report(text)
        if stacks.is_file():
            print(stacks.read_text(), file=sys.stderr, flush=True)
