"""Capture inside SGLang: a plugin that hands the hidden states of requests with a ticket to a feature store.

SGLang loads :func:`install` in each of its processes, through the entry-point group ``sglang.srt.plugins``;
:func:`write_distribution` makes a folder for its PYTHONPATH that holds the entry point, this package, and the address
of the store. A request asks for features with ``return_hidden_states`` and a :class:`Ticket`, as JSON text, in
``sampling_params.custom_params["specforge"]``; ``meta_info["specforge"]`` of the answer describes the server, or has an
``error``. With an empty object in place of the ticket, a request asks for the description alone. Requests without a
ticket are not touched.

SGLang has no interface for this, so the plugin wraps methods of its scheduler. Their names and parameters change from
version to version: versions that were not tested are refused.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES
from specforge.errors import UserError
from specforge.files import first_line
from specforge.inference.handoff import FeatureSink, Ticket
from specforge.inference.target_files import TargetFiles
from specforge.runtime.addresses import open_backend

VERSIONS = ("0.5.23",)  # tested versions of SGLang
KEY = "specforge"  # in the custom_params of a request and in the meta_info of its answer
_DISTRIBUTION, _STORE = "specforge-sglang-plugin", "store.json"
_MANAGERS = "sglang.srt.managers"
# Each wrapped method, and the parameters that its wrapper relies on.
_METHODS = {
    f"{_MANAGERS}.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor"
    "._append_prefill_hidden_states": (
        "self",
        "req",
        "logits_output",
        "hidden_state_offset",
        "capture_hidden_mode",
        "extend_input_len",
        "store",
    ),
    f"{_MANAGERS}.utils:GenerationBatchResult.copy_to_cpu": ("self", "return_logprob", "return_hidden_states"),
    f"{_MANAGERS}.scheduler_components.request_receiver:SchedulerRequestReceiver._pull_raw_reqs": ("self",),
}

logger = logging.getLogger(__name__)


def write_distribution(folder: Path, store: str, max_bytes: int) -> None:
    """Fill a folder for PYTHONPATH through which SGLang finds the plugin, and none of this environment's packages.

    Args:
        folder: an empty folder; it must exist for as long as the server runs.
        store: address of the feature store.
        max_bytes: features that may wait in the server's memory until the store has taken them.
    """
    (folder / "specforge").symlink_to(Path(__file__).parents[1], target_is_directory=True)
    info = folder / f"{_DISTRIBUTION.replace('-', '_')}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_DISTRIBUTION}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{KEY} = {__name__}:install\n")
    (info / _STORE).write_text(json.dumps({"store": store, "max_bytes": max_bytes}))


def install() -> None:
    """Wrap SGLang's methods.

    Raises:
        SystemExit: this version of SGLang is not supported. (SGLang logs any other exception, and serves without.)
    """
    try:
        check_version(version("sglang"))
        methods = [_find(path, parameters) for path, parameters in _METHODS.items()]
    except UserError as error:
        raise SystemExit(f"specforge: {error}") from error
    capture = Capture(_start, _is_writer)
    wrappers: list[Callable[..., Any]] = [capture.append_prefill_hidden_states, capture.copy_to_cpu, capture.pull]
    for (cls, name), wrapper in zip(methods, wrappers, strict=True):
        setattr(cls, name, _wrapped(getattr(cls, name), wrapper))


def check_version(found: str) -> None:
    """Refuse a version of SGLang that was not tested.

    Raises:
        UserError: names the version, and those that are supported.
    """
    if found not in VERSIONS:
        raise UserError(f"SGLang {found}: features cannot be captured with it; install {' or '.join(VERSIONS)}")


def _find(path: str, parameters: tuple[str, ...]) -> tuple[type, str]:
    """The class and the name of a method that has these parameters."""
    module, _, name = path.partition(":")
    try:
        cls_name, method = name.split(".")
        cls = getattr(importlib.import_module(module), cls_name)
        found = tuple(inspect.signature(getattr(cls, method)).parameters)
    except (ImportError, AttributeError) as error:
        raise UserError(f"SGLang: {path} is missing ({first_line(error)})") from error
    if found != parameters:
        raise UserError(f"SGLang: {path} takes {', '.join(found)}, not {', '.join(parameters)}")
    return cls, method


def _wrapped(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    return call


def _start(receiver: Any) -> tuple[FeatureSink, dict[str, Any]]:
    """Open the store, and describe this server for its clients, once it is known how it was started.

    Raises:
        SystemExit: the server cannot capture, or the store cannot be opened.
    """
    settings = json.loads(distribution(_DISTRIBUTION).read_text(_STORE) or "")
    options = receiver.server_args.resolved_dict()
    try:
        description = describe(options, receiver.model_config, settings["store"])
        return FeatureSink(open_backend(settings["store"], create=True), settings["max_bytes"]), description
    except UserError as error:
        raise SystemExit(f"specforge: {error}") from error


def describe(options: Mapping[str, Any], model: Any, store: str) -> dict[str, Any]:
    """What a client checks before it relies on a server.

    Args:
        options: SGLang's, as it has resolved them.
        model: its ``ModelConfig``.
        store: address of the feature store.

    Raises:
        UserError: the server was started so that it cannot capture.
    """
    layers = options["return_aux_hidden_state_layer_ids"]
    if not options["enable_return_aux_hidden_states"] or not layers:
        raise UserError(
            "SGLang captures no layers; start it with --enable-return-aux-hidden-states --speculative-algorithm EAGLE3 "
            "--return-aux-hidden-state-layer-ids ..."
        )
    if not options["disable_radix_cache"]:
        raise UserError("SGLang does not compute tokens that its radix cache holds; add --disable-radix-cache")
    return {
        "version": version("sglang"),
        "target_fingerprint": TargetFiles.find(options["model_path"]).fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization or "",
        "layers": sorted(layers),  # the order of their columns, which is that of the forward pass
        "last_hidden_states": True,
        "max_model_len": model.context_len,
        "tensor_parallel": options["tp_size"],
        "expert_parallel": options["ep_size"] > 1,
        "store": store,
    }


def _is_writer() -> bool:
    """Whether this process is the first of those that hold the same states."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().attn_tp_rank == 0 and get_parallel().attn_cp_rank == 0


