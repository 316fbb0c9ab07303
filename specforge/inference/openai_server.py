"""Answers of OpenAI-compatible servers: as token ids from those that return them (vLLM, SGLang), else as messages.

Token ids are preferred: the server continues the very tokens that the target's own chat template gives, and a draft
learns the very tokens that the server sampled. A chat endpoint renders the prompt itself and returns text only.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import specforge.stopping as stopping
from specforge.data.conversations import RecordError, parse_record, rendered, short, with_arguments
from specforge.data.templates import ChatTemplate
from specforge.errors import UserError
from specforge.inference.server_client import RefusedError, ServerClient
from specforge.inference.target_engine.base import UnavailableError
from specforge.options import PositiveInt

_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_SAMPLE = "Naïve: 12,345 東京 🙂\n"  # tokenizers differ in how they split this
_ATTEMPTS = 3  # at an answer that the server aborts
_PAUSE = 1.0  # seconds before the next attempt
_ENOUGH = 16  # tokens of a test answer: some servers refuse to write fewer

_SHORTEST_TIMEOUT, _SLOW = 600.0, 2.0  # seconds; tokens per second of a slow server, which answers when it is done

Item = TypeVar("Item")
Result = TypeVar("Result")


class NoTokenIdsError(UserError):
    """A server completes token ids, but does not return those of its answer."""


@dataclass(frozen=True)
class ServerOptions:
    """A server that answers instead of a model in this process.

    Args:
        server: address of an OpenAI-compatible server, such as http://127.0.0.1:8000.
        model: name of the target on the server (default: the only model that the server lists).
        chat: use the server's chat endpoint even if the server returns token ids.
        concurrency: maximum number of requests at a time.
        api_key_file: file with the server's key.
    """

    server: str | None = None
    model: str | None = None
    chat: bool = False
    concurrency: PositiveInt = 32
    api_key_file: Path | None = None


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Attributes:
        temperature: 0 for greedy decoding.
        top_p: sample from the smallest set of tokens with this total probability.
        top_k: sample from the k most likely tokens; 0 for all.
        min_p: leave out tokens less likely than this share of the most likely one's probability.
        presence_penalty: subtracted from the logits of tokens that the answer already contains.
        repetition_penalty: divides the positive logits of tokens that prompt or answer already contain.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def fields(self, seed: int) -> dict[str, Any]:
        """Fields of a request to vLLM or SGLang; all of them, because a server may have defaults of its own."""
        seeded = {"seed": seed} if self.temperature > 0 else {}
        return {**vars(self), "top_k": self.top_k or -1, **seeded}

    def standard_fields(self, seed: int) -> dict[str, Any]:
        """Fields of a request to any other server, which may refuse those that OpenAI does not have."""
        own = {"top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
        return {key: value for key, value in self.fields(seed).items() if vars(self).get(key, seed) != own.get(key)}


@dataclass(frozen=True)
class ServedModel:
    """A model on a server."""

    name: str
    kind: str = "server"  # what owns it, such as vllm or sglang
    root: str = ""  # the folder or hub name that it was loaded from; empty if the server does not say
    limit: int | None = None  # maximum number of tokens of prompt and answer; None if the server does not say

    @classmethod
    def find(cls, client: ServerClient, name: str | None) -> ServedModel:
        """The model of this name, or the only one that the server lists.

        Raises:
            UserError: the server lists several models, or none, or does not respond.
        """
        try:
            cards = {str(x["id"]): x for x in client.models()}
        except UnavailableError:
            raise
        except UserError as error:
            if name is not None:
                return cls(name)
            if isinstance(error, RefusedError):
                raise
            raise UserError(f"{error}; choose its model with --model NAME") from error
        if name is None and len(cards) != 1:
            raise UserError(f"server {client.url}: lists {short(list(cards))}; choose its model with --model NAME")
        name = name or next(iter(cards))
        card = cards.get(name, {})
        limit = card.get("max_model_len")
        return cls(
            name,
            str(card.get("owned_by") or cls.kind),
            str(card.get("root") or ""),
            limit if type(limit) is int else None,
        )


class _Server:
    """A client of a model on a server; may be used by many threads at once.

    Args:
        client: of the server; closed with this.
        model: name of the model; None for the only one that the server lists.
        concurrency: maximum number of requests at a time.

    Raises:
        UserError: the server lists several models, or does not respond.
    """

    def __init__(self, client: ServerClient, model: str | None = None, concurrency: int = 32) -> None:
        self.client, self.concurrency = client, concurrency
        self.model = ServedModel.find(client, model)

    def close(self) -> None:
        """Close all connections."""
        self.client.close()


class TokenServer(_Server):
    """Continues token ids on a server that returns token ids, such as vLLM or SGLang."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        end_ids: Sequence[int],
        seed: int = 0,
        **how: Any,
    ) -> list[list[int]]:
        """Continue each prompt until an end token (included), ``max_new_tokens``, or the server's longest sequence.

        Args:
            prompts: token ids.
            max_new_tokens: maximum number of tokens to add.
            end_ids: tokens that end an answer.
            seed: random seed for sampling the first prompt; the next prompt has the next seed.
            **how: fields of :class:`Sampling`.

        Raises:
            RefusedError: the server refuses a prompt, for example because it is too long.
            UserError: the server fails, does not respond, or returns something else than a continuation.
        """
        sampling = Sampling(**how)

        def answer(index: int) -> tuple[int, list[int]]:
            body = sampling.fields(seed + index)
            return index, self._continue(list(prompts[index]), max_new_tokens, list(end_ids), body)

        return [ids for _, ids in sorted(in_flight(answer, range(len(prompts)), self.concurrency))]

    def _continue(self, prompt: list[int], most: int, end_ids: list[int], sampling: dict[str, Any]) -> list[int]:
        body = {
            "model": self.model.name,
            "prompt": prompt,
            "max_tokens": _room(most, self.model.limit, len(prompt)),
            "stop_token_ids": end_ids,
            "return_token_ids": True,
            **sampling,
        }
        choice, _ = _choice(self.client, _COMPLETIONS, body)
        ids, asked = choice.get("token_ids"), choice.get("prompt_token_ids")
        if not _are_ids(ids) or not _are_ids(asked):
            raise NoTokenIdsError(f"server {self.client.url}: {_COMPLETIONS} returns no token ids")
        if asked != prompt:
            raise UserError(f"server {self.client.url}: it answers {short(asked)}, but was asked {short(prompt)}")
        if not ids or (choice["finish_reason"] == "stop" and ids[-1] not in end_ids):
            raise UserError(
                f"server {self.client.url}: an answer ends in token {ids[-1] if ids else None}, which is not one of "
                f"the target's end tokens {end_ids}; the server uses another generation_config.json or tokenizer"
            )
        return list(ids)


