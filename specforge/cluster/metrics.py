"""Metrics of a run for Prometheus, and its health, on one port of the driver."""

from __future__ import annotations

import hmac
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from specforge.errors import UserError
from specforge.eval.report import HISTORY
from specforge.runtime.addresses import is_there, open_backend, open_metadata
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.control_plane.metadata import State
from specforge.runtime.data_plane.store import FeatureStore

_LATE = 30.0  # seconds without a sign of life after which the driver is unhealthy
_TAIL = 64 << 10  # bytes of metrics.jsonl that are read


class RunMetrics(Collector):
    """What is measured when Prometheus asks.

    Args:
        run: the run's folder, with ``metrics.jsonl``.
        store: address of the feature store.
        metadata: address of the metadata store.
        max_bytes: upper limit of what is in the store.
        processes: returns the number of running producers, how often producers were started again, and how often the
            trainers were.
    """

    def __init__(
        self, run: Path, store: str, metadata: str, max_bytes: int, processes: Callable[[], tuple[int, int, int]]
    ) -> None:
        self._file, self._store, self._metadata = run / HISTORY, store, metadata
        self._max_bytes, self._processes = max_bytes, processes
        self._features: FeatureStore | None = None
        self._totals: dict[str, int] = {}

    def describe(self) -> list[Metric]:
        """Nothing: measuring before the run has begun would fail."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Producers, samples, the store, and the trainers' latest metrics."""
        running, restarts, trainer_restarts = self._processes()
        yield GaugeMetricFamily("specforge_producers", "producers that run", value=running)
        yield CounterMetricFamily("specforge_producer_restarts", "producers that were started again", value=restarts)
        yield CounterMetricFamily("specforge_trainer_restarts", "restarts of all trainers", value=trainer_restarts)
        yield GaugeMetricFamily("specforge_store_limit_bytes", "data.max_bytes", value=self._max_bytes)
        if is_there(self._metadata) and is_there(self._store):
            self._features = self._features or FeatureStore(open_backend(self._store, create=False))
            controller = DataFlowController(open_metadata(self._metadata, create=False), self._features)
            try:
                yield from self._samples(controller)
            finally:
                controller.metadata.close()
        for name, value in latest(self._file).items():
            yield GaugeMetricFamily(f"specforge_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}", name, value=value)

    def _samples(self, controller: DataFlowController) -> Iterator[Metric]:
        """Samples, leases and bytes; a total never falls, though a run that returns to a checkpoint has fewer."""
        counts = controller.counts()
        samples = GaugeMetricFamily("specforge_samples", "samples by state; dead ones were given up", labels=["state"])
        for state, number in counts.items():
            samples.add_metric([state], number)
        yield samples
        trained = counts[State.TRAINED] + counts[State.DURABLE]
        produced = trained + counts[State.COMMITTED] + counts[State.DELIVERED]
        for what, number in (("produced", produced), ("trained", trained)):
            self._totals[what] = total = max(number, self._totals.get(what, 0))
            yield CounterMetricFamily(f"specforge_samples_{what}", f"samples that were {what}", value=total)
        leases = GaugeMetricFamily("specforge_leases", "prompts that a producer holds", labels=["producer"])
        held = controller.metadata.find((State.LEASED,))
        for owner, number in Counter(row.owner for row in held).items():
            leases.add_metric([owner], number)
        yield leases
        expired = sum(row.deadline <= controller.clock() for row in held)
        yield GaugeMetricFamily("specforge_leases_expired", "prompts of producers that do not respond", value=expired)
        yield GaugeMetricFamily("specforge_store_bytes", "bytes of features in the store", value=stored(controller))


def stored(controller: DataFlowController) -> int:
    """Bytes of all samples whose features are in the store."""
    names = {uri for _, uri in controller.features.backend.stored()}
    refs = controller.references((State.COMMITTED, State.DELIVERED, State.TRAINED))
    return sum({ref.uri: ref.nbytes for ref in refs if ref.uri in names}.values())


def latest(path: Path) -> dict[str, float]:
    """The last value of each of the trainers' metrics, and ``step_seconds`` between the last two rows of training."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return {}
    found: dict[str, Any] = {}
    steps: list[tuple[float, float]] = []
    for line in lines:
        try:
            row = json.loads(line)
            found |= row
            if "train/loss" in row:
                steps.append((row["step"], row["seconds"]))
        except (ValueError, TypeError, KeyError):  # cut off at the beginning of the part, or still being written
            continue
    if len(steps) > 1 and steps[-1][0] > steps[-2][0]:
        found["step_seconds"] = (steps[-1][1] - steps[-2][1]) / (steps[-1][0] - steps[-2][0])
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
