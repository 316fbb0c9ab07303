"""Starts a vLLM server whose processes are forks of it: on a CPU vLLM starts them anew, and they import everything."""

from __future__ import annotations

import gc
import multiprocessing
import runpy

from vllm.model_executor.models import registry
from vllm.utils import system_utils

gc.collect = lambda *args: 0  # vLLM calls it again and again while it starts, and it looks through everything imported
registry._run_in_subprocess = lambda function: function()  # not one that imports vLLM again
system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
