"""Renders messages with a chat template: the text that prompts for an answer, and the text of the answer.

No template is hard-coded. The text that a template adds around an answer is found by rendering other answers in its
place.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from typing import Any

from specforge.data.conversations import Conversation, rendered, short, with_arguments
from specforge.data.turns import Asked, Refusal
from specforge.errors import UserError
from specforge.files import first_line

Messages = list[dict[str, Any]]
Tools = Sequence[dict[str, Any]]

# A template that prints today's date would produce different samples from the same data every day. This is the date
# that Llama's templates print by default.
_DATE = date(2024, 7, 26)
_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{d}', '{_DATE.strftime('%' + d)}')" for d in [*"aAbBcdDeFhHIjmMpSTuUVwWxXyY", "-d", "-m"])
    + " }}{% endmacro %}\n"
)


class Renderer:
    """The chat template of a tokenizer, with a fixed date instead of today's.

    Args:
        tokenizer: a transformers tokenizer; its template is modified.

    Attributes:
        notes: remarks on the messages for the user, with their counts.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.notes: Counter[str] = Counter()
        self._dated = "strftime_now" in str(tokenizer.chat_template)
        tokenizer.chat_template = _with_fixed_date(tokenizer.chat_template)

    def messages(self, conversation: Conversation) -> Messages:
        """Messages as the template expects them: most read the arguments of a call as JSON values, some as text."""
        if self._dated:
            self.notes[
                f"records in which the template prints {_DATE} instead of today, so that samples are reproducible"
            ] += 1
        plain = [rendered(message) for message in conversation.messages]
        for message in plain:
            if "reasoning_content" in message:
                message["thinking"] = message["reasoning_content"]  # some templates read this name
        values = [with_arguments(message, as_text=False) for message in plain]
        arguments = [c["function"]["arguments"] for m in values for c in m.get("tool_calls", ())]
        if not arguments:
            return values
        text = self._try(values, conversation.tools)
        if text is not None and not any(_printed(a, text) for a in arguments):
            return values
        texts = [with_arguments(message, as_text=True) for message in plain]
        return values if self._try(texts, conversation.tools) is None else texts

    def answer(self, messages: Messages, tools: Tools, turn: int) -> Asked:
        """Render the prompt for the answer ``messages[turn]``, and the answer with the text that follows it.

        Raises:
            Refusal: the template has no prompt for it, or omits it.
        """
        before, message = messages[:turn], messages[turn]
        asked = self.render(before, tools, generate=True)
        answered = self.render([*before, message], tools)
        opened = ""
        if answered.startswith(asked):
            answer = answered[len(asked) :]
            self._check_header(before, tools, asked)
        else:
            opened, answer = self._answer_elsewhere(before, message, tools, asked, answered)
        self._check_answer(before, message, tools, answered, opened + answer)
        return Asked(asked, answer, words=_words(message, answer))

    def note_left_out(self, messages: Messages, tools: Tools, asked: str) -> None:
        """Count messages that the template omits from a prompt, for instance because it ignores their role."""
        for i, message in enumerate(messages):
            text = message["content"].strip()
            if message["role"] == "assistant" or not text or text in asked:
                continue
            other = [*messages[:i], {**message, "content": "0"}, *messages[i + 1 :]]
            with suppress(Refusal):
                if self.render(other, tools, generate=True) == asked:
                    self.notes[f"{message['role']} messages that the chat template omits"] += 1

    def _check_header(self, before: Messages, tools: Tools, asked: str) -> None:
        """Reject a template without a generation prompt that writes a header before an answer."""
        if self._try(before, tools) != asked:
            return
        header = self._frame(before, tools)[0][len(asked) :]
        followed = self._try([*before, {"role": "user", "content": "0"}], tools)
        has_prompt = followed is not None and not followed.startswith(asked)
        if header.strip() and not has_prompt:  # some templates end every text with a generation prompt
            raise Refusal(
                f"messages[{len(before)}]: the chat template has no generation prompt, so the {short(header)} before "
                "an answer is never part of a prompt; give a template that has one with --chat_template FILE"
            )

    def _answer_elsewhere(
        self, before: Messages, message: dict[str, Any], tools: Tools, asked: str, answered: str
    ) -> tuple[str, str]:
        """Split an answered text that does not begin with the prompt; returns the part in the prompt, and the rest."""
        shared = len(_common([asked, answered]))
        if not asked[shared:].strip():
            return "", answered[shared:]  # only the generation prompt ends in a line break
        header, tail = self._frame(before, tools)
        prompt = self._generation_prompt(before, tools, asked)
        known, rest = answered.startswith(header), answered[len(header) :]
        own = header[len(_common([asked, header])) :]
        if known and prompt.strip():  # earlier messages are rendered differently once they are answered
            _, found, space = header.rpartition(prompt)
            if found and not space.strip():
                return "", space + rest  # some templates put a space before an answer
            if own and asked.endswith(own):
                return "", rest
        opened = asked[len(header) :] if asked.startswith(header) else ""
        if opened.strip() and message["content"].startswith(opened):
            return opened, message["content"][len(opened) :] + tail
        if "reasoning_content" not in message:  # find the text that closes the reasoning opened by the prompt
            thought = {**message, "reasoning_content": "0", "thinking": "0"}
            shown = self._try([*before, thought], tools) or ""
            if shown.startswith(asked + "0"):
                known, rest, opened = True, shown[len(asked) + 1 :], opened or prompt
        if not (known and opened):
            raise Refusal(
                f"messages[{len(before)}]: the prompt of the chat template ends in {asked[-30:]!r}, but the rendered "
                "answer does not contain it; have the target answer (`specforge regenerate`), or give another "
                "--chat_template"
            )
        self.notes[
            f"answers that follow {short(opened)}, which the chat template writes in prompts but not before finished "
            "answers (prefer answers of the target: `specforge regenerate`)"
        ] += 1
        return "", rest

    def _generation_prompt(self, before: Messages, tools: Tools, asked: str) -> str:
        """The generation prompt; if the template has none, the text that follows the last message."""
        plain = self.render(before, tools)
        prompt = asked[len(plain) :] if asked.startswith(plain) else asked
        if prompt.strip():
            return prompt
        *first, last = before
        texts = [self.render([*first, {**last, "content": text}], tools, generate=True) for text in ("0", "1")]
        return texts[0][len(_common(texts)) + 1 :]

    def _frame(self, before: Messages, tools: Tools) -> tuple[str, str]:
        """The text that the template writes before an answer, earlier messages included, and after it."""
        zero, one = (self.render([*before, _says(text)], tools) for text in ("0", "1"))
        header = _common([zero, one])
        return header, zero[len(header) + 1 :]

    def _check_answer(self, before: Messages, message: dict[str, Any], tools: Tools, answered: str, shown: str) -> None:
        """Reject an answer that the template omits, and count one that it renders only in part."""
        where = f"messages[{len(before)}]"
        words = [text for key in ("content", "reasoning_content") if (text := message.get(key, "").strip())]
        missing = [text for text in words if text not in shown]
        if "tool_calls" in message:
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            if self._try([*before, rest], tools) == answered:
                raise Refusal(f"{where}: the chat template omits its tool calls")
        elif words and missing == words and self._try([*before, _says("")], tools) == answered:
            raise Refusal(f"{where}: the chat template omits it")
        if missing:
            self.notes["answers that the chat template renders only in part, for instance without their reasoning"] += 1

    def _try(self, messages: Messages, tools: Tools) -> str | None:
        try:
            return self.render(messages, tools)
        except Refusal:
            return None

    def render(self, messages: Messages, tools: Tools, generate: bool = False) -> str:
        """Render messages, as the template expects them; ``generate`` appends the generation prompt.

        Raises:
            Refusal: the template rejects these messages.
            UserError: there is no usable template.
        """
        from jinja2 import TemplateSyntaxError

        name, template = self.tokenizer.name_or_path, self.tokenizer.chat_template
        if not template or (isinstance(template, dict) and "default" not in template):
            kind = "chat template called default" if template else "chat template"
            raise UserError(f"tokenizer {name}: has no {kind}; give one with --chat_template FILE")
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=generate
            )
        except TemplateSyntaxError as error:
            raise UserError(f"tokenizer {name}: its chat template is not Jinja ({first_line(error)})") from error
        except Exception as error:  # a template is a program and may raise anything
            raise Refusal(f"the chat template rejects it ({first_line(error)})") from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refusal("the chat template's text contains half of a surrogate pair") from error
        return text


def _printed(arguments: Any, text: str) -> bool:
    """Whether a text contains a mapping or a list in Python's notation, ``{'a': 1}``, instead of JSON."""
    printed = str(arguments)
    return isinstance(arguments, (dict, list)) and printed in text and printed != json.dumps(arguments)


def _words(message: dict[str, Any], answer: str) -> int | None:
    """Offset in the rendered answer where its words end; None if tool calls follow or the words are not in it."""
    words = message["content"].strip()
    start = -1 if "tool_calls" in message else answer.rfind(words) if words else 0
    return None if start < 0 else start + len(words)


def _says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _common(texts: list[str]) -> str:
    return os.path.commonprefix(texts)  # noqa: RUF071 - characters are meant


def _with_fixed_date(template: Any) -> Any:
    if isinstance(template, dict):
        return {name: _with_fixed_date(text) for name, text in template.items()}
    dated = isinstance(template, str) and "strftime_now" in template
    return _DATE_MACRO + template if dated else template
