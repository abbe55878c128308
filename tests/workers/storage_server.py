"""An S3 server as a process of its own, and in front of it a proxy that fails on command."""

import contextlib
import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "rec-test"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path and query match.

    `kind` is a status to answer with, `cut` to end in the middle of the body, or `hang` to say nothing for `hang_s`.
    """

    kind: int | str
    match: str
    method: str = "GET"
    times: int = 1_000_000
    hang_s: float = 5.0


@dataclass
class Store:
    """Where the server and the proxy listen on this machine, what is to fail, and what did."""

    server_port: int
    proxy_port: int = 0
    faults: list[Fault] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # paths of the requests that failed, in their order
    served: list[str] = field(default_factory=list)  # method and path of all
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        """What points the tools at the proxy."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy_port}",
            "AWS_ACCESS_KEY_ID": "dummy",
            "AWS_SECRET_ACCESS_KEY": "dummy",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.served.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.match, path):
                    fault.times -= 1
                    self.failed.append(path)
                    return fault
        return None

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Speak to the server, past the proxy and every cache."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            answer = connection.getresponse()
            got = answer.read()
            assert answer.status < 300, (method, path, answer.status, got)
            return got


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.store.fault_of(self.command, self.path)
        if fault and isinstance(fault.kind, int):
            self._answer(fault.kind, {}, b"")
        elif fault and fault.kind == "hang":
            time.sleep(fault.hang_s)
            self.close_connection = True
        else:
            self._pass_on(body, cut=fault is not None)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def _pass_on(self, body: bytes, *, cut: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.store.server_port, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read(), cut=cut)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *args: object) -> None:
        """Nothing: requests are in `Store.served`."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """Nothing: clients that gave up waiting."""


@contextlib.contextmanager
def running_store() -> Iterator[Store]:
    """A server with one bucket, and the proxy before it."""
    store = Store(_free_port())
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(store.server_port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = _Server(("127.0.0.1", 0), type("_BoundProxy", (_Proxy,), {"store": store}))
    store.proxy_port = proxy.server_address[1]
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        _wait_for(server, store.server_port)
        store.request("PUT", f"/{BUCKET}")
        yield store
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.terminate()
        server.wait(timeout=20)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait_for(server: subprocess.Popen, port: int) -> None:
    for _ in range(300):
        assert server.poll() is None, "the S3 server ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError("the S3 server does not answer")
