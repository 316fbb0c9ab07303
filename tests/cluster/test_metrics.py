"""The port of a run's metrics: what Prometheus reads, and who may read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from specforge.errors import UserError
from specforge.runtime.addresses import open_metadata

pytest.importorskip("prometheus_client", reason="needs Ray (pip install -e '.[ray]')")

from specforge.cluster import metrics

TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[metrics.MetricsServer]:
    made = metrics.MetricsServer(0, "secret", metrics.RunMetrics(tmp_path, str(tmp_path / "m.db"), lambda: (3, 1)))
    yield made
    made.close()


def get(server: metrics.MetricsServer, path: str, **options: object) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{server.server_address[1]}{path}", **options)


def test_metrics_of_a_run(server, tmp_path):
    store = open_metadata(str(tmp_path / "m.db"))
    store.add([("a", "{}"), ("b", "{}")])
    store.close()
    rows = [
        {"step": 1, "data/wait": 0.5, "train/loss": 2.0},
        {"step": 2, "train/loss": 1.5},
        {"step": 2, "val/tau": 2.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "tr')
    answer = get(server, "/metrics", headers=TOKEN)
    assert answer.status_code == 200
    lines = answer.text.splitlines()
    for line in (
        "specforge_producers 3.0",
        "specforge_producer_restarts_total 1.0",
        'specforge_samples{state="queued"} 2.0',
        'specforge_samples{state="dead"} 0.0',
        "specforge_step 2.0",
        "specforge_data_wait 0.5",
        "specforge_train_loss 1.5",
        "specforge_val_tau 2.25",
    ):
        assert line in lines


def test_a_run_that_has_not_begun_has_metrics_too(server, tmp_path):
    assert "specforge_producers 3.0" in get(server, "/metrics", headers=TOKEN).text.splitlines()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}])
def test_metrics_need_the_token(server, headers):
    answer = get(server, "/metrics", headers=headers)
    assert answer.status_code == 401
    assert "specforge_" not in answer.text


def test_health_needs_no_token_and_tells_whether_the_run_is_looked_after(server, monkeypatch):
    assert get(server, "/health").status_code == 200
    monkeypatch.setattr(metrics, "_LATE", 0.0)
    assert get(server, "/health").status_code == 503
    monkeypatch.undo()
    server.alive()
    assert get(server, "/health").status_code == 200


def test_metadata_that_does_not_answer_are_no_crash(server, tmp_path):
    (tmp_path / "m.db").write_text("no database")
    assert get(server, "/metrics", headers=TOKEN).status_code == 503


def test_a_port_that_is_taken_is_refused(server, tmp_path):
    port = server.server_address[1]
    with pytest.raises(UserError, match=f"metrics_port {port}: cannot be used"):
        metrics.MetricsServer(port, "secret", metrics.RunMetrics(tmp_path, "m.db", lambda: (0, 0)))
