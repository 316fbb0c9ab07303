"""Runs SGLang's servers from one import of it, which takes most of a start: ``python fork.py``, with commands on stdin.

A command is a line: the JSON list of a server's arguments, or of ``load`` and what ``load.py`` takes. It runs in a
process group of its own, whose id is printed first, and at its end.

Triton's interpreter runs the kernels of block drafts, which SGLang gates to accelerators. For fp32 only: SGLang casts
what a draft reads to bfloat16 (``model_runner.py``), which this undoes.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import threading
import traceback

os.environ["TRITON_INTERPRET"] = "1"

import torch
from launch import overrides  # noqa: F401 - for what its import changes
from load import main as load
from sglang.launch_server import run_server
from sglang.srt.arg_groups import choices, speculative_hook
from sglang.srt.entrypoints import http_server  # noqa: F401 - imported once, as the next
from sglang.srt.managers import scheduler  # noqa: F401
from sglang.srt.server_args import prepare_server_args
from sglang.srt.speculative import dflash_info, dflash_worker_v2

torch.Tensor.bfloat16 = lambda self, *args, **kwargs: self
torch.Tensor.record_stream = lambda self, stream: None
choices.DRAFT_ATTENTION_BACKEND_CHOICES.append("intel_amx")
dflash_info.DFlashVerifyInput.tree_topk = 1
dflash_worker_v2.validate_domino_runtime = lambda **_: None  # it asks for CUDA and bfloat16

for _gate in (speculative_hook._handle_dflash, speculative_hook._handle_dspark):
    _source = inspect.getsource(_gate).replace('startswith("cuda")', 'startswith(("cuda", "cpu"))')
    _source = _source.replace('(("cuda", "npu", "xpu"))', '(("cuda", "npu", "xpu", "cpu"))')
    exec("from __future__ import annotations\n" + _source, vars(speculative_hook))


def serve(*words: str) -> None:
    """Run a server until it is killed."""
    run_server(prepare_server_args([*words, "--speculative-draft-attention-backend", "intel_amx"]))


def main() -> None:
    """Run commands until stdin ends."""
    for line in sys.stdin:
        words = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                os.setpgrp()
                print(f"process group {os.getpid()}", flush=True)
                load(*words[1:]) if words[0] == "load" else serve(*words)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        threading.Thread(target=_say_end, args=(child,)).start()


def _say_end(child: int) -> None:
    os.waitpid(child, 0)
    print(f"process group {child} ended", flush=True)


if __name__ == "__main__":
    main()