@dataclass
class _Prompt:
    """Rows of one prompt, one chunk after another."""

    ticket: Ticket
    aux: Tensor  # [T, k H], the ticket's layers
    last: Tensor | None  # [T, H]
    rows: int = 0  # rows that are there


@dataclass
class Capture:
    """What the plugin does in a scheduler process. Nothing here raises or waits: it runs in SGLang's only loop."""

    start: Callable[[Any], tuple[FeatureSink, dict[str, Any]]]  # called once, in the rank that hands states over
    is_writer: Callable[[], bool]  # whether this is that rank; the others hold the same states
    _sink: FeatureSink | None = None
    _description: dict[str, Any] = field(default_factory=dict)  # of the server
    _prompts: WeakKeyDictionary[Any, _Prompt | None] = field(default_factory=WeakKeyDictionary)
    _held: list[Any] = field(default_factory=list)

    def pull(self, original: Callable[..., list[Any] | None], receiver: Any) -> list[Any] | None:
        """Hold back requests with a ticket while the sink is full; others overtake them.

        Only the rank that receives requests decides, and before it shares them, so that all ranks run the same batches.
        """
        received = original(receiver)
        if received is None:
            return None
        if self._sink is None and self.is_writer():  # SGLang's loop begins
            self._sink, self._description = self.start(receiver)
        if not self._held and not any(map(_has_ticket, received)):
            return received
        arrived, self._held = [*self._held, *received], []
        aborts = [x for x in received if type(x).__name__ == "AbortReq"]
        passed: list[Any] = []
        for request in arrived:
            aborted = any(x.abort_all or str(request.rid).startswith(x.rid) for x in aborts)
            held = _has_ticket(request) and not aborted and self._sink is not None and not self._sink.has_room()
            (self._held if held else passed).append(request)
        return passed

    def copy_to_cpu(
        self, original: Callable[..., None], result: Any, return_logprob: bool, return_hidden_states: bool = True
    ) -> None:
        """Copy the last hidden states together with the others, where SGLang overlaps batches."""
        output = result.logits_output
        last = None if output is None else output.last_hidden_states
        if return_hidden_states and last is not None and self.is_writer():
            from sglang.srt.managers.utils import _async_d2h

            output.last_hidden_states = _async_d2h(last)
        original(result, return_logprob, return_hidden_states)

    def append_prefill_hidden_states(
        self,
        original: Callable[..., int],
        processor: Any,
        *,
        req: Any,
        logits_output: Any,
        hidden_state_offset: int,
        capture_hidden_mode: Any,
        extend_input_len: int,
        store: bool = True,
    ) -> int:
        """Collect a chunk of a request with a ticket; returns the offset of the next request's rows."""
        if not _asks(req):
            return original(
                processor,
                req=req,
                logits_output=logits_output,
                hidden_state_offset=hidden_state_offset,
                capture_hidden_mode=capture_hidden_mode,
                extend_input_len=extend_input_len,
                store=store,
            )
        end = hidden_state_offset + (extend_input_len if capture_hidden_mode.is_full() else 1)
        if self.is_writer():
            try:
                self._collect(req, logits_output, slice(hidden_state_offset, end), store)
            except Exception as error:
                logger.warning("request %s: cannot be captured", req.rid, exc_info=not isinstance(error, UserError))
                self._fail(req, first_line(error))
        return end

    def _collect(self, req: Any, output: Any, rows: slice, is_complete: bool) -> None:
        length = len(req.origin_input_ids)
        if req not in self._prompts:
            self._prompts[req] = self._begin(req, output, length)
        prompt = self._prompts[req]
        if prompt is None:
            return
        if req.is_retracted:  # it starts again, with the tokens that it has generated at its end
            prompt.rows = 0
            return
        into = slice(prompt.rows, min(length, prompt.rows + rows.stop - rows.start))
        from_ = slice(rows.start, rows.start + into.stop - into.start)
        self._copy(prompt, output, into, from_)
        prompt.rows = into.stop
        if is_complete:
            self._hand_over(req, prompt)

    def _begin(self, req: Any, output: Any, length: int) -> _Prompt | None:
        """Answer a ticket; returns room for the rows of its prompt, or None if it does not ask for any."""
        answer, prompt, layers = self._description, None, self._description["layers"]
        try:
            fields = json.loads(req.sampling_params.custom_params[KEY])
            if fields != {}:
                ticket = Ticket.from_json(fields)
                policy, width = ticket.capture, output.last_hidden_states.shape[1]
                if not set(policy.layer_ids) <= set(layers):
                    raise ValueError(f"layers {list(policy.layer_ids[:20])}, but {layers} are captured")
                aux = output.hidden_states.new_empty(length, width * len(policy.layer_ids), device="cpu")
                last = output.last_hidden_states.new_empty(length, width, device="cpu")
                prompt = _Prompt(ticket, aux, last if policy.last_hidden_states else None)
        except (ValueError, RecursionError) as error:
            answer = {"error": f"malformed ticket: {first_line(error)}"}
        req.customized_info = {**(req.customized_info or {}), KEY: [answer]}
        return prompt

    def _copy(self, prompt: _Prompt, output: Any, into: slice, rows: slice) -> None:
        layers, width = self._description["layers"], output.last_hidden_states.shape[1]
        states, expected = output.hidden_states[rows], (rows.stop - rows.start, width * len(layers))
        if states.shape != expected:
            raise UserError(f"SGLang returned states of shape {tuple(states.shape)}, not {expected}")
        for i, layer in enumerate(prompt.ticket.capture.layer_ids):
            column = layers.index(layer) * width
            prompt.aux[into, i * width : (i + 1) * width] = states[:, column : column + width]
        if prompt.last is not None:
            prompt.last[into] = output.last_hidden_states[rows]

    def _hand_over(self, req: Any, prompt: _Prompt) -> None:
        assert self._sink is not None
        self._prompts[req] = None
        if _is_aborted(req):  # nobody waits for anything
            return
        length, policy = len(prompt.aux), prompt.ticket.capture
        if prompt.rows < length:
            self._sink.fail(prompt.ticket, f"only {prompt.rows} of {length} tokens were computed")
            return
        states = {AUX_HIDDEN_STATES: prompt.aux} if policy.layer_ids else {}
        if prompt.last is not None:
            states[LAST_HIDDEN_STATES] = prompt.last
        nbytes = sum(x.nbytes for x in states.values())
        self._sink.submit(prompt.ticket, req.origin_input_ids, lambda: states, nbytes)

    def _fail(self, req: Any, reason: str) -> None:
        prompt = self._prompts.get(req)
        self._prompts[req] = None
        if prompt is not None and self._sink is not None:
            self._sink.fail(prompt.ticket, reason)


def _asks(req: Any) -> bool:
    return req.return_hidden_states is True and _has_ticket(req)


def _is_aborted(req: Any) -> bool:
    """Whether a request has been aborted, for example because its client has gone."""
    return type(req.finished_reason or req.to_finish).__name__ == "FINISH_ABORT"


def _has_ticket(request: Any) -> bool:
    """Whether a request, or one of a batch of requests, has a ticket."""
    if hasattr(request, "batch"):
        return any(map(_has_ticket, request.batch))
    params = getattr(getattr(request, "sampling_params", None), "custom_params", None)
    return isinstance(params, dict) and isinstance(params.get(KEY), str)
