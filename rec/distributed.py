"""The process group: who this rank is, what it runs on, and an end that is clean every time.

A rank that leaves with TorchRec's collectives still referenced may abort in a C++ destructor after its work is done, which
torchrun reports as a failed job. So a run ends in this order: references dropped, garbage collected, ranks met, group destroyed.
"""

import contextlib
import gc
import json
import logging
import os
import socket
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from rec.interrupts import STOPPED, StoppedError


@dataclass(frozen=True)
class Rank:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes logs and speaks."""
        return self.rank == 0


@contextlib.contextmanager
def process_group(*, timeout_s: float = 600) -> Iterator[Rank]:
    """Join the ranks that torchrun started, or be the only one, and leave cleanly.

    What is built inside must not be referenced outside: leave it to a function called within.

    Args:
        timeout_s: seconds that a rank waits for the others in a collective before it gives up.
    """
    _quieten()
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(_free_port())
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(seconds=timeout_s)
    whole, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store = _of_this_attempt(whole, rank, world_size, timeout_s=timeout_s)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device if cuda else None
    )
    try:
        yield Rank(dist.get_rank(), dist.get_world_size(), device)
        gc.collect()
        dist.barrier()
    finally:
        gc.collect()
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _of_this_attempt(store: dist.Store, rank: int, world_size: int, *, timeout_s: float) -> dist.Store:
    """The part of torchrun's store that no earlier attempt has written to.

    torchrun has one store for all attempts of a job, in which the addresses of dead ranks stay and are taken for those of the living
    (pytorch/pytorch#135712). So rank 0 invents a name, and tells it to each rank that says hello. A hello may be a dead rank's; only the
    living say thanks.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", own)
        name = store.get(f"attempt_of/{own}").decode()  # waits
        store.set(f"thanks/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    missing, end = set(range(1, world_size)), time.monotonic() + timeout_s
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"attempt_of/{store.get(f'hello/{other}').decode()}", own)
            if store.check([f"thanks/{own}/{other}"]):
                missing.discard(other)
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {sorted(missing)} of {world_size} did not come within {timeout_s:g} s")
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


def _quieten() -> None:
    """Drop what torch and torchrec say to each other's developers, on which users have no influence."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\..*")
    for name in ("torch.fx._symbolic_trace", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over all ranks, in place. Ranks wait for each other here."""
    dist.all_reduce(values)
    return values


def from_main(value: object) -> object:
    """Rank 0's `value`, on every rank. Ranks wait for each other here."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def run_entry(entry: Callable[[], None], *, quiet: tuple[type[Exception], ...] = ()) -> None:
    """Run an entry point; on an exception end this process at once, so that torchrun ends the others.

    Under torchrun the traceback goes into torchrun's error file and torchrun prints it, once, as the last thing it says.

    Args:
        entry: what to run.
        quiet: exceptions whose message says enough without a traceback.
    """
    try:
        entry()
    except StoppedError as told:
        print(told, file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if isinstance(error, quiet) else traceback.format_exc()
        _report(error, text)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # not sys.exit: destructors of broken collectives must not hold the process


def _report(error: Exception, text: str) -> None:
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        print(text, file=sys.stderr)
        return
    info = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with open(path, "w") as file:
        json.dump({"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": info}}, file)
