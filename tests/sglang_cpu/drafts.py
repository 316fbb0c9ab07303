"""An SGLang server for every draft, and what it holds of drafts (``load.py``), for ``tests/forks.py``.

Triton's interpreter runs the kernels of block drafts, which SGLang gates to accelerators. For fp32 only: SGLang casts
what a draft reads to bfloat16 (``model_runner.py``), which this undoes.
"""

from __future__ import annotations

import inspect
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from launch import main as serve
from load import main as load
from sglang.srt.arg_groups import choices, speculative_hook
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


def main(words: list[str]) -> None:
    """Load drafts, or run a server until it is killed."""
    if words[0] == "load":
        load(*words[1:])
    else:
        serve([*words, "--speculative-draft-attention-backend", "intel_amx"])
