"""Mooncake Store as a feature store: memory of other hosts, over TCP or RDMA.

One owner lends memory to a master's store (`specforge store up` starts both); producers and trainers only move bytes.
Values are whole safetensors files. They are pinned, so nothing is evicted: a full store rejects writes, which slows the
producers down. Names have a random part, so an attempt that died halfway never blocks the next one. Master and owner
keep nothing on disk: when one of them dies, samples are lost and produced again.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

import torch
from torch import Tensor

from specforge.errors import UserError
from specforge.packages import install_hint
from specforge.runtime.data_plane.safetensors_io import SAMPLE_HEADER, FlatTensors, lay_out
from specforge.runtime.data_plane.store import StoreFullError

_URI = re.compile(r"([0-9A-Za-z][0-9A-Za-z_.-]*\.\d+)-[0-9a-f]{16}-(\d{1,12})", re.ASCII)
_FULL, _UNFINISHED, _MISSING, _TRANSFER, _UNREACHABLE = -200, -703, -704, -800, -900
_MIN_SEGMENT, _MIN_BUFFER = 16 << 20, 1 << 16
_TRUSTED = 64 << 20  # up to this many bytes, the size in a value's name is trusted without asking the master
_TIMEOUT = 5.0  # seconds; a running master answers at once
_FORGOTTEN = 20.0  # seconds in which a master notices that an owner has died; `store up` sets 10
_PAUSE = 0.5  # seconds between two attempts to put


@dataclass(frozen=True)
class MooncakeAddress:
    """``mooncake://host:port?metrics=9003&protocol=tcp&devices=mlx5_0#namespace``."""

    host: str  # host of the master
    port: int  # RPC port of the master
    metrics: int  # HTTP port of the master
    protocol: str = "tcp"  # tcp or rdma
    devices: str = ""  # comma-separated RDMA devices; empty for all
    namespace: str = "specforge"  # separates runs that share a master

    @classmethod
    def parse(cls, address: str) -> Self:
        """Parse an address.

        Raises:
            UserError: the text is not a valid address.
        """
        try:
            parts = urlsplit(address)
            options = dict(parse_qsl(parts.query, keep_blank_values=True))
            if unknown := sorted(set(options) - {"metrics", "protocol", "devices"}):
                raise ValueError(f"it has no option {unknown[0]}")
            metrics = int(options.pop("metrics", 9003))
            port = parts.port or 50051
        except ValueError as error:
            raise UserError(f"store {address}: {error}") from error
        found = cls(parts.hostname or "", port, metrics, namespace=parts.fragment or "specforge", **options)
        valid = parts.scheme == "mooncake" and found.host and parts.path in ("", "/") and parts.username is None
        if not valid or found.protocol not in ("tcp", "rdma") or not 0 < metrics < 65536:
            raise UserError(f"store {address}: must look like mooncake://127.0.0.1:50051?metrics=9003&protocol=tcp")
        return found

    def __str__(self) -> str:
        rest = "" if self.protocol == "tcp" else f"&protocol={self.protocol}&devices={self.devices}"
        name = "" if self.namespace == "specforge" else f"#{self.namespace}"
        return f"mooncake://{self.host}:{self.port}?metrics={self.metrics}{rest}{name}"


def connect(address: MooncakeAddress, segment_bytes: int = 0) -> Any:
    """Join the store as a client.

    Args:
        address: address of the master.
        segment_bytes: memory to lend to the store; 0 to lend none.

    Raises:
        UserError: Mooncake is not installed, or the master does not answer.
    """
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        raise UserError(
            f"store {address}: Mooncake cannot be loaded ({error}): {install_hint('mooncake')}; on "
            "Debian apt-get install libibverbs1 libnuma1 libcurl4"
        ) from error
    if 0 < segment_bytes < _MIN_SEGMENT:
        raise UserError(f"store {address}: {segment_bytes} bytes; Mooncake needs at least {_MIN_SEGMENT}")
    try:  # Mooncake itself would wait 90 seconds for a missing master
        with socket.create_connection((address.host, address.port), timeout=_TIMEOUT) as probe:
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"store {address}: no master answers ({error.strerror or error}); start it with `specforge store up`"
        ) from error
    client = MooncakeDistributedStore()
    code = client.setup(
        own, "P2PHANDSHAKE", segment_bytes, 0, address.protocol, address.devices, f"{address.host}:{address.port}"
    )
    if code != 0:
        raise UserError(f"store {address}: cannot be joined (Mooncake error {code})")
    return client


