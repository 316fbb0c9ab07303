"""How a server hands features to its client: through a feature store that both can reach, not in its answer.

An inference server answers before the features have left its device, and its answers are JSON. So the client chooses
in advance where each sample goes, sends that *ticket* with the request, and waits until the store holds the value. The
server writes one group of tensors with its checksum, or, at a second place, the reason why it cannot. Both places are
names that no other request has, so neither a restarted server nor a second client can touch them.

This module is imported by vLLM's and SGLang's processes too; it needs torch and xxhash only.
"""

from __future__ import annotations

import errno
import logging
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

import specforge.stopping as stopping
from specforge.contracts import (
    AUX_HIDDEN_STATES,
    ENCODINGS,
    INPUT_IDS,
    LAST_HIDDEN_STATES,
    LOSS_MASK,
    SAMPLE_ID,
    CapturePolicy,
    FeatureSpec,
    Provenance,
    Record,
    SampleRef,
)
from specforge.errors import UserError
from specforge.files import first_line
from specforge.runtime.data_plane.encoding import encode
from specforge.runtime.data_plane.store import (
    CHECKSUM,
    BadSampleError,
    FeatureStore,
    SharedBackend,
    StoreFullError,
    seal,
    with_checksum,
)

_ERROR, _ERROR_BYTES = "error", 512
_KINDS: dict[str, type[Exception]] = {"full": StoreFullError, "bad": BadSampleError}  # first word of an error text
_FAILED = "failed"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_SWITCH_INTERVAL = 1e-4  # seconds
_FIRST_POLL, _LONGEST_POLL = 0.002, 0.05  # seconds between two looks into the store
_LATE, _LATEST = 2.0, 10.0  # seconds for what a server still writes after its client has gone: each, and all together

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ticket(Record):
    """Sent with a request: what to capture, and where to put it.

    Attributes:
        key: id and generation of the sample.
        uri: where the features go.
        error_uri: where the reason goes if there are no features.
        capture: hidden states to capture, each layer once.
        encoding: storage format.
        loss_mask: the mask to store, one character per token; empty for none.
    """

    key: str
    uri: str
    error_uri: str
    capture: CapturePolicy
    encoding: str = "raw"
    loss_mask: str = ""

    @classmethod
    def from_json(cls, fields: Any) -> Ticket:
        """Rebuild a ticket from untrusted JSON; see :meth:`Record.from_json`."""
        if isinstance(fields, dict) and "capture" in fields:
            fields = {**fields, "capture": CapturePolicy.from_json(fields["capture"])}
        return super(Ticket, cls).from_json(fields)

    def _valid_fields(self) -> dict[str, bool]:
        name, _, generation = self.key.rpartition(".") if type(self.key) is str else ("", "", "")
        return {
            "key": SAMPLE_ID.fullmatch(name) is not None and generation.isdecimal(),
            "uri": type(self.uri) is str,
            "error_uri": type(self.error_uri) is str,
            "capture": isinstance(self.capture, CapturePolicy)
            and len(set(self.capture.layer_ids)) == len(self.capture.layer_ids),
            "encoding": self.encoding in ENCODINGS,
            "loss_mask": type(self.loss_mask) is str and not self.loss_mask.strip("01"),
        }

    @property
    def sample_id(self) -> str:
        """Id of the sample."""
        return self.key.rpartition(".")[0]


class NotDeliveredError(UserError):
    """The server has answered, but the features have not arrived in time."""


class _Delivery(NamedTuple):
    """What waits to be written: ``tensors`` returns the features, or raises the reason why there are none."""

    ticket: Ticket
    tensors: Callable[[], Mapping[str, Tensor]]
    nbytes: int


