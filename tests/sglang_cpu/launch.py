"""An SGLang server on a CPU without AMX, with the stand-in kernels, for ``tests/forks.py``.

SGLang's worker processes are forks of the server's, so that everything at its top holds in them too.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))  # the stand-in for sgl_kernel
multiprocessing.set_start_method("fork")
multiprocessing.set_start_method = lambda *args, **kwargs: None  # SGLang's "spawn" would import everything again

# PyPI's torchvision was built for CUDA; with a CPU build of torch the operators that it extends are not there.
_SCHEMAS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from sglang.launch_server import run_server  # noqa: E402
from sglang.srt.arg_groups import overrides  # noqa: E402
from sglang.srt.entrypoints import http_server  # noqa: E402, F401 - imported once, as the next
from sglang.srt.layers.rotary_embedding import factory  # noqa: E402
from sglang.srt.managers import scheduler  # noqa: E402, F401
from sglang.srt.server_args import prepare_server_args  # noqa: E402

# Latent attention has, on a CPU, DeepSeek's scaled positions only.
factory.get_rope_cpu = lambda *args: factory.get_rope(*args[:-1])

torch.cuda.synchronize = lambda device=None: None  # called by models on any device, once they share an embedding

_get_platform = overrides.get_platform


class _WithAMX:
    """SGLang drafts on a CPU with its AMX backend only; the stand-in's kernels need no AMX."""

    has_amx = True

    def __getattr__(self, name: str) -> object:
        return getattr(_get_platform(), name)


overrides.get_platform = _WithAMX


def main(words: list[str]) -> None:
    """Serve until a signal comes."""
    run_server(prepare_server_args(words))