class ChatServer(_Server):
    """Answers messages on any OpenAI-compatible server."""

    _reasoning = "reasoning_content"  # the server's name of this field

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        prompt_tokens: int = 0,
        seed: int = 0,
    ) -> tuple[dict[str, Any], int]:
        """Answer messages.

        Args:
            messages: in OpenAI form.
            tools: descriptions of the tools that the answer may call.
            sampling: how tokens are chosen.
            max_new_tokens: maximum number of tokens of the answer.
            prompt_tokens: estimated length of the prompt.
            seed: random seed for sampling.

        Returns:
            The answer as datasets have it (``content``, and ``reasoning_content`` and ``tool_calls`` if present) with
            its ``finish_reason`` (stop, length or tool_calls), and its number of tokens (0 if the server does not say).

        Raises:
            RefusedError: the server refuses the messages.
            RecordError: the answer has no such form, for example because the arguments of a call are not JSON.
            UserError: the server fails or does not respond.
        """
        known = self.model.kind in ("vllm", "sglang")
        body = {
            "model": self.model.name,
            "messages": [self._sent(message) for message in messages],
            "max_tokens": _room(max_new_tokens, self.model.limit, prompt_tokens),
            **({"tools": list(tools)} if tools else {}),
            **(sampling.fields(seed) if known else sampling.standard_fields(seed)),
        }
        choice, usage = _choice(self.client, _CHAT, body)
        return self._received(choice), int(usage.get("completion_tokens") or 0)

    def _sent(self, message: Mapping[str, Any]) -> dict[str, Any]:
        sent = with_arguments(rendered(message), as_text=True)
        if "reasoning_content" in sent:
            sent[self._reasoning] = sent.pop("reasoning_content")
        return sent

    def _received(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        answer = choice.get("message")
        answer = answer if isinstance(answer, Mapping) else {}
        if not answer.get("reasoning_content") and answer.get("reasoning"):
            self._reasoning = "reasoning"
        content = "" if answer.get("content") is None else answer["content"]
        fields = ("reasoning_content", "reasoning", "tool_calls", "function_call")
        kept = {key: answer[key] for key in fields if answer.get(key)}
        row = {"messages": [{"role": "assistant", "content": content, **kept}]}
        (message,) = parse_record(f"server {self.client.url}", row).content.messages  # type: ignore[union-attr]
        ended = "tool_calls" if "tool_calls" in message and choice["finish_reason"] != "length" else "stop"
        return {**message, "finish_reason": "length" if choice["finish_reason"] == "length" else ended}


def connect(
    options: ServerOptions, template: ChatTemplate, sampling: Sampling, max_new_tokens: int
) -> tuple[TokenServer | ChatServer, str]:
    """Find out what a server can do, with a request for a few tokens.

    Args:
        options: the server.
        template: of the expected target.
        sampling: as in the requests that follow.
        max_new_tokens: likewise.

    Returns:
        The server, and what it can do in a few words.

    Raises:
        UserError: the server does not respond, has another tokenizer than the target, or refuses the request.
    """
    client = ServerClient(
        str(options.server),
        options.api_key_file,
        timeout=_SHORTEST_TIMEOUT + max_new_tokens / _SLOW,
        connections=options.concurrency,
    )
    why = "as requested"
    if not options.chat:
        tokens = TokenServer(client, options.model, options.concurrency)
        _check_tokenizer(tokens, template)
        ids = template.tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
        try:
            tokens.generate([ids], max_new_tokens=_ENOUGH, end_ids=sorted(template.end_ids), **vars(sampling))
        except (RefusedError, NoTokenIdsError) as error:
            why = str(error).removeprefix(f"server {client.url}: ")
        else:
            return tokens, "answers with token ids"
    chat = ChatServer(client, options.model, options.concurrency)
    chat.answer([{"role": "user", "content": _SAMPLE}], [], sampling, max_new_tokens=_ENOUGH)
    return chat, f"answers through its chat endpoint, with text ({why})"


def _check_tokenizer(server: TokenServer, template: ChatTemplate) -> None:
    """Compare the server's tokens of a text with the target's, if the server has an endpoint for that."""
    body = {"model": server.model.name, "prompt": _SAMPLE, "add_special_tokens": False}
    try:
        found = server.client.post("/tokenize", body)
    except RefusedError:
        return
    ids = template.tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    if isinstance(found, dict) and found.get("tokens", ids) != ids:
        raise UserError(
            f"server {server.client.url}: its model {server.model.name} has another tokenizer than the target; serve "
            "the target, or choose its model with --model NAME"
        )


def in_flight(function: Callable[[Item], Result], items: Iterable[Item], limit: int) -> Iterator[Result]:
    """Call a function for each item in threads, at most ``limit`` at a time.

    Yields:
        Its results, in the order in which they arrive.

    Raises:
        Exception: what the function raises; results of other calls in flight at that time are lost.
    """
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)

    def work() -> None:
        for item in _taken(waiting):
            try:
                done.put((function(item), None))
            except BaseException as error:
                done.put((None, error))
                list(_taken(waiting))  # begin no other item

    count = waiting.qsize()
    for _ in range(min(limit, count)):
        # A thread that waits for a server must not keep the process from ending.
        threading.Thread(target=work, name="server", daemon=True).start()
    try:
        for _ in range(count):
            result, error = done.get()
            if error is not None:
                raise error
            yield result  # type: ignore[misc]
    finally:
        list(_taken(waiting))


