"""Running vLLM's server so that it captures hidden states; its connector is in `vllm_connector.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from specforge.contracts import CapturePolicy
from specforge.errors import UserError
from specforge.inference.engine_server import EngineServer
from specforge.inference.target_files import TargetFiles

FIELD = "specforge"  # in the kv_transfer_params of a request and of its answer
VERSIONS = ("0.26.", "0.32.")  # that the connector was tested with
_MODULE, _CLASS = "specforge.inference.vllm_connector", "SpecForgeConnector"


def captured_ids(policy: CapturePolicy, target: TargetFiles) -> list[int]:
    """VLLM's ids of the states in a policy: id L is what enters layer L, id 0 the embedding.

    The last hidden states are computed from the output of the last layer.
    """
    last = {target.num_layers} if policy.last_hidden_states else set()
    return sorted({layer + 1 for layer in policy.layer_ids} | last)


def check_ids(ids: Sequence[int], target: TargetFiles) -> None:
    """Check vLLM's ids of captured states; vLLM accepts ids that do not exist, and returns wrong states.

    Raises:
        UserError: an id does not exist or is listed twice, or there is none.
    """
    if not ids or len(set(ids)) != len(ids) or min(ids) < 1 or max(ids) > target.num_layers:
        raise UserError(
            f"eagle_aux_hidden_state_layer_ids is {list(ids)}; {target.name} needs different ids between 1 and "
            f"{target.num_layers} (id L is the output of layer L - 1)"
        )


def capture_arguments(ids: Sequence[int], store: str) -> list[str]:
    """The arguments that make vLLM's server capture."""
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(ids)}},
    }
    transfer = {
        "kv_connector": _CLASS,
        "kv_connector_module_path": _MODULE,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"store": store},
    }
    return ["--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer)]


class VLLMServer(EngineServer):
    """A vLLM server of its own."""

    title, needs = "vLLM", ("vllm", "xxhash")
    launch = ("-m", "vllm.entrypoints.openai.api_server")

    def _arguments(self, target: TargetFiles, dtype: str, policy: CapturePolicy) -> list[str]:
        ids = captured_ids(policy, target)
        check_ids(ids, target)
        model = ["--model", str(target.folder.resolve()), "--served-model-name", target.name, "--dtype", dtype]
        return [*model, *capture_arguments(ids, self.store)]
