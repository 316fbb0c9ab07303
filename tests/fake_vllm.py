"""A stand-in for vLLM's server: its HTTP interface, transformers behind it, and our sink; for tests of the client."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy
from specforge.inference.handoff import FeatureSink, Ticket, select_states
from specforge.inference.target_engine.hf import HFTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.runtime.addresses import open_backend


class FakeVLLM(ThreadingHTTPServer):
    """Serves a target in fp32; ``faults`` are called with each request, and may raise or return an HTTP status."""

    daemon_threads = True

    def __init__(self, target: Path, store: Path, layers: tuple[int, ...] = (1, 3, 4), port: int = 0, **changes: Any):
        super().__init__(("127.0.0.1", port), _Handler)
        self.engine = HFTargetEngine(TargetFiles.find(str(target)), "float32")
        self.sink = FeatureSink(open_backend(str(store), create=True))
        self.layers, self.version, self.prompts = layers, "0.32.0", []
        self.faults: list[Callable[[dict], int | None]] = []
        self.lock = threading.Lock()
        self.description = {
            "version": self.version,
            "target_fingerprint": self.engine.target.fingerprint,
            "dtype": "float32",
            "quantization": "",
            "layers": list(layers),
            "last_hidden_states": True,
            "max_model_len": 128,
            "tensor_parallel": 1,
            "expert_parallel": False,
            "store": str(store),
        } | changes

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A fault hangs up; nothing to print."""

    def complete(self, body: dict) -> dict:
        ids, asked = body["prompt"], body["kv_transfer_params"]["specforge"]
        self.prompts.append(ids)
        if asked:
            ticket = Ticket.from_json(asked)
            with self.lock, torch.no_grad():
                policy = CapturePolicy(self.layers)
                (found,) = self.engine.capture([ids], policy)
            states = found[AUX_HIDDEN_STATES].split(self.engine.target.hidden_size, dim=-1)
            last = found[LAST_HIDDEN_STATES]
            layers = dict(zip(self.layers, states, strict=True))
            self.sink.submit(ticket, ids, lambda: select_states(ticket.capture, layers, lambda: last), last.nbytes)
        answer = {"choices": [{"prompt_token_ids": ids}], "kv_transfer_params": {"specforge": self.description}}
        return answer if self.description else answer | {"kv_transfer_params": None}


class _Handler(BaseHTTPRequestHandler):
    server: FakeVLLM
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(
            200, {"/version": {"version": self.server.version}, "/v1/models": {"data": [{"id": "m"}]}}[self.path]
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.faults.pop(0) if self.server.faults and body["kv_transfer_params"]["specforge"] else None
        status = fault(body) if fault else None
        if status:
            self._send(status, {"error": {"message": "a fault"}})
        else:
            self._send(200, self.server.complete(body))

    def _send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def fake_vllm(target: Path, store: Path, **options: Any) -> Iterator[FakeVLLM]:
    """Run the stand-in in a thread."""
    with FakeVLLM(target, store, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.sink.close()
