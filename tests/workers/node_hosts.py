"""Hosts on one machine: network namespaces joined by a bridge where this process may make them, else loopback addresses."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PORT = 29500
_numbers = itertools.count()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Host:
    """One host: an address of its own and, in a namespace, a cable of its own."""

    address: str
    mark: str  # in the environment of all processes of this host, by which they are found
    interface: str = "lo"
    namespace: str | None = None
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, command: list[str], *, log: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
        """Start `command` on this host, its output appended to `log`."""
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        own = {"REC_TEST_HOST": self.mark, "LOCAL_ADDR": self.address, "GLOO_SOCKET_IFNAME": self.interface}
        with log.open("a") as output:
            process = subprocess.Popen(
                [*inside, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, **own},
                start_new_session=True,
                text=True,
            )
        self.started.append(process)
        return process

    def processes(self, variable: bytes = b"") -> list[int]:
        """The ids of all that runs on this host, ranks in sessions of their own included; or of what has `variable` set."""
        wanted = f"REC_TEST_HOST={self.mark}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile
                variables = (entry / "environ").read_bytes().split(b"\0")
                if wanted in variables and any(v.startswith(variable) for v in variables):
                    found.append(int(entry.name))
        return found

    def ranks(self) -> list[int]:
        """The ids of the ranks."""
        return self.processes(b"LOCAL_RANK=")

    def send(self, number: signal.Signals) -> None:
        """A signal to everything on this host at once."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def kill(self) -> None:
        """Everything on this host ends at once, as when the power fails."""
        self.send(signal.SIGKILL)
        for process in self.started:
            process.wait(timeout=20)

    def cable(self, state: str) -> None:
        """Pull the cable, `down`, or plug it in, `up`; only in a namespace."""
        assert self.namespace
        _ip("link", "set", f"{self.namespace}v", state)


def _namespaces(stack: contextlib.ExitStack, count: int) -> list[Host]:
    """Raises `CalledProcessError` or `FileNotFoundError` where this process may not make them."""
    name = f"r{os.getpid()}n{next(_numbers)}"  # interface names have 15 characters at most
    _ip("link", "add", f"{name}b", "type", "bridge")
    stack.callback(_ip, "link", "del", f"{name}b")
    _ip("link", "set", f"{name}b", "up")
    return [_namespace(stack, f"{name}{chr(ord('p') + i)}", f"{name}b", f"10.201.7.{i + 1}") for i in range(count)]


def _namespace(stack: contextlib.ExitStack, name: str, bridge: str, address: str) -> Host:
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)  # takes the cable with it
    _ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", f"{name}v", "master", bridge, "up")
    for arguments in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
        _ip("-n", name, *arguments)
    _ip("-n", name, "link", "set", "lo", "up")
    return Host(address, name, interface="eth0", namespace=name)


def _loopback(count: int) -> list[Host]:
    name = f"r{os.getpid()}n{next(_numbers)}"
    return [Host(f"127.0.0.{i + 2}", f"{name}-{i}") for i in range(count)]


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """`count` hosts that reach each other; at the end all that runs on them is killed and they are gone."""
    with contextlib.ExitStack() as stack:
        try:
            made = _namespaces(stack, count)
        except (subprocess.CalledProcessError, FileNotFoundError):
            stack.close()
            made = _loopback(count)
        for host in made:
            stack.callback(host.kill)
        yield made


def wait_until(condition: Callable[[], bool], *, timeout: float, what: str) -> float:
    """Seconds until `condition` held."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(0.05)
    return time.monotonic() - start


def copy_launch(root: Path, folder: Path) -> Path:
    """node.sh in a folder without .venv, so that it takes torchrun from PATH."""
    shutil.copytree(root / "launch", folder / "launch")
    return folder / "launch" / "node.sh"
