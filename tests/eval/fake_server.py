"""A server that speaks vLLM's or SGLang's protocol and answers what a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# A prompt to the answer's tokens, and how many drafted tokens each round accepts, those past the end included; None if
# the server drafts nothing.
Script = Callable[[Sequence[int]], tuple[list[int], list[int] | None]]


@dataclass
class Fake:
    """What the server says, and what it was asked.

    Attributes:
        script: answers.
        engine: vllm or sglang.
        per_request: whether vLLM reports the rounds of each request.
        folder: where the model is said to be.
        gamma: tokens drafted per round.
        max_model_len: longest prompt with its answer.
    """

    script: Script
    engine: str = "vllm"
    per_request: bool = True
    folder: str = "/nowhere"
    gamma: int = 3
    max_model_len: int = 1024
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    drafts: int = 0  # rounds of all requests
    most: int = 0  # requests that were open at one time
    open: int = 0
    lock: Any = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fake = self.server.fake
        model = {"id": "tiny", "owned_by": fake.engine, "root": fake.folder, "max_model_len": fake.max_model_len}
        pages: dict[str, Any] = {
            "/v1/models": {"data": [model]},
            "/version": {"version": "1.2"},
            "/server_info": {
                "version": "1.2",
                "model_path": fake.folder,
                "speculative_algorithm": "EAGLE3",
                "speculative_num_draft_tokens": fake.gamma + 1,
            },
            "/metrics": "# HELP vllm:spec_decode_num_drafts_total x\n"
            f'vllm:spec_decode_num_drafts_total{{engine="0",model_name="a b"}} {fake.drafts / 2}\n'
            f'vllm:spec_decode_num_drafts_total{{engine="1",model_name="a b"}} {fake.drafts / 2}\n'
            f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {9e9}\n',
        }
        page = pages[self.path]
        self._send((page if isinstance(page, str) else json.dumps(page)).encode())

    def do_POST(self) -> None:
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt" if fake.engine == "vllm" else "input_ids"]
        tokens, accepted = fake.script(prompt)
        with fake.lock:
            fake.asked.append(body)
            fake.drafts += len(accepted or ())
            fake.open += 1
            fake.most = max(fake.most, fake.open)
        messages = _vllm(fake, tokens, accepted) if fake.engine == "vllm" else _sglang(tokens, accepted)
        lines = [f"data: {json.dumps(m)}\n\n" for m in messages]
        self._send("".join([*lines, "data: [DONE]\n\n"]).encode())
        with fake.lock:
            fake.open -= 1

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def _parts(tokens: list[int], accepted: list[int] | None) -> list[list[int]]:
    """The first token, and what each round adds."""
    steps, parts, position = [a + 1 for a in accepted or [0] * (len(tokens) - 1)], [tokens[:1]], 1
    for step in steps:
        parts.append(tokens[position : position + step])
        position += step
    return parts


def _vllm(fake: Fake, tokens: list[int], accepted: list[int] | None) -> Iterator[dict[str, Any]]:
    for part in _parts(tokens, accepted):
        yield {"choices": [{"token_ids": part}]}
    last: dict[str, Any] = {"choices": [], "usage": {"completion_tokens": len(tokens)}}
    if accepted is not None and fake.per_request:
        histogram = [accepted.count(n) for n in range(fake.gamma + 1)]
        counted = {"acceptance_histogram": histogram, "per_step_accepted": accepted, "num_spec_tokens": fake.gamma}
        last["metrics"] = {"speculative_decoding": counted}
    yield last


def _sglang(tokens: list[int], accepted: list[int] | None) -> Iterator[dict[str, Any]]:
    known: list[int] = []
    for number, part in enumerate(_parts(tokens, accepted)):
        known = [*known, *part]
        info: dict[str, Any] = {"completion_tokens": len(known)}
        if accepted is not None and number:
            info["spec_verify_ct"] = number
        yield {"output_ids": known, "meta_info": info}


@contextmanager
def serving(script: Script, **options: Any) -> Iterator[Fake]:
    """Run a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.fake = Fake(script, url=f"http://127.0.0.1:{server.server_port}", **options)
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server.fake
        finally:
            server.shutdown()
            thread.join()
