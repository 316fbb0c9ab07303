"""The target in a vLLM server that captures (`--engine vllm`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specforge.errors import UserError
from specforge.inference.target_engine.served import ServedTargetEngine
from specforge.inference.vllm_server import FIELD, VERSIONS, VLLMServer


class VLLMTargetEngine(ServedTargetEngine):
    """A vLLM server that captures hidden states into a feature store: one that runs already, or one of its own.

    ``python`` needs vLLM and xxhash.
    """

    name, versions, server = "vllm", VERSIONS, VLLMServer
    flags = ("--tensor-parallel-size", "--quantization", "--max-model-len", "--gpu-memory-utilization")
    _model = ""

    @staticmethod
    def _expert_flags(devices: int) -> list[str]:
        return ["--enable-expert-parallel"]

    def _prepare(self) -> None:
        self._check_version(str((self._client.get("/version") or {}).get("version", "")))
        models = self._client.models()
        self._model = next((card["id"] for card in models if not card.get("parent")), models[0]["id"])

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
            if answer["choices"][0].get("finish_reason") == "abort":
                raise UserError(f"server {self.url}: the request was aborted")
            read, found = answer["choices"][0]["prompt_token_ids"], (answer["kv_transfer_params"] or {}).get(FIELD)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"server {self.url}: its answer is not that of a vLLM server") from error
        if read != list(ids):
            raise UserError(f"server {self.url}: has read other tokens than it was sent")
        return found
