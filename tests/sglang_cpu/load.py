"""Loads drafts as SGLang's draft worker does and writes what it holds (``drafts.py`` calls it).

Every parameter is NaN before the weights are read, so that one which no tensor reaches shows.
"""

from __future__ import annotations

import os
import socket

import launch  # noqa: F401, what SGLang needs on a CPU
import torch
from safetensors.torch import save_file
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.bootstrap import init_parallel_runtime
from sglang.srt.model_loader import loader
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import prepare_server_args

_initialize = loader._initialize_model


def _initialize_with_nan(*args: object, **kwargs: object) -> torch.nn.Module:
    model = _initialize(*args, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.fill_(float("nan"))
    return model


def main(target: str, *jobs: str) -> None:
    """Load every draft of ``FOLDER:FILE`` for a target into its file."""
    os.environ["SGLANG_RAGGED_VERIFY_MODE"] = "compact"  # the default drops the confidence head
    loader._initialize_model = _initialize_with_nan
    options = ["--device", "cpu", "--attention-backend", "intel_amx", "--dtype", "float32", "--disable-cuda-graph"]
    args = prepare_server_args(["--model-path", target, *options])
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        free = port.getsockname()[1]
    init_parallel_runtime(server_args=args, device="cpu", dist_port=free)
    for job in jobs:
        folder, file = job.split(":")
        config = ModelConfig.from_server_args(args, model_path=folder, is_draft_model=True)
        reader = loader.DefaultModelLoader(LoadConfig())
        model = reader.load_model(model_config=config, device_config=DeviceConfig("cpu"))
        held = {name: x.detach().clone().contiguous() for name, x in model.named_parameters()}
        hot = getattr(model, "hot_token_id", None)
        if hot is not None:
            held["hot_token_id"] = hot
        save_file(held, file)
