"""The target in an SGLang server that captures (`--engine sglang`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from specforge.errors import UserError
from specforge.inference.handoff import Ticket
from specforge.inference.sglang_plugin import KEY, VERSIONS
from specforge.inference.sglang_server import SGLangServer
from specforge.inference.target_engine.served import ServedTargetEngine


class SGLangTargetEngine(ServedTargetEngine):
    """An SGLang server that captures hidden states into a feature store: one that runs already, or one of its own.

    It captures any layer but the last, and the last hidden states.
    """

    name, versions, server = "sglang", VERSIONS, SGLangServer
    flags = ("--tp-size", "--quantization", "--context-length", "--mem-fraction-static")

    @staticmethod
    def _expert_flags(devices: int) -> list[str]:
        return ["--ep-size", str(devices)]

    def _post(self, ids: Sequence[int], ticket: Callable[[], dict[str, Any]]) -> Any:
        def body() -> dict[str, Any]:
            # A ticket travels as text, because SGLang passes no nested values on.
            fields = ticket()
            sampling = {"temperature": 0, "max_new_tokens": 1, "custom_params": {KEY: json.dumps(fields)}}
            return {
                "rid": fields.get("uri"),  # for :meth:`_abort`
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

    def _abort(self, tickets: Sequence[Ticket]) -> None:
        """Have the server drop requests at once; it looks every few seconds whether their clients have gone."""
        for ticket in tickets:
            if not self._client.tell("/abort_request", {"rid": ticket.uri}):
                return
