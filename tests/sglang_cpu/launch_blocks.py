"""As ``launch.py``, for block drafts, which SGLang gates to accelerators; Triton's interpreter runs their kernels.

For fp32 only: SGLang casts what a draft reads to bfloat16 (``model_runner.py``), which this undoes.
"""

from __future__ import annotations

import inspect
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from launch import overrides  # noqa: F401 - for what its import changes
from sglang.srt.arg_groups import choices, speculative_hook
from sglang.srt.speculative import dflash_info

torch.Tensor.bfloat16 = lambda self, *args, **kwargs: self
torch.Tensor.record_stream = lambda self, stream: None
choices.DRAFT_ATTENTION_BACKEND_CHOICES.append("intel_amx")
dflash_info.DFlashVerifyInput.tree_topk = 1

for _gate in (speculative_hook._handle_dflash, speculative_hook._handle_dspark):
    _source = inspect.getsource(_gate).replace('startswith("cuda")', 'startswith(("cuda", "cpu"))')
    _source = _source.replace('(("cuda", "npu", "xpu"))', '(("cuda", "npu", "xpu", "cpu"))')
    exec("from __future__ import annotations\n" + _source, vars(speculative_hook))

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args([*sys.argv[1:], "--speculative-draft-attention-backend", "intel_amx"]))
