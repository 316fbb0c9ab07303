"""Metrics of a run for Prometheus, and its health, on one port of the driver."""

from __future__ import annotations

import hmac
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from specforge.errors import UserError
from specforge.runtime.addresses import is_there, open_metadata

_LATE = 30.0  # seconds without a sign of life after which the driver is unhealthy
_TAIL = 64 << 10  # bytes of metrics.jsonl that are read


class RunMetrics(Collector):
    """What is measured when Prometheus asks.

    Args:
        run: the run's folder, with ``metrics.jsonl``.
        metadata: address of the metadata store.
        producers: returns the number of running producers, and how often producers were started again.
    """

    def __init__(self, run: Path, metadata: str, producers: Callable[[], tuple[int, int]]) -> None:
        self._file, self._metadata, self._producers = run / "metrics.jsonl", metadata, producers

    def describe(self) -> list[Metric]:
        """Nothing: measuring before the run has begun would fail."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Producers, samples by state, and the trainers' latest metrics."""
        running, restarts = self._producers()
        yield GaugeMetricFamily("specforge_producers", "producers that run", value=running)
        yield CounterMetricFamily("specforge_producer_restarts", "producers that were started again", value=restarts)
        samples = GaugeMetricFamily("specforge_samples", "samples by state; dead ones were given up", labels=["state"])
        for state, number in self._samples().items():
            samples.add_metric([state], number)
        yield samples
        for name, value in self._latest().items():
            yield GaugeMetricFamily(f"specforge_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}", name, value=value)

    def _samples(self) -> dict[str, int]:
        if not is_there(self._metadata):
            return {}
        store = open_metadata(self._metadata, create=False)
        try:
            return store.counts()
        finally:
            store.close()

    def _latest(self) -> dict[str, float]:
        """The last value of each of the trainers' metrics."""
        try:
            with self._file.open("rb") as file:
                file.seek(max(0, self._file.stat().st_size - _TAIL))
                lines = file.read().splitlines()
        except OSError:
            return {}
        found: dict[str, float] = {}
        for line in lines:
            try:
                found |= json.loads(line)
            except ValueError:  # cut off at the beginning of the part that was read, or still being written
                continue
        return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


class MetricsServer(ThreadingHTTPServer):
    """Serves ``/metrics``, with a token, and ``/health``, without one, until it is closed.

    Args:
        port: port to listen on.
        token: token that ``/metrics`` requires.
        metrics: what is measured.

    Raises:
        UserError: the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, port: int, token: str, metrics: RunMetrics) -> None:
        try:
            super().__init__(("", port), _Handler)
        except OSError as error:
            raise UserError(f"cluster.metrics_port {port}: cannot be used ({error.strerror})") from error
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(metrics)
        self.authorization = f"Bearer {token}".encode()
        self._seen = time.monotonic()
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def alive(self) -> None:
        """Tell that the driver looks after the run."""
        self._seen = time.monotonic()

    @property
    def healthy(self) -> bool:
        """Whether it has done so lately."""
        return time.monotonic() - self._seen < _LATE

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    timeout = 10.0  # seconds

    def do_GET(self) -> None:
        """Answer a request."""
        if self.path == "/health":
            healthy = self.server.healthy
            self._answer(
                HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE, b"ok\n" if healthy else b"late\n"
            )
        elif not hmac.compare_digest((self.headers["Authorization"] or "").encode(), self.server.authorization):
            self._answer(HTTPStatus.UNAUTHORIZED, b"a token is required\n")
        elif self.path != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, b"/metrics or /health\n")
        else:
            try:
                self._answer(HTTPStatus.OK, generate_latest(self.server.registry))
            except UserError as error:  # the metadata store does not answer
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())

    def _answer(self, status: HTTPStatus, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""
