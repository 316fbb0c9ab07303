"""What processes of `specforge` and workers of Ray import, for forks of one that has (``tests/forks.py``)."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # whatever is not installed, such as ``tests``, and nothing of this folder

from transformers import LlamaForCausalLM  # noqa: E402, F401

import specforge.cli.fit  # noqa: E402
import specforge.inference.producer  # noqa: E402
import specforge.inference.target_server  # noqa: E402, F401
from tests import processes  # noqa: E402

with suppress(ImportError):  # installed with Ray, whose workers need it; Ray reads its environment when it is imported
    import pandas  # noqa: F401


def main(words: list[str]) -> int:
    """Call the ``module:function`` that the first word names with the others."""
    call, *words = words
    sys.argv = [processes.SPECFORGE, *words]
    sys.executable = processes.python()  # with which it starts others
    module, _, function = call.partition(":")
    status: int = getattr(import_module(module), function)(words)
    return status
