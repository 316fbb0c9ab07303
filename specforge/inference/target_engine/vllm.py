"""The target in a vLLM server that captures (`--engine vllm`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specforge.errors import UserError
from specforge.inference.engine_server import ServerOptions
from specforge.inference.target_engine.served import ServedTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.inference.vllm_server import FIELD, VERSIONS, VLLMServer
from specforge.options import PositiveInt, PositiveSeconds, PositiveShare


class VLLMTargetEngine(ServedTargetEngine):
    """A vLLM server that captures hidden states into a feature store: one that runs already, or one of its own.

    Args:
        target: files of the expected target.
        dtype: its compute dtype.
        url: address of a running server, such as ``http://127.0.0.1:8000``; without it, one is started, and ends with
            this process.
        store: address of the server's feature store: a folder that both can access, or ``mooncake://...``; for a
            server of its own by default a temporary folder.
        api_key_file: file with the server's API key; none by default.
        concurrency: maximum number of requests in flight.
        patience: seconds to retry while the server does not respond, and to wait for features after its answer.
        compare: compare two tokens with transformers before anything is captured, if the target fits into memory.
        python: to start a server: interpreter of an environment with vLLM and xxhash (default: this one).
        tensor_parallel: to start a server: number of devices that share each layer.
        expert_parallel: to start a server: give each device whole experts of a mixture-of-experts target.
        quantization: to start a server: vLLM's name of a quantisation (default: that of the target's files).
        max_model_len: to start a server: maximum length of a prompt, plus one (default: the target's).
        memory: to start a server: share of each device's memory that it may use (default: vLLM's).
        arguments: to start a server: more arguments of vLLM's server, such as ["--enforce-eager"].
        log: to start a server: file for its output.

    Raises:
        UserError: the address is malformed, the file cannot be read, or the store cannot be opened.
    """

    name, versions, server = "vllm", VERSIONS, VLLMServer

    def __init__(
        self,
        target: TargetFiles,
        dtype: str,
        url: str | None = None,
        store: str | None = None,
        api_key_file: Path | None = None,
        concurrency: PositiveInt = 32,
        patience: PositiveSeconds = 300.0,
        compare: bool = True,
        python: str | None = None,
        tensor_parallel: PositiveInt = 1,
        expert_parallel: bool = False,
        quantization: str | None = None,
        max_model_len: PositiveInt | None = None,
        memory: PositiveShare | None = None,
        arguments: list[str] | None = None,
        log: Path = Path("runs/vllm.log"),
    ) -> None:
        flags: dict[str, Any] = {
            "--tensor-parallel-size": tensor_parallel,
            "--quantization": quantization,
            "--max-model-len": max_model_len,
            "--gpu-memory-utilization": memory,
        }
        words = [word for flag, value in flags.items() if value not in (None, 1) for word in (flag, str(value))]
        words += ["--enable-expert-parallel"] * expert_parallel + list(arguments or ())
        if url is not None and (words or python):
            raise UserError(f"engine vllm: {python or words[0]} is for starting a server; leave out either it or url")
        start = ServerOptions(python or sys.executable, tuple(words), log)
        super().__init__(target, dtype, url, store, api_key_file, concurrency, patience, compare, start)
        self._model = ""

    def _prepare(self) -> None:
        self._check_version(str((self._client.get("/version") or {}).get("version", "")))
        models = self._client.get("/v1/models")
        self._model = next(card["id"] for card in models["data"] if not card.get("parent"))

    def _post(self, ids: Sequence[int], ticket: Callable[[], dict[str, Any]]) -> Any:
        def body() -> dict[str, Any]:
            return {
                "model": self._model,
                "prompt": list(ids),
                "max_tokens": 1,
                "temperature": 0,
                "return_token_ids": True,
                "kv_transfer_params": {FIELD: ticket()},
            }

        answer = self._client.post("/v1/completions", body)
        try:
            read, found = answer["choices"][0]["prompt_token_ids"], (answer["kv_transfer_params"] or {}).get(FIELD)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"server {self.url}: its answer is not that of a vLLM server") from error
        if read != list(ids):
            raise UserError(f"server {self.url}: has read other tokens than it was sent")
        return found
