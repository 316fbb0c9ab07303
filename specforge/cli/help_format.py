"""The layout of ``--help``: what a user may enter, in words instead of Python's types."""

from __future__ import annotations

import re
from argparse import Action

import jsonargparse

_DETAILS = re.compile(
    r"\.? \((?P<required>required)?(?:, )?(?:type: (?P<type>.*?))?(?:, )?"
    r"(?:default: (?P<default>(?:[^()]|\([^()]*\))*))?\)$"
)
_RANGE = re.compile(r"\ba (?:whole number|number|port)\b.*?(?=, Literal| \||\]|$)")  # of a type of specforge.options
_PRINT_CONFIG = "print the resulting configuration and exit; =skip_default leaves out the defaults"


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Formatter that shows ranges and defaults, but neither Python types nor the subclasses of an option's class."""

    def _expand_help(self, action: Action) -> str:
        if action.dest == "print_config":
            return _PRINT_CONFIG
        text = re.sub(r", known subclasses: [^)]*", "", super()._expand_help(action).replace("``", "`"))
        details = _DETAILS.search(text)
        if details is None:
            return text
        required, kind, default = details.group("required", "type", "default")
        wanted = None if kind is None or re.search(r"(list|tuple|dict)\[", kind) else _RANGE.search(kind)
        allowed = wanted and wanted[0] + " or -1" * ("Literal[-1]" in str(kind))
        default = re.sub(r"\{'class_path': '[\w.]*\.(\w+)'\}", r"\1", default or "")
        default = {"True": "true", "False": "false", "null": ""}.get(default, default)
        found = ", ".join(part for part in (required, allowed, default and f"default: {default}") if part)
        return text[: details.start()] + (f" ({found})" if found else "")
