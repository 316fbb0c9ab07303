"""An OpenAI-compatible server for tests: answers, refuses, delays, and restarts as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def written(body: dict[str, Any]) -> list[int]:
    """What a model might write: depends on the prompt, and on the seed when it samples."""
    prompt, (end, *_) = body["prompt"], body["stop_token_ids"]
    text = f"{sum(i * token for i, token in enumerate(prompt)) % 997}, seed {body.get('seed')}"
    return [*text.encode(), end][: body["max_tokens"]]


def completion(body: dict[str, Any]) -> dict[str, Any]:
    """An answer of /v1/completions with token ids."""
    ids = written(body)
    ended = "stop" if ids[-1] in body["stop_token_ids"] else "length"
    choice = {"index": 0, "text": "", "finish_reason": ended, "token_ids": ids, "prompt_token_ids": body["prompt"]}
    return {"choices": [choice], "usage": {"completion_tokens": len(ids)}}


def message(content: str | None, finish_reason: str = "stop", **fields: Any) -> dict[str, Any]:
    """An answer of /v1/chat/completions."""
    answer = {"role": "assistant", "content": content, "refusal": None, **fields}
    return {"choices": [{"message": answer, "finish_reason": finish_reason}], "usage": {"completion_tokens": 3}}


class FakeServer:
    """A server in threads of this process.

    Args:
        answer: the JSON answer, or status and JSON answer, to the body of a request for an answer. None closes the
            connection.
        owner: what `/v1/models` says about its models.
        models: their names.
        card: more of what it says.

    Attributes:
        seen: paths and bodies of all requests for an answer, in the order in which they arrived.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Any] = completion,
        owner: str = "vllm",
        models: tuple[str, ...] = ("tiny",),
        **card: Any,
    ) -> None:
        self.answer, self.seen = answer, []  # type: ignore[var-annotated]
        self.models = {"data": [{"id": name, "owned_by": owner, **card} for name in models]}
        self.tokenize: Any = (404, {})
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, on the same port as before."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(fake.models if self.path == "/v1/models" else (404, {}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    self.reply(fake.tokenize)
                    return
                fake.seen.append((self.path, body))
                self.reply(fake.answer(body))

            def reply(self, found: Any) -> None:
                status, value = found if isinstance(found, tuple) else (200, found)
                self.close_connection = fake.stopped or value is None
                if not self.close_connection:
                    data = json.dumps(value).encode()
                    with suppress(OSError):
                        self.send_response(status)
                        self.send_header("Content-Length", str(len(data)))
                        self.end_headers()
                        self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.stopped = False
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """Stop as if killed: requests that are being answered get no answer."""
        if not self.stopped:
            self.stopped = True
            self._server.shutdown()
            self._thread.join()
            self._server.socket.close()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
