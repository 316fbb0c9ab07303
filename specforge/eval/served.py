"""Answers of a running vLLM or SGLang server, with their times and the rounds that the server counted.

Published load generators fall short of this: GuideLLM 0.8 sends text and keeps no token ids; AIPerf 0.13 would need its
raw export, about 60 packages, and an endpoint for SGLang's own API. Answers are compared token for token here, and
rounds are read per request, so the load is a thread per open request on :class:`ServerClient`.
"""

from __future__ import annotations

import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

from specforge.errors import UserError
from specforge.inference.server_client import ServerClient
from specforge.inference.target_engine.http import printable

_COUNTER = re.compile(r"^vllm:spec_decode_num_drafts(?:_total)?(?:\{.*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """What one request asks for.

    Attributes:
        prompt: token ids.
        max_new_tokens: maximum length of the answer in tokens.
        end_ids: tokens that end the answer; it includes the one that ended it.
        temperature: sampling temperature; 0 for greedy. Other settings of the sampler, which a server may take from the
            model's ``generation_config.json``, are switched off.
        salt: a server reuses the cached prefixes only of requests with the same word here; letters and digits.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    end_ids: Sequence[int]
    temperature: float = 0.0
    salt: str = ""


@dataclass
class Answer:
    """A server's answer.

    Attributes:
        tokens: token ids, including the end token.
        parts: number of tokens in each message of the stream; at low load, what each pass of the target added.
        started: time at which the request was sent, in seconds of a monotonic clock.
        first: seconds until the first token arrived.
        seconds: seconds until the last token arrived.
        rounds: verification passes, as the server counts them; None if it reports none.
        accepted: accepted drafts of each round; None if the server does not list them.
        gamma: tokens that the server drafts per round; None if it does not say.
    """

    tokens: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    started: float = 0.0
    first: float = 0.0
    seconds: float = 0.0
    rounds: int | None = None
    accepted: list[int] | None = None
    gamma: int | None = None

    def take(self, tokens: Sequence[int]) -> None:
        """Append tokens that have just arrived."""
        if tokens:
            self.seconds = time.monotonic() - self.started
            self.first = self.first or self.seconds
            self.tokens += tokens
            self.parts.append(len(tokens))

    @property
    def steps(self) -> list[int] | None:
        """Tokens that each round added; None if that is not known.

        A list of accepted drafts decides. Otherwise the messages do, if there is one for the prefill and one per round.
        """
        left, found = len(self.tokens) - 1, []
        if self.accepted is None:
            return self.parts[1:] if self.parts[:1] == [1] and len(self.parts) - 1 == self.rounds else None
        for accepted in self.accepted:
            found.append(min(accepted + 1, left))
            left -= found[-1]
        return None if left else found


class Server(ABC):
    """A running server.

    Args:
        client: sends the requests.
        model: name under which the server knows its model.
        folder: where the server loaded it from.
    """

    engine: ClassVar[str]
    path: ClassVar[str]  # of a request
    max_length: int | None = None  # tokens of a prompt and its answer; None if the server does not say

    def __init__(self, client: ServerClient, model: str, folder: str) -> None:
        self.client, self.model, self.folder = client, model, folder
        self.version = "?"
        self.gamma: int | None = None

    def __str__(self) -> str:
        return f"{self.engine} {self.version} at {self.client.url}"

    @abstractmethod
    def body(self, question: Question) -> dict[str, Any]:
        """The request, with its answer streamed."""

    @abstractmethod
    def read(self, message: dict[str, Any], answer: Answer) -> None:
        """Take what one message of the stream says."""

    def rounds(self) -> int | None:
        """Rounds of all requests since the server started; None if it does not count them."""
        return None

    def ask(self, question: Question) -> Answer:
        """Answer one prompt.

        Raises:
            UserError: the server refuses the request, breaks off, or sends something else.
        """
        answer = Answer(started=time.monotonic())
        with self.client.stream(self.path, self.body(question)) as lines:
            for line in lines:
                data = line.removeprefix("data:").strip()
                if line.startswith("data:") and data != "[DONE]":
                    self._take(data, answer)
        if not answer.tokens:
            raise UserError(f"server {self.client.url}: an answer has no tokens; its version may be too old")
        return answer

    def _take(self, data: str, answer: Answer) -> None:
        try:
            message = json.loads(data)
            error = message.get("error")
            if not error:
                self.read(message, answer)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as problem:
            raise UserError(f"server {self.client.url}: cannot read its answer {printable(data, 80)}") from problem
        if error:
            reason = error.get("message") if isinstance(error, dict) else error
            raise UserError(f"server {self.client.url}: {printable(str(reason))}")

    def load(self, questions: Sequence[Question], concurrency: int) -> list[Answer]:
        """Answer all prompts, ``concurrency`` at a time: when an answer is complete, the next prompt is sent.

        Raises:
            UserError: as in :meth:`ask`; the rest is given up.
        """
        pool = ThreadPoolExecutor(concurrency)
        try:
            return list(pool.map(self.ask, questions))
        except KeyboardInterrupt:
            self.client.close()  # ends the answers that are being read
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class VLLMServer(Server):
    """vLLM, through its completions."""

    engine = "vllm"
    path = "/v1/completions"

    def __init__(self, client: ServerClient, model: str, folder: str) -> None:
        super().__init__(client, model, folder)
        with suppress(UserError):  # some proxies pass only /v1 on
            self.version = str(client.get("/version")["version"])

    def body(self, question: Question) -> dict[str, Any]:
        """Token ids in and out; the counters come with the usage at the end."""
        return {
            "model": self.model,
            "prompt": list(question.prompt),
            "max_tokens": question.max_new_tokens,
            "stop_token_ids": list(question.end_ids),
            **_sampling(question.temperature),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "cache_salt": question.salt or None,
        }

    def read(self, message: dict[str, Any], answer: Answer) -> None:
        """``token_ids`` of a choice; ``metrics.speculative_decoding`` of the last message.

        vLLM does not count a round without drafts, which adds one token (prompt lookup has them), so these are the
        tokens that no counted round accounts for.
        """
        for choice in message["choices"]:
            answer.take(choice.get("token_ids") or ())
        counted = (message.get("metrics") or {}).get("speculative_decoding")
        if counted:
            histogram = counted["acceptance_histogram"]
            committed = sum(n * (accepted + 1) for accepted, n in enumerate(histogram))
            answer.rounds = sum(histogram) + max(0, len(answer.tokens) - 1 - committed)
            answer.gamma = counted.get("num_spec_tokens", len(histogram) - 1)
            answer.accepted = counted.get("per_step_accepted")

    def rounds(self) -> int | None:
        """The Prometheus counter, summed over engines; it counts the requests of all clients."""
        try:
            found = _COUNTER.findall(self.client.text("/metrics"))
        except UserError:
            return None
        return int(sum(map(float, found))) if found else None


class SGLangServer(Server):
    """SGLang, through its own API; its completions do not list token ids."""

    engine = "sglang"
    path = "/generate"

    def __init__(self, client: ServerClient, model: str, folder: str) -> None:
        super().__init__(client, model, folder)
        info = client.get("/server_info")
        self.version, self.folder = str(info.get("version", "?")), str(info.get("model_path", folder))
        drafted = info.get("speculative_num_draft_tokens")
        if info.get("speculative_algorithm") and isinstance(drafted, int):
            self.gamma = drafted - 1
        self.is_tree = (info.get("speculative_eagle_topk") or 1) > 1

    def body(self, question: Question) -> dict[str, Any]:
        """Token ids in and out."""
        sampling = {
            "max_new_tokens": question.max_new_tokens,
            "stop_token_ids": list(question.end_ids),
            **_sampling(question.temperature),
        }
        return {
            "input_ids": list(question.prompt),
            "sampling_params": sampling,
            "stream": True,
            "extra_key": question.salt or None,
        }

    def read(self, message: dict[str, Any], answer: Answer) -> None:
        """``output_ids``, which are all tokens so far unless the server streams increments; ``spec_verify_ct``."""
        ids, info = message["output_ids"], message["meta_info"]
        known = len(answer.tokens)
        answer.take(ids[known:] if len(ids) == info["completion_tokens"] else ids)
        answer.rounds = info.get("spec_verify_ct")
        answer.gamma = self.gamma


def _sampling(temperature: float) -> dict[str, float]:
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    return {"temperature": temperature, **neutral, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def find_server(client: ServerClient) -> Server:
    """The server behind a client.

    Raises:
        UserError: it does not answer, or is neither vLLM nor SGLang.
    """
    kinds = {cls.engine: cls for cls in (VLLMServer, SGLangServer)}
    model = client.models()[0]
    kind, name = kinds.get(str(model.get("owned_by"))), str(model["id"])
    if kind is None:
        owner = printable(str(model.get("owned_by")), 60)
        raise UserError(
            f"server {client.url}: is neither vLLM nor SGLang but {owner!r}, which has no counters of accepted tokens"
        )
    server, length = kind(client, name, str(model.get("root") or name)), model.get("max_model_len")
    server.max_length = length if isinstance(length, int) else None
    return server
