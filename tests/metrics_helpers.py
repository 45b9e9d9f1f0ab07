"""What tests of status page and audit share: a server's counters, the page that shows them, and an address for it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from guard.observing.scrape import Series, parse
from guard.telemetry import OUTCOMES


class Counters:
    """The guard's counters of one model server, as its metrics page shows them."""

    def __init__(self, model: str = "digits") -> None:
        self.model = model
        self.values: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self.digest = "ab" * 32
        for verdict in OUTCOMES:
            self.add("guard_verdicts_total", 0, verdict=verdict, action="none")
        self.add("guard_requests_total", 0, code="200")
        self.add("guard_queued_total", 0)
        self.add("guard_unflagged_low_total", 0)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        self.values[name, tuple(sorted({"model": self.model, **labels}.items()))] += amount

    def answer(self, verdict: str, amount: int = 1, *, code: int = 200) -> None:
        """Count requests with one verdict, and flagged ones as queued."""
        self.add("guard_verdicts_total", amount, verdict=verdict, action="none")
        self.add("guard_requests_total", amount, code=str(code))
        if verdict == "poisoned":
            self.add("guard_queued_total", amount)

    def time(self, stage: str, bounds: dict[str, int]) -> None:
        """Count batches in a cumulative histogram."""
        for le, amount in bounds.items():
            self.add("guard_stage_duration_seconds_bucket", amount, stage=stage, le=le)

    def text(self) -> str:
        lines = []
        for (name, labels), value in self.values.items():
            answer = ",".join(f'{label}="{text}"' for label, text in labels)
            lines.append(f"{name}{{{answer}}} {float(value)}")
        lines.append(f'guard_bundle_info{{model="{self.model}",digest="{self.digest}"}} 1.0')
        lines.append('Requests2XX{Level="Host"} 7.0')
        return "\n".join(sorted(lines)) + "\n"

    def series(self) -> dict[Series, float]:
        return parse(self.text())


@contextmanager
def answering(answer: Callable[[str], tuple[int, str]]) -> Iterator[str]:
    """Serve path -> (status, text) on loopback while open, and yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answer(self.path)
            self.send_response(status)
            if status in (301, 302):
                self.send_header("Location", text)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
