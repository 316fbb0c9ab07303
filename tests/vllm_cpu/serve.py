"""Starts a vLLM server whose processes are forks of it: on a CPU vLLM spawns them, and they import everything again."""

from __future__ import annotations

import multiprocessing
import runpy

from vllm.utils import system_utils

system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
