"""A KV connector that puts the hidden states which vLLM captures into a feature store.

vLLM's ``extract_hidden_states`` keeps the states of all tokens beside their keys and values. This connector copies
those of a prompt out of the cache when a request asks for them, and hands them to a :class:`FeatureSink`, which
writes. Blocks are held only until the copy is complete. Requests that ask for nothing are not touched.

A request asks with a :class:`Ticket` as ``kv_transfer_params["specforge"]``; the answer's field of the same name
describes the server, or has an ``error``. With an empty object in place of the ticket, a request asks for the
description alone.

vLLM imports this module (``kv_connector_module_path``). Its environment needs no package that vLLM does not bring,
except xxhash.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from specforge.errors import UserError
from specforge.files import first_line
from specforge.inference.handoff import FeatureSink, Ticket, select_states
from specforge.inference.target_files import TargetFiles
from specforge.inference.vllm_server import FIELD, check_ids
from specforge.runtime.addresses import open_backend

_COPIES = 8  # prompts whose states are being copied from a GPU at a time
_ABORTED = "FINISHED_ABORTED"  # vLLM's name for a request whose client has gone
_DRAIN_SECONDS = 30.0  # to write what is queued when the server ends

logger = logging.getLogger(__name__)


@dataclass
class _Prompt:
    """A finished request whose prompt was captured.

    Attributes:
        request_id: vLLM's.
        ticket: the client's.
        input_ids: tokens of the prompt.
        blocks: the blocks of the cache that hold their states.
        reason: why there are no states; empty if there are.
    """

    request_id: str
    ticket: Ticket
    input_ids: list[int]
    blocks: list[int]
    reason: str = ""


@dataclass
class _Prompts(KVConnectorMetadata):
    """What the scheduler tells the workers in one step."""

    prompts: list[_Prompt] = field(default_factory=list)


_NONE = _Prompts()


class SpecForgeConnector(KVConnectorBase_V1, SupportsHMA):
    """Instantiated by vLLM: once beside the scheduler, and once in each worker.

    Raises:
        ValueError: vLLM cannot capture what its options say; the server does not start.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._target = TargetFiles.find(vllm_config.model_config.model)
        self._ids = _captured_ids(vllm_config)
        check_ids(self._ids, self._target)
        self._store = vllm_config.kv_transfer_config.get_from_extra_config("store", "")
        if not self._store:
            raise UserError('kv_connector_extra_config names no feature store; add {"store": "FOLDER"}')
        self._prompts: list[_Prompt] = []
        self._exporter: Exporter | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._group = _cache_group(kv_cache_config)
            self._description = self._describe(vllm_config)

    def _describe(self, vllm_config: Any) -> dict[str, Any]:
        """What a client checks before it relies on this server."""
        import vllm

        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        return {
            "version": vllm.__version__,
            "target_fingerprint": self._target.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization or "",
            "layers": [i - 1 for i in self._ids],
            "last_hidden_states": self._target.num_layers in self._ids,
            "max_model_len": model.max_model_len,
            "tensor_parallel": parallel.tensor_parallel_size,
            "expert_parallel": bool(parallel.enable_expert_parallel),
            "store": self._store,
        }

    # Beside the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Nothing is loaded from anywhere."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing to do."""

    def request_finished_all_groups(
        self, request: Any, block_ids: Sequence[list[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Note a request that asked for its states; returns whether to hold its blocks, and the client's answer."""
        params = request.kv_transfer_params
        if not params or FIELD not in params:
            return False, None
        if params[FIELD] == {}:
            return False, {FIELD: self._description}
        try:
            ticket = Ticket.from_json(params[FIELD])
        except Exception as error:  # whatever a client sends, the engine goes on
            return False, {FIELD: {"error": f"malformed ticket: {first_line(error)}"}}
        if request.status.name == _ABORTED:  # nobody waits for anything
            return False, {FIELD: self._description}
        prompt = _Prompt(request.request_id, ticket, list(request.prompt_token_ids or ()), [])
        if request.num_output_tokens:
            prompt.blocks = list(block_ids[self._group])
        else:
            prompt.reason = "the request ended before its prompt was read"
        self._prompts.append(prompt)
        return not prompt.reason, {FIELD: self._description}

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """As above, where there is one group of blocks."""
        return self.request_finished_all_groups(request, [block_ids])

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the workers are to do in the next step."""
        if not self._prompts:
            return _NONE
        prompts, self._prompts = self._prompts, []
        return _Prompts(prompts)

    def get_finished_count(self) -> int:
        """One worker reports each request, whatever their number."""
        return 1

    # In each worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Find the cache with the captured states; every worker of a stage has all of them, the first one exports."""
        from vllm.config import get_layers_from_vllm_config
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        found = list(get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches)))
        if not found or get_tensor_model_parallel_rank() != 0:
            return
        cache = _by_state(kv_caches[found[0]], len(self._ids))
        norm = None
        if self._target.num_layers in self._ids:
            norm = self._target.norm_module(cache.dtype).to(cache.device)
        sink = FeatureSink(open_backend(self._store, create=True))
        self._exporter = Exporter(cache, self._ids, norm, sink)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Export prompts; returns the requests that no longer need their blocks."""
        if self._exporter is None:
            return None, None
        metadata = self._connector_metadata
        if isinstance(metadata, _Prompts):
            self._exporter.add(metadata.prompts)
        return self._exporter.step() or None, None

    def shutdown(self) -> None:
        """Write what is queued."""
        if self._exporter is not None and not self._exporter.sink.drain(_DRAIN_SECONDS):
            logger.warning("features that are still queued are lost")

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to do."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do: states are copied once their prompt is complete."""

    def wait_for_save(self) -> None:
        """Nothing to do."""


class _Copy(NamedTuple):
    """States of a prompt on their way out of the cache; `states` returns them once `event`, if any, has happened."""

    prompt: _Prompt
    states: Callable[[], dict[str, Tensor]]
    nbytes: int
    event: Any


class Exporter:
    """Copies captured states from the cache to a sink; no method raises.

    Args:
        cache: ``[blocks, K, block size, H]``: the K captured states of each slot.
        ids: vLLM's id of each, ascending; id L is what enters layer L.
        norm: the target's norm after its last layer; None if the last id is not captured.
        sink: where the states go.
    """

    def __init__(self, cache: Tensor, ids: Sequence[int], norm: Callable[[Tensor], Tensor] | None, sink: Any) -> None:
        self._cache, self._ids, self._norm, self.sink = cache.permute(0, 2, 1, 3), ids, norm, sink
        self._waiting: deque[_Prompt] = deque()
        self._copying: deque[_Copy] = deque()
        self._stream = torch.cuda.Stream(cache.device) if cache.is_cuda else None

    def add(self, prompts: Sequence[_Prompt]) -> None:
        """Queue prompts."""
        self._waiting.extend(prompts)

    @torch.no_grad()
    def step(self) -> set[str]:
        """Start copies while the sink has room, and hand over complete ones; returns their requests."""
        done: set[str] = set()
        while self._waiting and len(self._copying) < _COPIES and (self._waiting[0].reason or self.sink.has_room()):
            prompt = self._waiting.popleft()
            if prompt.reason:
                self.sink.fail(prompt.ticket, prompt.reason)
                continue
            try:
                self._start(prompt)
            except Exception as error:
                logger.exception("sample %s: cannot be copied", prompt.ticket.key)
                self.sink.fail(prompt.ticket, f"the states cannot be copied ({first_line(error)})")
                done.add(prompt.request_id)
        while self._copying and (self._copying[0].event is None or self._copying[0].event.query()):
            prompt, states, nbytes, _ = self._copying.popleft()
            self.sink.submit(prompt.ticket, prompt.input_ids, states, nbytes)
            done.add(prompt.request_id)
        return done

    def _start(self, prompt: _Prompt) -> None:
        if self._stream is None:
            rows = self._gather(prompt)
            self._copying.append(_Copy(prompt, partial(self._states, prompt, rows), rows.nbytes, None))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._cache.device))
        with torch.cuda.stream(self._stream):
            found = self._states(prompt, self._gather(prompt))
            pinned = {
                name: torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for name, x in found.items()
            }
            event = torch.cuda.Event()
            event.record(self._stream)
        self._copying.append(_Copy(prompt, lambda: pinned, sum(x.nbytes for x in pinned.values()), event))

    def _gather(self, prompt: _Prompt) -> Tensor:
        """States of a prompt's tokens, ``[T, K, H]``; whole blocks are copied, which is faster than slots."""
        length = len(prompt.input_ids)
        count = -(-length // self._cache.shape[1])
        blocks = torch.tensor(prompt.blocks[:count])
        if len(blocks) < count:
            raise RuntimeError(f"{len(prompt.blocks)} blocks do not hold {length} tokens")
        return self._cache.index_select(0, blocks.to(self._cache.device)).flatten(0, 1)[:length]

    @torch.no_grad()
    def _states(self, prompt: _Prompt, rows: Tensor) -> dict[str, Tensor]:
        """What a prompt's ticket asks for, from ``[T, K, H]`` and on its device."""
        layers = {i - 1: rows[:, column] for column, i in enumerate(self._ids)}
        norm = self._norm
        return select_states(prompt.ticket.capture, layers, None if norm is None else lambda: norm(rows[:, -1]))


def _captured_ids(vllm_config: Any) -> list[int]:
    """VLLM's ids of the captured states, in the order in which it returns them.

    Raises:
        UserError: the server does not capture.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "extract_hidden_states":
        raise UserError('SpecForgeConnector needs --speculative-config with the method "extract_hidden_states"')
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        raise UserError("SpecForgeConnector: with decode context parallelism no worker has all states; set it to 1")
    found = getattr(speculative.draft_model_config.hf_config, "eagle_aux_hidden_state_layer_ids", None)
    return sorted(found) if isinstance(found, list) and all(type(i) is int for i in found) else []


def _by_state(cache: Tensor, count: int) -> Tensor:
    """A cache of captured states as ``[blocks, K, block size, H]``, in which vLLM 0.26 swaps the middle two.

    Raises:
        UserError: it does not hold ``count`` states of each token.
    """
    import vllm

    cache = cache.transpose(1, 2) if vllm.__version__.startswith("0.26.") else cache
    if cache.shape[1] != count:
        raise UserError(f"SpecForgeConnector: the cache of vLLM {vllm.__version__} has an unknown form")
    return cache


def _cache_group(kv_cache_config: Any) -> int:
    """Index of the group of blocks with the captured states.

    Raises:
        UserError: vLLM keeps them together with a cache of another form.
    """
    from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

    groups = kv_cache_config.kv_cache_groups
    found = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
    if len(found) != 1 and len(groups) != 1:
        raise UserError(f"SpecForgeConnector: {len(groups)} groups of blocks, none of hidden states alone")
    return found[0] if found else 0