class BufferPool:
    """Registered memory that is reused once its last tensor is gone."""

    def __init__(self, client: Any) -> None:
        self._client = client
        # Appending to and popping from a list are atomic, so finalizers need no lock.
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def take(self, nbytes: int) -> Tensor:
        """An uninitialised buffer, ``[nbytes]`` uint8.

        Raises:
            OSError: the memory cannot be registered.
        """
        size = max(_MIN_BUFFER, 1 << (nbytes - 1).bit_length())
        try:
            block = self._free[size].pop()
        except IndexError:
            block = torch.empty(size, dtype=torch.uint8)
            code = self._client.register_buffer(block.data_ptr(), size)
            if code != 0:
                raise OSError(f"{size} bytes cannot be registered with Mooncake (code {code})") from None
        view = (ctypes.c_ubyte * nbytes).from_address(block.data_ptr())
        weakref.finalize(view, self._free[size].append, block).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)


class MooncakeBackend:
    """Samples as pinned values of a Mooncake store, which each process joins at the first use.

    One thread per process moves values, while other threads check what they write or read; two concurrent transfers are
    slower on few cores. Writes are asynchronous, and all waiting values go into one call, because for small values the
    calls are the cost. :meth:`flush` reports whether they have arrived.

    Raises:
        UserError: the address is not a :class:`MooncakeAddress`; or, in every method, the master does not answer.
    """

    def __init__(self, address: str) -> None:
        self.address = MooncakeAddress.parse(address)
        self._lock = threading.Lock()
        self._joined: tuple[int, Any, BufferPool, ThreadPoolExecutor] | None = None
        self._waiting: dict[str, list[Tensor]] = {}  # pieces of values that have not arrived yet
        self._unsent: deque[str] = deque()  # names that the transfer thread has not taken yet
        self._written = 0  # bytes, since the last flush

    def new_uri(self, key: str, tensors: Mapping[str, Tensor]) -> str:
        """Name of a new value; it ends with the size of the value."""
        header, _ = lay_out(tensors)
        return f"{key}-{secrets.token_hex(8)}-{len(header) + sum(x.nbytes for x in tensors.values())}"

    def write(self, key: str, tensors: Mapping[str, Tensor], uri: str | None = None) -> str:
        """Start to put a group under a new name; its tensors must not change until they are flushed."""
        uri = uri or self.new_uri(key, tensors)
        name = self._name(key, uri)
        client, pool, transfers = self._join()
        header, order = lay_out(tensors)
        pieces = [torch.frombuffer(bytearray(header), dtype=torch.uint8)]
        pieces += [tensors[name].contiguous() for name in order if tensors[name].nbytes]
        nbytes = sum(piece.nbytes for piece in pieces)
        if self.address.protocol != "tcp":  # TCP sends from any memory
            buffer = pool.take(nbytes)
            torch.cat([piece.reshape(-1).view(torch.uint8) for piece in pieces], out=buffer)
            pieces = [buffer]
        self._waiting[name] = pieces
        self._unsent.append(name)
        self._written += nbytes
        transfers.submit(self._put, client, self._unsent)
        return uri

    def read(self, key: str, uri: str) -> dict[str, Tensor]:
        """Read into registered memory; the tensors are views of it."""
        name = self._name(key, uri)
        client, pool, transfers = self._join()
        nbytes = int(uri.rpartition("-")[2])
        if nbytes > _TRUSTED and transfers.submit(client.get_size, name).result() != nbytes:
            raise KeyError(key)  # before allocating what a damaged reference claims
        buffer = pool.take(nbytes)
        code = transfers.submit(client.get_into, name, buffer.data_ptr(), nbytes).result()
        if code in (_MISSING, _UNFINISHED):
            raise KeyError(key)
        if code != nbytes:
            raise OSError(f"{uri} is lost: its owner or the master does not answer (Mooncake error {code})")
        flat = FlatTensors(buffer, uri, SAMPLE_HEADER)
        return {feature: flat[feature] for feature in flat}

    def remove(self, key: str, uri: str) -> None:
        """Delete the value, even if it is being read."""
        (client, _, transfers), name = self._join(), self._name(key, uri)
        if self._waiting.pop(name, None):  # it may be in transit, or have arrived unnoticed
            _drain(transfers)
        if (code := self._ask(lambda: client.remove(name, force=True))) == _UNREACHABLE:
            raise self._no_answer(code)

    def holds(self, key: str, uri: str) -> bool:
        """Whether the master knows the value; it notices the death of an owner after some seconds."""
        client, name = self._join()[0], self._name(key, uri)
        if (code := self._ask(lambda: client.is_exist(name))) not in (0, 1):
            raise self._no_answer(code)
        return code == 1

    def stored(self) -> list[tuple[str, str]]:
        """Key and URI of every value of this namespace."""
        url = f"http://{self.address.host}:{self.address.metrics}/get_all_keys"
        try:
            with urllib.request.urlopen(url, timeout=60.0) as answer:
                names = answer.read().decode("ascii", "replace").split("\n")
        except (OSError, urllib.error.URLError) as error:
            raise UserError(f"store {self.address}: {url} does not answer ({error})") from error
        start = f"{self.address.namespace}/"
        uris = sorted(name.removeprefix(start) for name in names if name.startswith(start))
        return [(match.group(1), uri) for uri in uris if (match := _URI.fullmatch(uri))]

    def flush(self) -> None:
        """Wait for all transfers, and retry the values that could not be put.

        What cannot be put stays pending until it is removed.

        Raises:
            StoreFullError: some do not fit at the moment, or no owner lends memory.
            UserError: some could not be put, or the store does not answer.
        """
        self._written = 0
        if not self._waiting:
            return
        client, _, transfers = self._join()
        _drain(transfers)
        # The second attempt reconnects to a restarted master. Until the master notices that an owner has died, it may
        # choose its memory again.
        deadline = time.monotonic() + _FORGOTTEN
        while True:
            codes = transfers.submit(self._put, client, deque(self._waiting)).result()
            failed = {name: code for name, code in codes.items() if code != 0}
            if _TRANSFER not in failed.values() or time.monotonic() > deadline:
                break
            time.sleep(_PAUSE)
        for name, code in failed.items():
            if code != _FULL:
                raise UserError(f"store {self.address}: {name} could not be put (Mooncake error {code})")
        if failed:
            raise StoreFullError(f"store {self.address}: no space for {len(failed)} samples")

    def _put(self, client: Any, names: deque[str]) -> dict[str, int]:
        """Put the waiting values of these names, and empty the queue of names; returns Mooncake's codes."""
        taken = [names.popleft() for _ in range(len(names))]
        values = {name: pieces for name in taken if (pieces := self._waiting.get(name))}
        if not values:
            return {}
        from mooncake.store import ReplicateConfig

        config = ReplicateConfig()
        config.with_hard_pin = True
        pointers = [[piece.data_ptr() for piece in pieces] for pieces in values.values()]
        sizes = [[piece.nbytes for piece in pieces] for pieces in values.values()]
        answers = client.batch_put_from_multi_buffers(list(values), pointers, sizes, config)
        codes = dict(zip(values, answers, strict=True))
        for name, code in codes.items():
            if code == 0:
                self._waiting.pop(name, None)
        return codes

    def pending(self) -> int:
        """Bytes written since the last flush."""
        return self._written

    def close(self) -> None:
        """Leave the store."""
        with self._lock:
            joined, self._joined = self._joined, None
        if joined is not None and joined[0] == os.getpid():
            joined[3].shutdown()
            joined[1].close()

    def _name(self, key: str, uri: str) -> str:
        match = _URI.fullmatch(uri)
        if match is None or match.group(1) != key:
            raise OSError(f"{uri!r} is not the name of a value of {key}")
        return f"{self.address.namespace}/{uri}"

    def _ask(self, call: Callable[[], int]) -> int:
        """Ask the master; a second attempt reconnects to a restarted one."""
        code = call()
        return call() if code == _UNREACHABLE else code

    def _no_answer(self, code: int) -> UserError:
        return UserError(f"store {self.address}: the master does not answer (Mooncake error {code})")

    def _join(self) -> tuple[Any, BufferPool, ThreadPoolExecutor]:
        with self._lock:
            # After a fork, neither the client nor the thread works.
            if self._joined is None or self._joined[0] != os.getpid():
                client = connect(self.address)
                transfers = ThreadPoolExecutor(1, "mooncake")
                self._joined = (os.getpid(), client, BufferPool(client), transfers)
            return self._joined[1:]


def _drain(transfers: ThreadPoolExecutor) -> None:
    """Wait until everything submitted so far is done."""
    transfers.submit(int).result()
