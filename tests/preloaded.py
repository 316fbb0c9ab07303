"""What processes of `specforge` import, for forks of one that has (``tests/forks.py``)."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # whatever is not installed, such as ``tests``, and nothing of this folder

from transformers import LlamaForCausalLM  # noqa: E402, F401

import specforge.cli.fit  # noqa: E402
import specforge.inference.producer  # noqa: E402
import specforge.inference.target_server  # noqa: E402, F401
from tests import processes  # noqa: E402


def main(words: list[str]) -> int:
    """Call the ``module:function`` that the first word names with the others."""
    call, *words = words
    sys.argv = [processes.SPECFORGE, *words]
    sys.executable = processes.python()  # with which it starts others
    module, _, function = call.partition(":")
    status: int = getattr(import_module(module), function)(words)
    return status
