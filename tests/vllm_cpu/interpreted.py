"""``run.py`` with the model runner that vLLM uses on GPUs, whose kernels Triton interprets."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from run import main

__all__ = ["main"]
