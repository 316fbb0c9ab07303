"""Runs vLLM engines one after another in one process, on a CPU: a program for ``tests/forks.py`` that takes a file.

Each job in it has ``name``, ``model``, ``prompts``, ``max_tokens``, ``end_ids`` and ``speculative`` (null for none).
The file ``NAME.json`` beside it gets the answers and the rounds of each prompt, or the ``error``, and
``NAME.safetensors`` the parameters of the last model that was loaded, the draft. Every parameter is NaN before the
weights are read, so that one which no tensor reaches shows.
"""

from __future__ import annotations

import gc
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

if os.environ.get("TRITON_INTERPRET"):  # the model runner that vLLM uses on GPUs, with its kernels interpreted

    class _Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    class _Backend:
        driver = _Driver

    import triton.backends

    triton.backends.backends["cpu"] = _Backend

    from triton.runtime import interpreter

    def _with_bools(function: Callable[..., Any], place: int) -> Callable[..., Any]:
        """Masks as the interpreter needs them; it makes integers of some."""

        def call(*args: Any) -> Any:
            mask = interpreter.TensorHandle(args[place].data.astype(bool), interpreter.tl.int1)
            return function(*args[:place], mask, *args[place + 1 :])

        return call

    _builder = interpreter.InterpreterBuilder
    _builder.create_masked_load = _with_bools(_builder.create_masked_load, 2)
    _builder.create_masked_store = _with_bools(_builder.create_masked_store, 3)

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models import registry

_collect = gc.collect
gc.collect = lambda *args: 0  # vLLM calls it eleven times for each engine, and it looks through everything imported
registry._run_in_subprocess = lambda function: function()  # not one that imports vLLM again
torch.cpu._is_amx_tile_supported = lambda: False  # where there is AMX, vLLM's latent attention has no fp32
# The kernel for CPUs returns wrong queries if they have three dimensions, which those of latent attention have.
RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native

_load_weights = DefaultModelLoader.load_weights
held: dict[str, torch.Tensor] = {}  # the parameters of the model that was loaded last


def _load_over_nan(self: DefaultModelLoader, model: torch.nn.Module, *args: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.fill_(float("nan"))
    _load_weights(self, model, *args)
    held.clear()  # now, because packing for the CPU empties them
    held.update({n: x.detach().clone().contiguous() for n, x in [*model.named_parameters(), *model.named_buffers()]})


DefaultModelLoader.load_weights = _load_over_nan


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The answers of one engine, and its counters."""
    llm = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=job.get("max_model_len", 256),
        max_num_seqs=8,
        kv_cache_memory_bytes=256 << 20,
        skip_tokenizer_init=True,
        speculative_config=job["speculative"],
        per_request_spec_decode_metrics="detailed" if job["speculative"] else "none",
    )
    try:
        sampling = SamplingParams(
            temperature=0, max_tokens=job["max_tokens"], stop_token_ids=job["end_ids"], detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        outputs = [reply.outputs[0] for reply in llm.generate(prompts, sampling, use_tqdm=False)]
        answers = [list(output.token_ids) for output in outputs]
        if not job["speculative"]:
            return {"answers": answers}
        counters = [output.spec_decode_metrics.to_dict() for output in outputs]
        return {"answers": answers, "rounds": [sum(c["acceptance_histogram"]) for c in counters]}
    finally:
        llm.llm_engine.engine_core.shutdown()


def main(words: list[str]) -> None:
    """Run every job of a file; one that fails stops no other."""
    path = Path(words[0])
    folder = path.parent
    for job in json.loads(path.read_text()):
        held.clear()
        try:
            result = run(job)
        except Exception:
            result = {"error": traceback.format_exc()[-4000:]}
        finally:
            cleanup_dist_env_and_memory()
            _collect()
        save_file(held, folder / f"{job['name']}.safetensors")
        (folder / f"{job['name']}.json").write_text(json.dumps(result))
