"""The target in a vLLM server that captures (`specforge target serve --engine vllm`).

The server puts the features of a request into a feature store that this process shares; its answer only describes the
server. Each attempt at a request has names of its own in the store, so an attempt that was lost, with its server or
its connection, cannot touch the next one.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from specforge.contracts import CapturePolicy, PromptTask, Provenance, SampleRef
from specforge.errors import UserError
from specforge.inference.handoff import Handoff, NotDeliveredError, Ticket
from specforge.inference.server_client import ServerClient
from specforge.inference.target_engine.base import TargetEngine, check_layers, feature_widths
from specforge.inference.target_files import TargetFiles
from specforge.inference.vllm_server import FIELD, VERSIONS, VLLMOptions, VLLMServer
from specforge.options import PositiveInt, PositiveSeconds, PositiveShare
from specforge.runtime.addresses import open_backend
from specforge.runtime.data_plane.store import BadSampleError, StoreFullError
from specforge.system import available_memory

_ATTEMPTS = 3  # at a request whose features do not arrive, for example because the server was killed after its answer
_CHECK_SECONDS = 30.0  # for the features of two tokens to arrive
# Relative distance of a state from transformers', by dtype; a wrong layer is several times farther away.
_APART = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}

logger = logging.getLogger(__name__)
_Out = TypeVar("_Out")


class VLLMTargetEngine(TargetEngine):
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

    independent = True

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
        super().__init__(target, dtype)
        self.concurrency, self._patience, self._key = concurrency, patience, api_key_file
        self._compare, self._compared = compare, False
        self._pool = ThreadPoolExecutor(concurrency, "vllm")
        self._own: VLLMServer | None = None
        self._server: dict[str, Any] = {}  # the server's description of itself
        self._model, self._store = "", store
        flags: dict[str, Any] = {
            "--tensor-parallel-size": tensor_parallel,
            "--quantization": quantization,
            "--max-model-len": max_model_len,
            "--gpu-memory-utilization": memory,
        }
        words = [word for flag, value in flags.items() if value not in (None, 1) for word in (flag, str(value))]
        words += ["--enable-expert-parallel"] * expert_parallel + list(arguments or ())
        self._options = VLLMOptions(python or sys.executable, tuple(words), log)
        if url is not None:
            if words or python:
                raise UserError(f"engine vllm: {python or words[0]} is for starting a server; leave out either it or url")
            if store is None:
                raise UserError("engine vllm: no store; name the feature store that the server was started with")
            self._connect(url, store)

    def _connect(self, url: str, store: str) -> None:
        self._client = ServerClient(url, self._key, patience=self._patience, connections=self.concurrency)
        self.url, self.store = self._client.url, store
        self._handoff = Handoff(open_backend(store), self.url, min(self._patience, 120.0))

    def _start(self, policy: CapturePolicy) -> None:
        """Start a server that captures what a policy asks for."""
        own = VLLMServer(self.target, self.dtype, policy, self._store, self._options)
        try:
            own.wait()
        except BaseException:
            own.close()
            raise
        self._own = own
        self._connect(own.url, own.store)

    @property
    def commands(self) -> list[str]:
        """The options by which another process uses the same server."""
        return [f"--engine vllm --engine.url {self.url} --engine.store {self.store}"]

    @property
    def description(self) -> str:
        """Version and parallelism of the server."""
        found = self._server
        if not found:
            return ""
        expert = " ep" if found["expert_parallel"] else ""
        quantization = f" {found['quantization']}" if found["quantization"] else ""
        return f"vllm {found['version']} tp{found['tensor_parallel']}{expert}{quantization}"

    def close(self) -> None:
        """Close all connections, and end a server of its own."""
        if hasattr(self, "_client"):
            self._client.close()
        self._pool.shutdown(cancel_futures=True)
        if self._own is not None:
            self._own.close()

    def check(self, policy: CapturePolicy) -> None:
        """Check the server's version, target, dtype and layers, and capture two tokens."""
        check_layers(policy, self.target.num_layers, self.target.name)
        if not hasattr(self, "_client"):
            self._start(policy)
        self._server = self._probe()
        self._check_server(policy)
        ids = [0, self.target.vocab_size // 2]
        handoff = replace(self._handoff, patience=min(_CHECK_SECONDS, self._handoff.patience))
        try:
            features = self._capture_one(ids, policy, handoff)
        except NotDeliveredError as error:
            raise UserError(
                f"server {self.url}: its features do not arrive in {self.store}; it writes to "
                f"{self._server['store']}, which must be the same store"
            ) from error
        if self._compare and not self._compared:
            self._compare_with_transformers(ids, policy, features)
            self._compared = True

    def _probe(self) -> dict[str, Any]:
        """The server's description of itself."""
        version = str((self._client.get("/version") or {}).get("version", ""))
        if not version.startswith(VERSIONS):
            known = ", ".join(x.rstrip(".") for x in VERSIONS)
            raise UserError(f"server {self.url}: vLLM {version or 'of an unknown version'} is not supported; use {known}")
        models = self._client.get("/v1/models")
        self._model = next(card["id"] for card in models["data"] if not card.get("parent"))
        return self._ask([0], {})

    def _check_server(self, policy: CapturePolicy) -> None:
        found, where = self._server, f"server {self.url}"
        if found["target_fingerprint"] != self.target.fingerprint:
            raise UserError(
                f"{where}: serves another target than {self.target.name} (fingerprints "
                f"{str(found['target_fingerprint'])[:8]} and {self.target.fingerprint[:8]})"
            )
        if found["dtype"] != self.dtype:
            raise UserError(f"{where}: computes in {found['dtype']}, not {self.dtype}; set --dtype {found['dtype']}")
        missing = sorted(set(policy.layer_ids) - set(found["layers"]))
        if missing or (policy.last_hidden_states and not found["last_hidden_states"]):
            what = f"layer {missing[0]}" if missing else "the last hidden states"
            raise UserError(
                f"{where}: does not capture {what}, only layers {found['layers']}"
                f"{' and the last hidden states' if found['last_hidden_states'] else ''}; restart it with these layers "
                "(`specforge target serve --engine vllm`)"
            )

    def capture(self, input_ids: Sequence[Sequence[int]], policy: CapturePolicy) -> list[dict[str, Tensor]]:
        """Features of each sequence, as :meth:`TargetEngine.capture` specifies."""
        return self._together(lambda ids: self._capture_one(ids, policy, self._handoff), input_ids)

    def delivers_to(self, backend: object) -> bool:
        """Whether :meth:`deliver` stores samples in this store."""
        return self._handoff.fills(backend)

    def deliver(
        self, tasks: Sequence[PromptTask], names: Sequence[str], provenance: Provenance
    ) -> list[SampleRef | BadSampleError | StoreFullError]:
        """Have the server store samples, whose tensors then never pass through this process.

        Args:
            tasks: prompts.
            names: ids of their samples.
            provenance: what to capture, and the encoding.

        Returns:
            Per prompt the reference of its stored sample, or why there is none.

        Raises:
            UnavailableError: the server does not respond.
            UserError: the server refuses a request. In both cases nothing is stored.
        """

        def one(sample: tuple[str, PromptTask]) -> SampleRef | BadSampleError | StoreFullError:
            name, task = sample
            more = {"sample_id": name, "loss_mask": task.loss_mask, "source": task.source}
            try:
                return self._deliver(task.input_ids, provenance, self._handoff, **more)
            except (BadSampleError, StoreFullError) as error:
                return error

        return self._together(one, list(zip(names, tasks, strict=True)), self._discard)

    def _discard(self, found: SampleRef | BadSampleError | StoreFullError) -> None:
        if isinstance(found, SampleRef):
            self._handoff.backend.remove(f"{found.sample_id}.{found.generation}", found.uri)

    def _together(
        self, function: Callable[[Any], _Out], items: Sequence[Any], undo: Callable[[_Out], object] | None = None
    ) -> list[_Out]:
        """Call a function for each item, in several threads; if one fails, the results of the others are undone."""
        futures = [self._pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                if not future.cancel() and future.exception() is None and undo is not None:
                    undo(future.result())
            raise

    def _capture_one(self, ids: Sequence[int], policy: CapturePolicy, handoff: Handoff) -> dict[str, Tensor]:
        target = self.target
        provenance = Provenance(target.name, target.fingerprint, "", policy, self.dtype)
        ref = self._deliver(ids, provenance, handoff)
        names = feature_widths(policy, target.hidden_size)
        return {name: x for name, x in handoff.take(ref).items() if name in names}

    def _deliver(self, ids: Sequence[int], provenance: Provenance, handoff: Handoff, **more: Any) -> SampleRef:
        """Have the server store the features of one prompt."""
        limit = self._server["max_model_len"]
        if len(ids) >= limit:
            raise UserError(
                f"server {self.url}: a prompt of {len(ids)} tokens, but the server reads at most {limit - 1} "
                "(its --max-model-len, less one); restart it with a larger one, or prepare shorter prompts"
            )
        widths = feature_widths(provenance.capture, self.target.hidden_size)
        features = {name: (width, self.dtype) for name, width in widths.items()}
        for attempt in range(1, _ATTEMPTS + 1):
            tickets: list[tuple[Ticket, SampleRef]] = []

            def ticket() -> dict[str, Any]:
                tickets.append(handoff.expect(ids, features, provenance, **more))
                return tickets[-1][0].to_json()

            try:
                self._check_same(self._ask(ids, ticket))
                handoff.wait(tickets[-1][0])
                _, ref = tickets.pop()
                return ref
            except NotDeliveredError as error:
                if attempt == _ATTEMPTS or handoff is not self._handoff:
                    raise
                logger.warning("%s; asking again", error)
            finally:
                for lost, _ in tickets:
                    handoff.discard(lost)
        raise AssertionError

    def _ask(self, ids: Sequence[int], wanted: dict[str, Any] | Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Send a prompt; returns the server's description of itself.

        Args:
            ids: tokens of the prompt.
            wanted: the ticket; a function that makes one for each attempt.
        """

        def body() -> dict[str, Any]:
            return {
                "model": self._model,
                "prompt": list(ids),
                "max_tokens": 1,
                "temperature": 0,
                "return_token_ids": True,
                "kv_transfer_params": {FIELD: wanted() if callable(wanted) else wanted},
            }

        answer = self._client.post("/v1/completions", body)
        try:
            read, found = answer["choices"][0]["prompt_token_ids"], (answer["kv_transfer_params"] or {}).get(FIELD)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"server {self.url}: its answer is not that of a vLLM server") from error
        if found is None:
            raise UserError(
                f"server {self.url}: does not capture; start it with `specforge target serve --engine vllm`, or with "
                "the arguments that this command prints"
            )
        if "error" in found:
            raise UserError(f"server {self.url}: {found['error']}")
        if read != list(ids):
            raise UserError(f"server {self.url}: has read other tokens than it was sent")
        return dict(found)

    def _check_same(self, found: dict[str, Any]) -> None:
        """Reject a server that was restarted as another one."""
        changed = [name for name, value in self._server.items() if found.get(name) != value]
        if changed:
            name = changed[0]
            raise UserError(
                f"server {self.url}: was restarted with another {name} ({found.get(name)}, was {self._server[name]}); "
                "restart it as before"
            )

    def _compare_with_transformers(self, ids: list[int], policy: CapturePolicy, features: dict[str, Tensor]) -> None:
        from specforge.inference.target_engine.hf import HFTargetEngine

        size = sum(path.stat().st_size for path in set(self.target.weight_files.values()))
        if 2 * size > available_memory() or self._server["quantization"]:
            logger.warning("%s: not compared with transformers; it is quantised or too large", self.target.name)
            return
        with HFTargetEngine(self.target, self.dtype, "cpu") as reference:
            reference.check(policy)
            (expected,) = reference.capture([ids], policy)
        for name, x in features.items():
            parts = zip(x.float().split(self.target.hidden_size, -1), expected[name].float().split(self.target.hidden_size, -1), strict=True)
            apart = max(float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in parts)
            if not apart <= _APART[self.dtype]:
                raise UserError(
                    f"server {self.url}: its {name} differ from transformers' by {apart:.2g} of their size; drafts "
                    "would learn states that the target does not have"
                )
