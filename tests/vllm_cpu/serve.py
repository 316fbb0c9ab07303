"""A vLLM server for ``tests/forks.py``, whose processes are forks of it: on a CPU vLLM starts them anew."""

from __future__ import annotations

import gc
import multiprocessing
from functools import partialmethod

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.model_executor.models import registry
from vllm.utils import system_utils

gc.collect = lambda *args: 0  # vLLM calls it again and again while it starts, and it looks through everything imported
registry._run_in_subprocess = lambda function: function()  # not one that imports vLLM again
system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
# Those that wait for each other poll for a second before they sleep, which takes the cores of those that work. (If they
# never poll, some wait in vain, for seconds.)
SpinCondition.__init__ = partialmethod(SpinCondition.__init__, busy_loop_s=0.1)

import vllm.model_executor.models.llama  # noqa: E402
import vllm.model_executor.models.llama_eagle3  # noqa: E402
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401 - once, not in each process
from vllm.entrypoints.launchers.api_server import entry  # noqa: E402


def main(words: list[str]) -> None:
    """Serve until a signal comes."""
    entry.main()