def _taken(waiting: queue.SimpleQueue[Item]) -> Iterator[Item]:
    with suppress(queue.Empty):
        while True:
            yield waiting.get_nowait()


def _room(most: int, limit: int | None, prompt_tokens: int) -> int:
    """Number of tokens to ask for; at least one, so that the server refuses a prompt that is too long."""
    return most if limit is None else max(1, min(most, limit - prompt_tokens))


def _choice(client: ServerClient, path: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The only choice in the answer of a server, and its usage.

    Raises:
        RecordError: the server ends the answer for another reason than its end or its length.
        UserError: the server aborts three times, or its answer is malformed.
    """
    for _ in range(_ATTEMPTS):
        answer = client.post(path, body)
        try:
            choice, usage = dict(answer["choices"][0]), dict(answer.get("usage") or {})
            reason = choice["finish_reason"]
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"server {client.url}: the answer of {path} has no finished choice") from error
        if reason in ("stop", "length", "tool_calls", "function_call"):
            return choice, usage
        if reason not in (None, "abort", "error"):
            raise RecordError(f"server {client.url}", f"ended an answer with finish_reason {short(reason)}")
        stopping.pause(_PAUSE)
    raise UserError(f"server {client.url}: aborted an answer {_ATTEMPTS} times (finish_reason {short(reason)})")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)
