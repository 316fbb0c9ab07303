"""The target in an SGLang server that captures (`--engine sglang`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specforge.errors import UserError
from specforge.inference.engine_server import ServerOptions
from specforge.inference.sglang_plugin import KEY, VERSIONS
from specforge.inference.sglang_server import SGLangServer
from specforge.inference.target_engine.served import ServedTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.options import PositiveInt, PositiveSeconds, PositiveShare


class SGLangTargetEngine(ServedTargetEngine):
    """An SGLang server that captures hidden states into a feature store: one that runs already, or one of its own.

    It captures any layer but the last, and the last hidden states.

    Args:
        target: files of the expected target.
        dtype: its compute dtype.
        url: address of a running server, such as ``http://127.0.0.1:30000``; without it, one is started, and ends with
            this process.
        store: address of the server's feature store: a folder that both can access, or ``mooncake://...``; for a
            server of its own by default a temporary folder.
        api_key_file: file with the server's API key; none by default.
        concurrency: maximum number of requests in flight.
        patience: seconds to retry while the server does not respond, and to wait for features after its answer.
        compare: compare two tokens with transformers before anything is captured, if the target fits into memory.
        python: to start a server: interpreter of an environment with SGLang (default: this one).
        tensor_parallel: to start a server: number of devices that share each layer.
        expert_parallel: to start a server: give each device whole experts of a mixture-of-experts target.
        quantization: to start a server: SGLang's name of a quantisation (default: that of the target's files).
        max_model_len: to start a server: maximum length of a prompt, plus one (default: the target's).
        memory: to start a server: share of each device's memory that it may use (default: SGLang's).
        arguments: to start a server: more arguments of SGLang's server, such as ["--chunked-prefill-size", "4096"].
        log: to start a server: file for its output.

    Raises:
        UserError: the address is malformed, the file cannot be read, or the store cannot be opened.
    """

    name, versions, server = "sglang", VERSIONS, SGLangServer

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
        log: Path = Path("runs/sglang.log"),
    ) -> None:
        flags: dict[str, Any] = {
            "--tp-size": tensor_parallel,
            "--ep-size": tensor_parallel if expert_parallel else None,
            "--quantization": quantization,
            "--context-length": max_model_len,
            "--mem-fraction-static": memory,
        }
        words = [word for flag, value in flags.items() if value not in (None, 1) for word in (flag, str(value))]
        words += list(arguments or ())
        if url is not None and (words or python):
            raise UserError(f"engine sglang: {python or words[0]} is for starting a server; leave out either it or url")
        start = ServerOptions(python or sys.executable, tuple(words), log)
        super().__init__(target, dtype, url, store, api_key_file, concurrency, patience, compare, start)

    def _post(self, ids: Sequence[int], ticket: Callable[[], dict[str, Any]]) -> Any:
        def body() -> dict[str, Any]:
            # A ticket travels as text, because SGLang passes no nested values on.
            sampling = {"temperature": 0, "max_new_tokens": 1, "custom_params": {KEY: json.dumps(ticket())}}
            return {
                "input_ids": list(ids),
                "sampling_params": sampling,
                "return_hidden_states": True,
                "return_prompt_token_ids": True,
            }

        answer = self._client.post("/generate", body)
        try:
            read, meta = answer["prompt_token_ids"], answer["meta_info"]
            found, finish = meta.get(KEY), (meta["finish_reason"] or {}).get("type")
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"server {self.url}: its answer is not that of an SGLang server") from error
        if finish == "abort":
            raise UserError(f"server {self.url}: the request was aborted ({meta['finish_reason'].get('message')})")
        if read != list(ids):
            raise UserError(f"server {self.url}: has read other tokens than it was sent")
        return found[0] if found else None
