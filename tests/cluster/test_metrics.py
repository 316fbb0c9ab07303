"""The port of a run's metrics: what Prometheus reads, and who may read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from specforge.contracts import CapturePolicy, PromptTask, Provenance
from specforge.errors import UserError
from specforge.runtime.addresses import open_backend, open_metadata
from specforge.runtime.control_plane.controller import DataFlowController
from specforge.runtime.data_plane.store import FeatureStore

pytest.importorskip("prometheus_client", reason="needs Ray (pip install -e '.[ray]')")

from specforge.cluster import metrics

TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[metrics.MetricsServer]:
    stores = [str(tmp_path / "store"), str(tmp_path / "m.db")]
    made = metrics.MetricsServer(0, "secret", metrics.RunMetrics(tmp_path, *stores, 10**9, lambda: (3, 1, 2)))
    yield made
    made.close()


def get(server: metrics.MetricsServer, path: str, **options: object) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{server.server_address[1]}{path}", **options)


@pytest.fixture
def control(tmp_path: Path) -> Iterator[DataFlowController]:
    """The control plane of a run with two samples in the store, a leased prompt and a queued one."""
    store = FeatureStore(open_backend(str(tmp_path / "store"), create=True))
    made = DataFlowController(open_metadata(str(tmp_path / "m.db"), create=True), store)
    made.ingest({f"{name}{name}": PromptTask(name, (1, 2), (0, 1)) for name in "abcd"})
    provenance = Provenance("tiny", "f" * 8, "t" * 8, CapturePolicy((1,)), "float32")
    for prompt in made.lease("run-producer-0", 2):
        tensors = {"aux_hidden_states": torch.zeros(2, 8)}
        ref = store.put(prompt.sample_id, tensors, num_supervised=1, source="", provenance=provenance)
        store.flush()
        made.commit([(prompt.key, ref)])
    made.lease('run-producer-"1"', 1)
    yield made
    made.metadata.close()


def write_history(folder: Path) -> None:
    """Rows as `specforge fit` writes them; tests/test_disaggregated.py holds that the trainer's are among them."""
    train = {"train/loss": 2.0, "train/lr": 1e-4, "train/grad_norm": 1.0, "train/loss_1": 2.0, "train/accuracy_1": 0.5}
    train |= {"train/tokens_per_second": 10.0, "train/supervised_tokens_per_second": 5.0}
    flow = ("wait", "ready", "queued", "bytes", "read_per_second", "produced_per_second")
    train |= {f"data/{name}": 0.5 for name in flow}
    val = {"val/tau": 2.25, "val/tau_low": 2.0, "val/tau_high": 2.5, "val/loss": 1.0, "val/acceptance_1": 0.5}
    rows = [
        {"step": 10, "seconds": 5.0, **train},
        {"step": 20, "seconds": 8.0, **train, "train/loss": 1.5},
        {"step": 20, "seconds": 8.0, **val},
    ]
    place = {"epoch": 0, "batches": 20, "peak_memory_gb": 1.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row | place) + "\n" for row in rows) + '{"step": 3, "tr')


def test_metrics_of_a_run(server, tmp_path, control):
    write_history(tmp_path)
    answer = get(server, "/metrics", headers=TOKEN)
    assert answer.status_code == 200
    lines = answer.text.splitlines()
    for line in (
        "specforge_producers 3.0",
        "specforge_producer_restarts_total 1.0",
        "specforge_trainer_restarts_total 2.0",
        'specforge_samples{state="queued"} 1.0',
        'specforge_samples{state="dead"} 0.0',
        "specforge_samples_produced_total 2.0",
        "specforge_samples_trained_total 0.0",
        'specforge_leases{producer="run-producer-\\"1\\""} 1.0',
        "specforge_leases_expired 0.0",
        "specforge_store_bytes 128.0",
        "specforge_store_limit_bytes 1e+09",
        "specforge_step 20.0",
        "specforge_step_seconds 0.3",
        "specforge_data_wait 0.5",
        "specforge_train_loss 1.5",
        "specforge_val_tau 2.25",
    ):
        assert line in lines


def test_totals_do_not_fall_when_samples_are_lost(server, control):
    assert "specforge_samples_produced_total 2.0" in get(server, "/metrics", headers=TOKEN).text
    control.lost(["aa@0"])
    lines = get(server, "/metrics", headers=TOKEN).text.splitlines()
    assert {"specforge_samples_produced_total 2.0", "specforge_store_bytes 64.0"} <= set(lines)


def test_the_dashboard_and_the_documentation_name_what_there_is(server, tmp_path, control):
    write_history(tmp_path)
    text = get(server, "/metrics", headers=TOKEN).text
    there = {re.split("[ {]", line)[0] for line in text.splitlines() if not line.startswith("#")}
    docs = Path(__file__).parents[2] / "docs"
    shown = set(re.findall(r"specforge_\w+", (docs / "grafana.json").read_text()))
    assert shown
    assert shown <= there
    documented = set(re.findall(r"specforge_\w+", (docs / "cluster.md").read_text()))
    assert documented == {re.sub(r"_\d+$", "_K", name) for name in there}


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
    (tmp_path / "store").mkdir()
    assert get(server, "/metrics", headers=TOKEN).status_code == 503


def test_a_port_that_is_taken_is_refused(server, tmp_path):
    port = server.server_address[1]
    with pytest.raises(UserError, match=f"metrics_port {port}: cannot be used"):
        metrics.MetricsServer(port, "secret", metrics.RunMetrics(tmp_path, "store", "m.db", 1, lambda: (0, 0, 0)))
