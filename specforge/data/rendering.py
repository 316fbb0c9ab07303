"""What a chat template makes of messages: the text that asks for an answer, and the answer's own.

Nothing about any template is built in. What it writes around an answer is found by rendering other answers in its
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

# Templates that write the day of asking would make other samples of the same data every day; this is the date that
# Llama's templates write where they are not told one.
_DATE = date(2024, 7, 26)
_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{d}', '{_DATE.strftime('%' + d)}')" for d in [*"aAbBcdDeFhHIjmMpSTuUVwWxXyY", "-d", "-m"])
    + " }}{% endmacro %}\n"
)


class Renderer:
    """The chat template of a tokenizer, which gets a fixed date in the place of today's.

    Args:
        tokenizer: a transformers tokenizer; its template is changed.

    Attributes:
        notes: what users should be told of the messages, and how often.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.notes: Counter[str] = Counter()
        self._dated = "strftime_now" in str(tokenizer.chat_template)
        tokenizer.chat_template = _with_fixed_date(tokenizer.chat_template)

    def messages(self, conversation: Conversation) -> Messages:
        """Messages as the template takes them: most read the arguments of a call as values, some join them as text."""
        if self._dated:
            self.notes[
                f"records with {_DATE} for the day that the template writes, so that samples stay as they are"
            ] += 1
        plain = [rendered(message) for message in conversation.messages]
        for message in plain:
            if "reasoning_content" in message:
                message["thinking"] = message["reasoning_content"]  # the name that some templates read
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
        """The text that asks for the answer ``messages[turn]``, and the answer with what the template puts behind it.

        Raises:
            Refusal: the template cannot ask for it, or leaves it out.
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
        """Note messages that the template does not show when it asks, such as those of a role that it does not know."""
        for i, message in enumerate(messages):
            text = message["content"].strip()
            if message["role"] == "assistant" or not text or text in asked:
                continue
            other = [*messages[:i], {**message, "content": "0"}, *messages[i + 1 :]]
            with suppress(Refusal):
                if self.render(other, tools, generate=True) == asked:
                    self.notes[f"{message['role']} messages that the chat template leaves out"] += 1

    def _check_header(self, before: Messages, tools: Tools, asked: str) -> None:
        """Refuse a template that asks for nothing, but writes a header before an answer."""
        if self._try(before, tools) != asked:
            return
        header = self._frame(before, tools)[0][len(asked) :]
        followed = self._try([*before, {"role": "user", "content": "0"}], tools)
        asks = followed is not None and not followed.startswith(asked)
        if header.strip() and not asks:  # some templates end every text with a generation prompt
            raise Refusal(
                f"messages[{len(before)}]: the chat template has no generation prompt, so nothing asks for the "
                f"{short(header)} that it writes before an answer; give one that has with --chat_template FILE"
            )

    def _answer_elsewhere(
        self, before: Messages, message: dict[str, Any], tools: Tools, asked: str, answered: str
    ) -> tuple[str, str]:
        """Where the answered text does not begin with the prompt: what the prompt has of the message, and the rest."""
        shared = len(_common([asked, answered]))
        if not asked[shared:].strip():
            return "", answered[shared:]  # only the generation prompt has a line break
        header, tail = self._frame(before, tools)
        prompt = self._generation_prompt(before, tools, asked)
        known, rest = answered.startswith(header), answered[len(header) :]
        own = header[len(_common([asked, header])) :]
        if known and prompt.strip():  # earlier messages are shown otherwise once they are answered
            _, asks, space = header.rpartition(prompt)
            if asks and not space.strip():
                return "", space + rest  # some templates put a space before an answer
            if own and asked.endswith(own):
                return "", rest
        opened = asked[len(header) :] if asked.startswith(header) else ""
        if opened.strip() and message["content"].startswith(opened):
            return opened, message["content"][len(opened) :] + tail
        if "reasoning_content" not in message:  # what closes the reasoning that the prompt opens
            thought = {**message, "reasoning_content": "0", "thinking": "0"}
            shown = self._try([*before, thought], tools) or ""
            if shown.startswith(asked + "0"):
                known, rest, opened = True, shown[len(asked) + 1 :], opened or prompt
        if not (known and opened):
            raise Refusal(
                f"messages[{len(before)}]: the chat template asks with a text that ends in {asked[-30:]!r}, but shows "
                "this answer without it; let the target answer (`specforge regenerate`), or give another "
                "--chat_template"
            )
        self.notes[
            f"answers learnt behind {short(opened)}, with which the chat template asks but does not show answers (the "
            "target's own are better: `specforge regenerate`)"
        ] += 1
        return "", rest

    def _generation_prompt(self, before: Messages, tools: Tools, asked: str) -> str:
        """What asks for an answer; of a template that adds nothing for that, what stands behind the last message."""
        plain = self.render(before, tools)
        prompt = asked[len(plain) :] if asked.startswith(plain) else asked
        if prompt.strip():
            return prompt
        *first, last = before
        texts = [self.render([*first, {**last, "content": text}], tools, generate=True) for text in ("0", "1")]
        return texts[0][len(_common(texts)) + 1 :]

    def _frame(self, before: Messages, tools: Tools) -> tuple[str, str]:
        """What the template puts before an answer, the messages included, and what it puts behind."""
        zero, one = (self.render([*before, _says(text)], tools) for text in ("0", "1"))
        header = _common([zero, one])
        return header, zero[len(header) + 1 :]

    def _check_answer(self, before: Messages, message: dict[str, Any], tools: Tools, answered: str, shown: str) -> None:
        """Refuse an answer that the template leaves out, and note one of which it leaves out a part."""
        where = f"messages[{len(before)}]"
        words = [text for key in ("content", "reasoning_content") if (text := message.get(key, "").strip())]
        missing = [text for text in words if text not in shown]
        if "tool_calls" in message:
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            if self._try([*before, rest], tools) == answered:
                raise Refusal(f"{where}: the chat template renders nothing of its tool calls")
        elif words and missing == words and self._try([*before, _says("")], tools) == answered:
            raise Refusal(f"{where}: the chat template renders nothing of it")
        if missing:
            self.notes["answers of which the chat template leaves out a part, such as reasoning"] += 1

    def _try(self, messages: Messages, tools: Tools) -> str | None:
        try:
            return self.render(messages, tools)
        except Refusal:
            return None

    def render(self, messages: Messages, tools: Tools, generate: bool = False) -> str:
        """The template's text.

        Args:
            messages: as the template takes them.
            tools: descriptions of the tools that may be called.
            generate: with the generation prompt, which asks for an answer.

        Raises:
            Refusal: the template does not take these messages.
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
        except Exception as error:  # a template is a program; whatever it raises concerns these messages
            raise Refusal(f"the chat template refuses it ({first_line(error)})") from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refusal("the chat template's text holds half of a surrogate pair") from error
        return text


def _printed(arguments: Any, text: str) -> bool:
    """Whether a text has a mapping or a list as Python prints it, ``{'a': 1}``, rather than as JSON."""
    printed = str(arguments)
    return isinstance(arguments, (dict, list)) and printed in text and printed != json.dumps(arguments)


def _words(message: dict[str, Any], answer: str) -> int | None:
    """Where in the template's text for an answer its words end; None where calls follow, or it shows other words."""
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
