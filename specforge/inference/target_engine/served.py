"""The target in an inference server that puts features into a feature store, which this process shares.

The server's answer only describes the server. Each attempt at a request has names of its own in the store, so an
attempt that was lost, with its server or its connection, cannot touch the next one.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

import specforge.stopping as stopping
from specforge.contracts import ENCODINGS, CapturePolicy, PromptTask, Provenance, Record, SampleRef
from specforge.errors import UserError, option
from specforge.inference.engine_server import EngineServer, ServerOptions, server_port
from specforge.inference.handoff import Handoff, NotDeliveredError, Ticket
from specforge.inference.openai_server import TokenServer
from specforge.inference.server_client import RefusedError, ServerClient
from specforge.inference.target_engine.base import TargetEngine, UnavailableError, check_layers, feature_widths
from specforge.inference.target_engine.http import printable
from specforge.inference.target_files import TargetFiles
from specforge.options import PositiveInt, PositiveSeconds, PositiveShare
from specforge.runtime.addresses import open_backend
from specforge.runtime.data_plane.store import BadSampleError, SharedBackend, StoreFullError
from specforge.system import available_memory

_ATTEMPTS = 3  # at a request whose features do not arrive, for example because the server was killed after its answer
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds between two attempts while the store is full
_FULL_SECONDS = 30.0  # without space for any sample, after which the store stays full
_CHECK_SECONDS = 30.0  # for the features of two tokens to arrive
# Relative distance of a state from transformers', by dtype; a wrong layer is several times farther away.
_APART = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}

_FLAGS = ("tensor_parallel", "quantization", "max_model_len", "memory")  # options that are flags of the server

logger = logging.getLogger(__name__)
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class ServerDescription(Record):
    """What a server says about itself in each answer.

    Attributes:
        version: version of the engine.
        target_fingerprint: of the files that it has loaded.
        dtype: compute dtype.
        quantization: method by which it has quantised the weights; empty for none.
        layers: captured layers.
        last_hidden_states: whether it can also capture the last hidden states.
        max_model_len: maximum number of tokens of a prompt and its answer.
        tensor_parallel: tensor parallel size.
        expert_parallel: whether experts are spread over devices.
        store: address of the feature store, as the server knows it.
    """

    version: str
    target_fingerprint: str
    dtype: str
    quantization: str
    layers: tuple[int, ...]
    last_hidden_states: bool
    max_model_len: int
    tensor_parallel: int
    expert_parallel: bool
    store: str

    def _valid_fields(self) -> dict[str, bool]:
        texts = ("version", "target_fingerprint", "dtype", "quantization", "store")
        counts = ("max_model_len", "tensor_parallel")
        flags = ("last_hidden_states", "expert_parallel")
        return {
            **{name: type(getattr(self, name)) is str for name in texts},
            **{name: type(getattr(self, name)) is int for name in counts},
            **{name: type(getattr(self, name)) is bool for name in flags},
            "layers": isinstance(self.layers, tuple) and all(type(x) is int for x in self.layers),
        }


class ServedTargetEngine(TargetEngine):
    """A server that captures hidden states into a feature store: one that runs already, or one of its own.

    Subclasses implement :meth:`_post` and name the server's flags.

    Args:
        target: files of the expected target.
        dtype: its compute dtype.
        url: address of a running server, such as http://127.0.0.1:8000; without it, one is started, and ends with
            this process.
        store: address of the server's feature store: a folder that both can access, or mooncake://...; for a
            server of its own by default a temporary folder.
        api_key_file: file with the server's API key; none by default.
        concurrency: maximum number of requests in flight.
        patience: seconds to retry while the server does not respond, and to wait for features after its answer.
        compare: compare two tokens with transformers before anything is captured, if the target fits into memory.
        python: to start a server: interpreter of the server's environment (default: this one).
        tensor_parallel: to start a server: number of devices that share each layer.
        expert_parallel: to start a server: give each device whole experts of a mixture-of-experts target.
        quantization: to start a server: the server's name of a quantisation (default: that of the target's files).
        max_model_len: to start a server: maximum length of a prompt, plus one (default: the target's).
        memory: to start a server: share of each device's memory that it may use (default: the server's own).
        arguments: to start a server: more arguments of its command line, such as ["--enforce-eager"] for vLLM.
        log: to start a server: file for its output (default: runs/ENGINE.log).

    Attributes:
        name: name of the engine, as ``--engine`` takes it.
        versions: supported versions of the server; one that ends in a dot stands for all that begin with it.
        server: starts a server.
        flags: the server's flags for ``tensor_parallel``, ``quantization``, ``max_model_len`` and ``memory``.

    Raises:
        UserError: the address is malformed, the file cannot be read, or the store cannot be opened.
    """

    independent, encodings = True, ENCODINGS
    name: ClassVar[str]
    versions: ClassVar[tuple[str, ...]]
    server: ClassVar[type[EngineServer]]
    flags: ClassVar[tuple[str, str, str, str]]

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
        log: Path | None = None,
    ) -> None:
        super().__init__(target, dtype)
        self.concurrency, self._patience, self._key = concurrency, patience, api_key_file
        self._compare, self._compared = compare, False
        self._pool = ThreadPoolExecutor(concurrency, self.name)
        self._lock = threading.Lock()
        self._own: EngineServer | None = None
        self._answers: TokenServer | None = None
        self._described: ServerDescription | None = None
        self._told_full, self._had_space = False, 0.0
        values = (tensor_parallel if tensor_parallel > 1 else None, quantization, max_model_len, memory)
        given = zip(self.flags, values, strict=True)
        words = [word for flag, value in given if value is not None for word in (flag, str(value))]
        words += self._expert_flags(tensor_parallel) if expert_parallel else []
        words += arguments or []
        log = log or Path("runs") / f"{self.name}.log"
        self._store, self._start_options = store, ServerOptions(python or sys.executable, tuple(words), log)
        if url is None:
            return
        options: dict[str, Any] = dict(zip(_FLAGS, values, strict=True))
        options |= {"python": python, "expert_parallel": expert_parallel, "arguments": arguments}
        if starting := [name for name, value in options.items() if value]:
            raise UserError(
                f"engine {self.name}: --engine.{starting[0]} is for starting a server; leave out either it or "
                "--engine.url"
            )
        if store is None:
            raise UserError(
                f"engine {self.name}: no store; {option('engine.store', 'STORE')} to the feature store that the server "
                "was started with"
            )
        try:
            backend = open_backend(store)
        except UserError as error:
            raise UserError(f"{error}; name the store that the server {url} was started with") from error
        self._connect(url, store, backend)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Check that a server of its own can listen on the port that its arguments name."""
        if not options.get("url"):
            server_port(options.get("arguments") or ())

    @staticmethod
    @abstractmethod
    def _expert_flags(devices: int) -> list[str]:
        """The server's flags for experts that are spread over devices."""

    def _connect(self, url: str, store: str, backend: SharedBackend) -> None:
        key_option = "--engine.api_key_file"
        self._client = ServerClient(
            url, self._key, patience=self._patience, connections=self.concurrency, key_option=key_option
        )
        self.url, self.store = self._client.url, store
        self._handoff = Handoff(backend, self.url, min(self._patience, 120.0))

    def _start(self, policy: CapturePolicy) -> None:
        """Start a server that captures what a policy asks for."""
        own = self.server(self.target, self.dtype, policy, self._store, self._start_options)
        try:
            backend = open_backend(own.store, create=True)  # before the server, whose output is in a file, says so
            with self._own_names():
                own.wait()
        except BaseException:
            own.close()
            raise
        self._own = own
        self._connect(own.url, own.store, backend)

    @property
    def options(self) -> str:
        """Address and store of the server."""
        words = ["--data.engine", self.name, "--data.engine.url", self.url, "--data.engine.store", self.store]
        return shlex.join(words)

    @property
    def description(self) -> str:
        """Version and parallelism of the server."""
        found = self._described
        if found is None:
            return ""
        expert = " ep" if found.expert_parallel else ""
        quantization = f" {found.quantization}" if found.quantization else ""
        return f"{self.name} {found.version} tp{found.tensor_parallel}{expert}{quantization}"

    def check_running(self) -> None:
        """Check a server of its own, as :meth:`TargetEngine.check_running` specifies."""
        own = self._own
        if own is not None:
            with self._own_names():
                own.check_running()

    @contextmanager
    def _own_names(self) -> Iterator[None]:
        """Name the option for a flag that the server's error is about."""
        try:
            yield
        except UserError as error:
            words = re.sub("[-_ ]", "", str(error).lower())
            for flag, name in zip(self.flags, _FLAGS, strict=True):
                if flag.replace("-", "") in words:
                    raise UserError(f"{error}; {flag} is --engine.{name}") from error
            raise

    def close(self) -> None:
        """Close all connections, end a server of its own, and delete what was asked for and not taken."""
        connected = hasattr(self, "_client")
        if connected:
            self._give_up()
        self._pool.shutdown(cancel_futures=True)
        own, self._own = self._own, None
        if own is not None:
            own.close()
        if connected:
            if own is None:
                self._abort(self._handoff.recent())
            self._handoff.clear()

    def _give_up(self) -> None:
        """End all requests in flight, and wait for no more features; other threads do the same soon."""
        self._handoff.closed.set()
        self._client.close()

    def _abort(self, tickets: Sequence[Ticket]) -> None:
        """Have the server drop requests whose connections were closed; vLLM does so by itself."""

    def check(self, policy: CapturePolicy) -> None:
        """Check the server's version, target, dtype and layers, and capture two tokens."""
        check_layers(policy, self.target.num_layers, self.target.name)
        if not hasattr(self, "_client"):
            self._start(policy)
        self._prepare()
        self._described = found = self._ask([0])
        try:
            self._check_server(found, policy)
        except UserError as error:  # it is about the server: no prompt is to be given up for it
            raise UnavailableError(str(error)) from error
        ids = [0, self.target.vocab_size // 2]
        handoff = replace(self._handoff, patience=min(_CHECK_SECONDS, self._handoff.patience))
        try:
            features = self._capture_one(ids, policy, handoff)
        except NotDeliveredError as error:
            self._clear_other_store(found.store)
            raise UnavailableError(
                f"server {self.url}: its features do not arrive in {self.store}; it writes to {found.store}, which "
                "must be the same store"
            ) from error
        if self._compare and not self._compared:
            self._compare_with_transformers(ids, policy, features)
            self._compared = True

    def _clear_other_store(self, store: str) -> None:
        """Delete what the server has written to its own store, if this process can reach that."""
        with suppress(UserError):
            replace(self._handoff, backend=open_backend(store)).clear()

    def _prepare(self) -> None:
        """Learn from the server what requests must contain."""

    def _check_version(self, found: str) -> None:
        if not any(found.startswith(x) if x.endswith(".") else found == x for x in self.versions):
            known = ", ".join(x.rstrip(".") for x in self.versions)
            name = f"{self.server.title} {printable(found) or 'of an unknown version'}"
            raise UserError(f"server {self.url}: {name} is not supported; use {known}")

    def _check_server(self, found: ServerDescription, policy: CapturePolicy) -> None:
        where = f"server {self.url}"
        self._check_version(found.version)
        if found.target_fingerprint != self.target.fingerprint:
            raise UserError(
                f"{where}: serves another target than {self.target.name} (fingerprints "
                f"{found.target_fingerprint[:8]} and {self.target.fingerprint[:8]})"
            )
        if found.dtype != self.dtype:
            raise UserError(f"{where}: computes in {found.dtype}, not {self.dtype}; {option('dtype', found.dtype)}")
        self._check_layers(found, policy)

    def _check_layers(self, found: ServerDescription, policy: CapturePolicy) -> None:
        missing = sorted(set(policy.layer_ids) - set(found.layers))
        if missing or (policy.last_hidden_states and not found.last_hidden_states):
            what = f"layer {missing[0]}" if missing else "the last hidden states"
            how = f"--layer_ids '{list(policy.layer_ids)}'" if missing else "the --algorithm that reads them"
            raise UserError(
                f"server {self.url}: does not capture {what}, only layers {list(found.layers)}"
                f"{' and the last hidden states' if found.last_hidden_states else ''}; start it again with {how}"
            )

    def capture(self, input_ids: Sequence[Sequence[int]], policy: CapturePolicy) -> list[dict[str, Tensor]]:
        """Features of each sequence, as :meth:`TargetEngine.capture` specifies."""
        self._check_layers(self._known, policy)  # a `target serve` in between passes on what others ask for
        self._had_space = time.monotonic()
        return self._together(lambda ids: self._capture_with_space(ids, policy), input_ids)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        end_ids: Sequence[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Continue each prompt on the server, as :meth:`TargetEngine.generate` specifies."""
        how = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        return self._generator().generate(prompts, max_new_tokens=max_new_tokens, end_ids=end_ids, seed=seed, **how)

    def _generator(self) -> TokenServer:
        """The server as one that answers; started, and checked for target and dtype, once for all threads."""
        with self._lock:
            if self._answers is None:
                if not hasattr(self, "_client"):
                    self._start(CapturePolicy((0,)))
                self._prepare()
                self._described = self._ask([0])
                self._check_server(self._described, CapturePolicy((), last_hidden_states=False))
                self._answers = TokenServer(self._client, None, self.concurrency)
            return self._answers

    def delivers_to(self, backend: object) -> bool:
        """Whether :meth:`deliver` stores samples in this store."""
        return self._handoff.fills(backend)

    def deliver(
        self, tasks: Sequence[PromptTask], names: Sequence[str], provenance: Provenance
    ) -> list[SampleRef | BadSampleError | StoreFullError]:
        """Have the server store samples, as :meth:`TargetEngine.deliver` specifies."""

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
            with stopping.call_on_stop(self._give_up):
                return [future.result() for future in futures]
        except BaseException as error:
            if not isinstance(error, Exception):  # the process ends
                self._give_up()
            for future in futures:
                if not future.cancel() and future.exception() is None and undo is not None:
                    undo(future.result())
            raise

    def _capture_with_space(self, ids: Sequence[int], policy: CapturePolicy) -> dict[str, Tensor]:
        """Capture one prompt; while the store is full, others are taken out of it."""
        pause, limit = _FIRST_PAUSE, min(_FULL_SECONDS, self._patience)
        while True:
            try:
                found = self._capture_one(ids, policy, self._handoff)
            except StoreFullError as error:
                with self._lock:
                    told, self._told_full = self._told_full, True
                if not told:
                    logger.warning("the store is full (%s); waiting for space", error)
                if time.monotonic() - self._had_space > limit:
                    raise StoreFullError(f"{error}; the store {self.store} was full for {limit:g} s") from error
                stopping.pause(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._had_space = time.monotonic()
                return found

    def _capture_one(self, ids: Sequence[int], policy: CapturePolicy, handoff: Handoff) -> dict[str, Tensor]:
        target = self.target
        provenance = Provenance(target.name, target.fingerprint, "", policy, self.dtype, encoding=self.encoding)
        ref = self._deliver(ids, provenance, handoff)
        names = feature_widths(policy, target.hidden_size)
        return {name: x for name, x in handoff.take(ref).items() if name in names}

    def _deliver(self, ids: Sequence[int], provenance: Provenance, handoff: Handoff, **more: Any) -> SampleRef:
        """Have the server store the features of one prompt."""
        self._check_length(len(ids))
        widths = feature_widths(provenance.capture, self.target.hidden_size)
        features = {name: (width, self.dtype) for name, width in widths.items()}
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._attempt(ids, handoff, lambda: handoff.expect(ids, features, provenance, **more))
            except NotDeliveredError as error:
                if attempt == _ATTEMPTS or handoff is not self._handoff:
                    raise
                logger.warning("%s; asking again", error)
        raise AssertionError

    def _attempt(
        self, ids: Sequence[int], handoff: Handoff, expect: Callable[[], tuple[Ticket, SampleRef]]
    ) -> SampleRef:
        """Have the server store the features of one prompt; every request that is sent gets a ticket of its own."""
        sent: list[tuple[Ticket, SampleRef]] = []

        def ticket() -> dict[str, Any]:
            sent.append(expect())
            return sent[-1][0].to_json()

        try:
            self._check_same(self._ask(ids, ticket))
            handoff.wait(sent[-1][0])
            _, ref = sent.pop()
            return ref
        except (BadSampleError, StoreFullError):
            sent.pop()  # this is the server's last word
            raise
        finally:
            for lost, _ in sent:
                handoff.discard(lost)

    @abstractmethod
    def _post(self, ids: Sequence[int], ticket: Callable[[], dict[str, Any]]) -> Any:
        """Send a prompt, and check that the server has read just that.

        Args:
            ids: tokens of the prompt.
            ticket: makes the ticket of each attempt; an empty one asks for the server's description only.

        Returns:
            What the capturing part of the server has added to the answer; None if it is not there.
        """

    def _ask(self, ids: Sequence[int], ticket: Callable[[], dict[str, Any]] = dict) -> ServerDescription:
        """Send a prompt; returns the server's description of itself."""

        def ticket_if_running() -> dict[str, Any]:
            self.check_running()  # no patience with a server that nobody restarts
            return ticket()

        try:
            found = self._post(ids, ticket_if_running)
        except RefusedError as error:
            raise error.if_absent(f"is it a server of {self.server.title}?") from error
        if found is None:
            raise UserError(
                f"server {self.url}: does not capture; start it with `specforge target serve --engine {self.name}`"
            )
        if isinstance(found, dict) and "error" in found:
            raise UserError(f"server {self.url}: {printable(str(found['error']))}")
        try:
            return ServerDescription.from_json(found)
        except ValueError as error:
            raise UserError(f"server {self.url}: describes itself in an unknown form ({error})") from error

    def _check_length(self, length: int) -> None:
        limit = self._known.max_model_len
        if length >= limit:
            raise UserError(
                f"server {self.url}: a prompt of {length} tokens, but the server reads at most {limit - 1}; restart it "
                "with a larger maximum length (--engine.max_model_len, plus one), or prepare shorter prompts"
            )

    def _check_same(self, found: ServerDescription) -> None:
        """Reject a server that was restarted as another one."""
        before, now = self._known.to_json(), found.to_json()
        for name, value in now.items():
            if before[name] != value:
                raise UserError(
                    f"server {self.url}: was restarted with another {name} ({value}, was {before[name]}); restart it "
                    "as before"
                )

    @property
    def _known(self) -> ServerDescription:
        assert self._described is not None, "check() comes first"
        return self._described

    def _compare_with_transformers(self, ids: list[int], policy: CapturePolicy, features: dict[str, Tensor]) -> None:
        from specforge.inference.target_engine.hf import HFTargetEngine

        width, size = self.target.hidden_size, sum(x.stat().st_size for x in set(self.target.weight_files.values()))
        if 2 * size > available_memory() or self._known.quantization:
            logger.warning("%s: not compared with transformers; it is quantised or too large", self.target.name)
            return
        with HFTargetEngine(self.target, self.dtype, "cpu") as reference:
            reference.check(policy)
            (expected,) = reference.capture([ids], policy)
        # The second token only: the first one is an attention sink, whose states are huge and coarsely rounded.
        for name, x in features.items():
            states, own = x[1].float().unflatten(0, (-1, width)), expected[name][1].float().unflatten(0, (-1, width))
            apart = float(((states - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-9)).max())
            if not apart <= _APART[self.dtype]:
                raise UserError(
                    f"server {self.url}: its {name} differ from transformers' by {apart:.2g} of their size; drafts "
                    "would learn states that the target does not have"
                )
