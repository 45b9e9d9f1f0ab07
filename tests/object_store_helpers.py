"""A real S3 server (moto's) in its own process, and a proxy before it that is slow, down, lying or late when told."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "bundles-of-tests"
#: Status, headers and body that a proxy answers with instead of the server; a body may be endless.
Reply = tuple[int, dict[str, str], Iterable[bytes]]


class S3Server:
    """moto's server on a free port of loopback, with one bucket."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT"), timeout=5)
                return
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
        self.close()
        raise RuntimeError("moto's server does not start. Is it installed? pip install 'moto[server]'")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.open_connections.add(self.connection)

    def handle_any(self) -> None:
        proxy, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy.seen.append((self.command, path, dict(self.headers)))
        reply = proxy.before(self.command, path, dict(self.headers)) if proxy.before is not None else None
        if reply is None:
            server = HTTPConnection("127.0.0.1", proxy.behind, timeout=30)
            server.request(self.command, self.path, body, dict(self.headers))
            answer = server.getresponse()
            data = answer.read()
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOPS}
            if self.command == "HEAD":
                kept["Content-Length"] = answer.getheader("Content-Length", "0")
            reply = (answer.status, kept, [data])
            server.close()
            if proxy.after is not None and (other := proxy.after(self.command, path, dict(self.headers), data)):
                reply = other
        status, headers, parts = reply
        if status == 0:  # hang up
            self.close_connection = True
            return
        if isinstance(parts, list) and "Content-Length" not in headers:
            headers = {**headers, "Content-Length": str(sum(map(len, parts)))}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for part in parts if self.command != "HEAD" else ():
                self.wfile.write(part)
                self.wfile.flush()
        except OSError:
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


_HOPS = ("connection", "transfer-encoding", "content-length", "server", "date")


class Proxy(ThreadingHTTPServer):
    """Passes requests on to an S3 server; `before` may answer in its place, `after` may replace its answer.

    Attributes
    ----------
    before : callable of (method, path, headers), or None
        Returns a `Reply`, or None to let the server answer; status 0 hangs up.
    after : callable of (method, path, headers, body), or None
    seen : list of (method, path, headers)
    """

    daemon_threads = True

    def __init__(self, behind: int) -> None:
        self.behind = behind
        self.before: Callable[[str, str, dict[str, str]], Reply | None] | None = None
        self.after: Callable[[str, str, dict[str, str], bytes], Reply | None] | None = None
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.open_connections: set[socket.socket] = set()
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        pass

    def go_down(self) -> None:
        """Close the port and every connection: whoever asks is refused."""
        self.shutdown()
        self.server_close()
        with self.lock:
            for connection in self.open_connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def come_back(self) -> Proxy:
        """Return a proxy on the same port."""
        again = object.__new__(Proxy)
        port = self.server_address[1]
        again.behind, again.before, again.after = self.behind, None, None
        again.seen, again.open_connections, again.lock = [], set(), threading.Lock()
        ThreadingHTTPServer.__init__(again, ("127.0.0.1", port), _Handler)
        threading.Thread(target=again.serve_forever, args=(0.05,), daemon=True).start()
        return again


def refused(status: int, code: str = "", more: str = "") -> Reply:
    """What S3 answers where it does not do what was asked."""
    body = f"<Error><Code>{code}</Code><Message>no</Message>{more}</Error>".encode()
    return status, {"Content-Type": "application/xml"}, [body]


def holding(data: bytes, **headers: str) -> Reply:
    """What S3 answers with an object of these bytes."""
    return 200, {"ETag": '"made-up"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", **headers}, [data]