class FeatureSink:
    """The server's end: writes captured states into a store from one thread.

    No method raises or waits for the store, so a store that is slow, full or gone never stops the server. A server
    asks :meth:`has_room` before it copies states, and keeps them where they are while there is none.

    The thread takes Python's global lock some 70 times per sample. A server whose own thread computes in Python without
    a pause gives the lock up only when the interpreter's switch interval is over, by default after 5 ms; so the sink
    shortens that interval.

    Args:
        backend: the store.
        max_bytes: maximum number of bytes that wait to be written.
    """

    def __init__(self, backend: SharedBackend, max_bytes: int = 1 << 30) -> None:
        self._backend, self._max_bytes = backend, max_bytes
        self._waiting: deque[_Delivery] = deque()
        self._nbytes = 0
        self._changed = threading.Condition()
        self._closed = False
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        self._thread = threading.Thread(target=self._run, name="feature sink", daemon=True)
        self._thread.start()

    def has_room(self) -> bool:
        """Whether the sink takes another sample."""
        return self._nbytes < self._max_bytes

    def submit(
        self, ticket: Ticket, input_ids: Sequence[int], states: Callable[[], Mapping[str, Tensor]], nbytes: int
    ) -> None:
        """Queue the states of one prompt.

        Args:
            ticket: the client's.
            input_ids: the tokens that the server has read.
            states: returns the hidden states that the ticket asks for, by the names of their features, on the CPU and
                not changed afterwards; or raises the reason why there are none. The sink's thread calls it.
            nbytes: memory that is held until then.
        """
        self._queue(_Delivery(ticket, partial(_features, ticket, list(input_ids), states), nbytes))

    def fail(self, ticket: Ticket, reason: str) -> None:
        """Queue the reason why there are no features."""

        def refuse() -> dict[str, Tensor]:
            raise UserError(reason)

        self._queue(_Delivery(ticket, refuse, 0))

    def _queue(self, delivery: _Delivery) -> None:
        with self._changed:
            self._waiting.append(delivery)
            self._nbytes += delivery.nbytes
            self._changed.notify_all()

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until nothing is queued; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def close(self) -> None:
        """Write what is queued, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                delivery = self._waiting[0]
            try:
                self._write(delivery)
            except Exception:  # the thread must survive whatever a request or a store does
                logger.exception("sample %s: cannot be stored", delivery.ticket.key)
            with self._changed:
                self._waiting.popleft()
                self._nbytes -= delivery.nbytes
                self._changed.notify_all()

    def _write(self, delivery: _Delivery) -> None:
        ticket = delivery.ticket
        try:
            sealed = seal(ticket.sample_id, delivery.tensors(), ticket.encoding)
            self._put(ticket, with_checksum(sealed), ticket.uri)
        except Exception as error:
            reason = error.reason if isinstance(error, BadSampleError) else first_line(error)
            logger.warning("sample %s: cannot be stored: %s", ticket.key, reason)
            try:
                self._put(ticket, {_ERROR: _padded(f"{_kind(error)} {reason}")}, ticket.error_uri)
            except Exception as again:
                if _kind(again) != "full":
                    raise
                self._put(ticket, {}, ticket.error_uri)

    def _put(self, ticket: Ticket, group: dict[str, Tensor], uri: str) -> None:
        try:
            self._backend.write(ticket.key, group, uri)
            self._backend.flush()
        except BaseException:
            self._backend.remove(ticket.key, uri)
            raise


def _features(ticket: Ticket, input_ids: list[int], states: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """What is stored for a ticket."""
    tensors = {**states(), INPUT_IDS: torch.tensor(input_ids, dtype=torch.int32)}
    if ticket.loss_mask:
        tensors[LOSS_MASK] = torch.tensor([int(x) for x in ticket.loss_mask], dtype=torch.uint8)
    return tensors


def select_states(
    policy: CapturePolicy, layers: Mapping[int, Tensor], last: Callable[[], Tensor] | None
) -> dict[str, Tensor]:
    """The hidden states that a policy names, by the names of their features.

    Args:
        policy: what to capture.
        layers: output of each captured decoder layer, ``[T, H]``.
        last: returns the states after the final norm, ``[T, H]``; None if the server does not capture them.

    Raises:
        UserError: some of them are not captured.
    """
    missing = [layer for layer in policy.layer_ids if layer not in layers]
    if missing:
        raise UserError(f"layer {missing[0]} is not among the captured layers {sorted(layers)}")
    found = {}
    if policy.layer_ids:
        found[AUX_HIDDEN_STATES] = torch.cat([layers[layer] for layer in policy.layer_ids], dim=-1)
    if policy.last_hidden_states:
        if last is None:
            raise UserError("this server does not capture the last hidden states")
        found[LAST_HIDDEN_STATES] = last()
    return found


def _kind(error: Exception) -> str:
    """First word of an error text; a disk without space is a full store."""
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_SPACE:
        return "full"
    return next((name for name, cls in _KINDS.items() if isinstance(error, cls)), _FAILED)


def _padded(reason: str) -> Tensor:
    """A text in a tensor of the one size that :attr:`Ticket.error_uri` was made for."""
    text = reason.encode()[:_ERROR_BYTES].ljust(_ERROR_BYTES)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Handoff:
    """The client's end: makes tickets, and waits for what they promise."""

    backend: SharedBackend  # the store that the server writes to
    server: str  # the server, in messages
    patience: float = 120.0  # seconds after the server's answer in which the features must be in the store
    # Discarded tickets for which nothing has arrived yet, and when that was; copies of this object share them.
    late: dict[Ticket, float] = field(default_factory=dict, repr=False)
    closed: threading.Event = field(default_factory=threading.Event, repr=False)
    _store: FeatureStore = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_store", FeatureStore(self.backend))

    def fills(self, backend: object) -> bool:
        """Whether a backend is this one's store, so that it has what the server writes."""
        for place in ("folder", "address"):
            own = getattr(self.backend, place, None)
            if own is not None:
                other = getattr(backend, place, None)
                return bool(own.resolve() == other.resolve() if isinstance(other, Path) else own == other)
        return backend is self.backend

    def expect(
        self,
        input_ids: Sequence[int],
        features: Mapping[str, tuple[int, str]],
        provenance: Provenance,
        *,
        sample_id: str | None = None,
        loss_mask: Sequence[int] = (),
        source: str = "",
    ) -> tuple[Ticket, SampleRef]:
        """A ticket for one prompt, and the reference that is valid once :meth:`wait` has returned.

        Args:
            input_ids: tokens of the prompt.
            features: width and dtype of each captured feature.
            provenance: origin of the features, what to capture, and the encoding.
            sample_id: id of the sample; by default a random one.
            loss_mask: the mask to store; by default none.
            source: file and line of the conversation.
        """
        length = len(input_ids)
        specs = [FeatureSpec(name, dtype, (length, width)) for name, (width, dtype) in features.items()]
        specs.append(FeatureSpec(INPUT_IDS, "int32", (length,)))
        if loss_mask:
            specs.append(FeatureSpec(LOSS_MASK, "uint8", (length,)))
        shapes = {spec.name: _meta(spec.shape, spec.dtype) for spec in sorted(specs, key=lambda spec: spec.name)}
        stored = encode(shapes, provenance.encoding)
        key = f"{sample_id or secrets.token_hex(16)}.1"
        group = {**stored, CHECKSUM: _meta((8,), "uint8")}
        ticket = Ticket(
            key,
            self.backend.new_uri(key, group),
            self.backend.new_uri(key, {_ERROR: _meta((_ERROR_BYTES,), "uint8")}),
            provenance.capture,
            provenance.encoding,
            "".join(map(str, loss_mask)),
        )
        return ticket, SampleRef(
            sample_id=ticket.sample_id,
            generation=1,
            features=tuple(sorted(specs, key=lambda spec: spec.name)),
            num_tokens=length,
            num_supervised=sum(loss_mask),
            nbytes=sum(x.nbytes for x in stored.values()),
            checksum="",  # beside the features
            uri=ticket.uri,
            source=source,
            provenance=provenance,
        )

    def wait(self, ticket: Ticket) -> None:
        """Wait until the features are in the store; call it once the server has answered.

        Raises:
            BadSampleError: they must not be used for training, for example because they contain NaN.
            StoreFullError: they do not fit into the store at the moment.
            NotDeliveredError: nothing arrives in time.
            UserError: the server reports another reason, or the client is closed.
        """
        end, pause = time.monotonic() + self.patience, _FIRST_POLL
        while not self.backend.holds(ticket.key, ticket.uri):
            if self.backend.holds(ticket.key, ticket.error_uri):
                self._raise_error(ticket)
            if self.closed.is_set():
                raise UserError(f"server {self.server}: its client is closed")
            if time.monotonic() > end:
                raise NotDeliveredError(
                    f"server {self.server}: it has answered, but after {self.patience:g} s the features are not in the "
                    "store; see the server's log, and whether both use the same store"
                )
            stopping.pause(pause)
            pause = min(2 * pause, _LONGEST_POLL)

    def take(self, ref: SampleRef) -> dict[str, Tensor]:
        """Copy the features and delete them from the store; a view of a mapped file would keep its space in use.

        Raises:
            BadSampleError: they are damaged, or not what was asked for.
        """
        self._store.adopt([ref])
        try:
            return {name: x.clone() for name, x in self._store.get(ref).items()}
        finally:
            self._store.delete(ref)

    def discard(self, ticket: Ticket) -> None:
        """Delete whatever the server has written for a ticket; if that is nothing, :meth:`clear` looks again."""
        if not self._delete(ticket):
            self.late[ticket] = time.monotonic()

    def recent(self) -> list[Ticket]:
        """Discarded tickets for which the server may still write something."""
        now = time.monotonic()
        return [ticket for ticket, since in list(self.late.items()) if now < since + _LATE]

    def clear(self) -> None:
        """Delete what arrives for discarded tickets, until nothing has arrived for a while; no ticket is in use."""
        end, arrived = time.monotonic() + _LATEST, 0.0
        try:
            while True:
                for ticket in list(self.late):
                    if self._delete(ticket):
                        del self.late[ticket]
                        arrived = time.monotonic()
                now = time.monotonic()
                if not self.late or now > end or not (self.recent() or now < arrived + _LATE):
                    return
                time.sleep(_LONGEST_POLL)
        except (OSError, UserError) as error:
            logger.warning("server %s: what it wrote last may stay in the store: %s", self.server, first_line(error))

    def _delete(self, ticket: Ticket) -> bool:
        """Whether there was anything to delete."""
        found = [uri for uri in (ticket.uri, ticket.error_uri) if self.backend.holds(ticket.key, uri)]
        for uri in (ticket.uri, ticket.error_uri):
            self.backend.remove(ticket.key, uri)
        return bool(found)

    def _raise_error(self, ticket: Ticket) -> NoReturn:
        try:
            group = self.backend.read(ticket.key, ticket.error_uri)
            text = bytes(group[_ERROR].numpy()).decode(errors="replace") if group else "full no space left in the store"
        except (KeyError, OSError) as error:
            text = f"{_FAILED} the reason cannot be read ({first_line(error)})"
        finally:
            self.backend.remove(ticket.key, ticket.error_uri)
        kind, _, reason = text.strip().partition(" ")
        if kind == "full":
            raise StoreFullError(f"server {self.server}: {reason}")
        if kind == "bad":
            raise BadSampleError(ticket.sample_id, reason)
        raise UserError(f"server {self.server}: {reason}")


def _meta(shape: tuple[int, ...], dtype: str) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
