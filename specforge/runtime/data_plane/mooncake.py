"""Mooncake Store as a feature store: memory of other hosts, over TCP or RDMA.

One owner lends memory to a master's store (`specforge store up` starts both); producers and trainers only move bytes.
Values are whole safetensors files, pinned, so nothing is evicted: a full store refuses, which slows the producers. A
name holds a random part, so an attempt that died halfway never stands in the way of the next. Master and owner keep
nothing on disk: when one of them dies, samples are lost, and are produced again.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import socket
import threading
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
from specforge.extras import install_hint
from specforge.runtime.data_plane.safetensors_io import SAMPLE_HEADER, FlatTensors, lay_out
from specforge.runtime.data_plane.store import StoreFullError

_URI = re.compile(r"([0-9A-Za-z][0-9A-Za-z_.-]*\.\d+)-[0-9a-f]{16}-(\d{1,12})", re.ASCII)
_FULL, _UNFINISHED, _MISSING, _UNREACHABLE = -200, -703, -704, -900
_SMALLEST_SEGMENT, _SMALLEST_BUFFER = 16 << 20, 1 << 16
_TRUSTED = 64 << 20  # values of no more bytes are fetched without asking the master how many they have
_SECONDS = 5.0  # to wait for the master where it should answer at once


@dataclass(frozen=True)
class MooncakeAddress:
    """``mooncake://host:port?metrics=9003&protocol=tcp&devices=mlx5_0#namespace``.

    Attributes:
        host: of the master.
        port: of its RPC.
        metrics: port of its HTTP.
        protocol: ``tcp`` or ``rdma``.
        devices: RDMA devices, with commas; all where it is empty.
        namespace: for runs that share a master.
    """

    host: str
    port: int
    metrics: int
    protocol: str = "tcp"
    devices: str = ""
    namespace: str = "specforge"

    @classmethod
    def parse(cls, address: str) -> Self:
        """Read an address.

        Raises:
            UserError: it is not one.
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
        whole = parts.scheme == "mooncake" and found.host and parts.path in ("", "/") and parts.username is None
        if not whole or found.protocol not in ("tcp", "rdma") or not 0 < metrics < 65536:
            raise UserError(f"store {address}: must look like mooncake://127.0.0.1:50051?metrics=9003&protocol=tcp")
        return found

    def __str__(self) -> str:
        rest = "" if self.protocol == "tcp" else f"&protocol={self.protocol}&devices={self.devices}"
        name = "" if self.namespace == "specforge" else f"#{self.namespace}"
        return f"mooncake://{self.host}:{self.port}?metrics={self.metrics}{rest}{name}"


def connect(address: MooncakeAddress, segment_bytes: int = 0) -> Any:
    """A client of the store, which lends it memory where ``segment_bytes`` is not 0.

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
    if 0 < segment_bytes < _SMALLEST_SEGMENT:
        raise UserError(f"store {address}: {segment_bytes} bytes; Mooncake takes no less than {_SMALLEST_SEGMENT}")
    try:  # without a master, Mooncake itself would wait for 90 seconds
        with socket.create_connection((address.host, address.port), timeout=_SECONDS) as probe:
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
        raise UserError(f"store {address}: cannot be joined (Mooncake's code {code})")
    return client


class BufferPool:
    """Registered memory, handed out again when its last tensor is gone.

    Args:
        client: registers it, once.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        # Lists take and give in one step each, so a finalizer may run anywhere without a lock.
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def take(self, nbytes: int) -> Tensor:
        """``[nbytes]`` uint8, of any content.

        Raises:
            OSError: it cannot be registered.
        """
        size = max(_SMALLEST_BUFFER, 1 << (nbytes - 1).bit_length())
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
    """Whole samples as pinned values of a Mooncake store; joined at the first use, by each process for itself.

    One thread moves values, whoever asks, while others check what they wrote or read; two transfers at once are slower
    on few cores. What is written is on its way while the caller goes on, all that waits in one call, for the calls are
    what small values cost; whether it has arrived, :meth:`flush` says.

    Args:
        address: see :class:`MooncakeAddress`.

    Raises:
        UserError: it is not one.
    """

    def __init__(self, address: str) -> None:
        self.address = MooncakeAddress.parse(address)
        self._lock = threading.Lock()
        self._joined: tuple[int, Any, BufferPool, ThreadPoolExecutor] | None = None
        self._waiting: dict[str, list[Tensor]] = {}  # pieces of values that are not in the store yet
        self._unsent: deque[str] = deque()  # names of those that the thread has not taken up
        self._written = 0  # bytes, since the last flush

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> str:
        """Begin to put one value, under a name of its own; the tensors must stay as they are until it is flushed.

        Raises:
            UserError: the store does not answer.
        """
        client, pool, transfers = self._join()
        header, order = lay_out(tensors)
        pieces = [torch.frombuffer(bytearray(header), dtype=torch.uint8)]
        pieces += [tensors[name].contiguous() for name in order if tensors[name].nbytes]
        nbytes = sum(piece.nbytes for piece in pieces)
        uri = f"{key}-{secrets.token_hex(8)}-{nbytes}"
        if self.address.protocol != "tcp":  # which sends from any memory
            buffer = pool.take(nbytes)
            torch.cat([piece.reshape(-1).view(torch.uint8) for piece in pieces], out=buffer)
            pieces = [buffer]
        name = self._name(key, uri)
        self._waiting[name] = pieces
        self._unsent.append(name)
        self._written += nbytes
        transfers.submit(self._put, client, self._unsent)
        return uri

    def read(self, key: str, uri: str) -> dict[str, Tensor]:
        """Fetch into registered memory; the tensors are views of it."""
        name = self._name(key, uri)
        client, pool, transfers = self._join()
        nbytes = int(uri.rpartition("-")[2])
        if nbytes > _TRUSTED and transfers.submit(client.get_size, name).result() != nbytes:
            raise KeyError(key)  # before so much memory is taken for what a damaged reference says
        buffer = pool.take(nbytes)
        code = transfers.submit(client.get_into, name, buffer.data_ptr(), nbytes).result()
        if code in (_MISSING, _UNFINISHED):
            raise KeyError(key)
        if code != nbytes:
            raise OSError(f"{uri} is lost: its owner or the master does not answer (Mooncake's code {code})")
        flat = FlatTensors(buffer, uri, SAMPLE_HEADER)
        return {feature: flat[feature] for feature in flat}

    def remove(self, key: str, uri: str) -> None:
        """Free the value, whoever has asked for it before.

        Raises:
            UserError: the master does not answer.
        """
        (client, _, transfers), name = self._join(), self._name(key, uri)
        if self._waiting.pop(name, None):  # it may be on its way, or have arrived where the answer was lost
            transfers.submit(int).result()  # behind what the thread has begun
        if (code := self._ask(lambda: client.remove(name, force=True))) == _UNREACHABLE:
            raise self._silent(code)

    def holds(self, key: str, uri: str) -> bool:
        """Whether the master knows it; of a dead owner's it learns some seconds later.

        Raises:
            UserError: the master does not answer.
        """
        client, name = self._join()[0], self._name(key, uri)
        if (code := self._ask(lambda: client.is_exist(name))) not in (0, 1):
            raise self._silent(code)
        return code == 1

    def stored(self) -> list[tuple[str, str]]:
        """Key and uri of every value of this namespace.

        Raises:
            UserError: the master does not answer.
        """
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
        """Wait until all is sent, and send again what could not be put; that goes on waiting, until it is removed.

        Raises:
            StoreFullError: for some there is no room at the moment, or no owner that lends memory.
            UserError: some could not be put; the store does not answer.
        """
        self._written = 0
        if not self._waiting:
            return
        client, _, transfers = self._join()
        transfers.submit(int).result()  # behind all that is on its way
        # A master that was started again is found at the second time.
        codes = transfers.submit(self._put, client, deque(self._waiting)).result()
        failed = {name: code for name, code in codes.items() if code != 0}
        for name, code in failed.items():
            if code != _FULL:
                raise UserError(f"store {self.address}: {name} could not be put (Mooncake's code {code})")
        if failed:
            raise StoreFullError(f"store {self.address}: no room for {len(failed)} samples")

    def _put(self, client: Any, names: deque[str]) -> dict[str, int]:
        """Put what waits under these names, which are taken out; Mooncake's codes."""
        taken = [names.popleft() for _ in range(len(names))]
        values = {name: pieces for name in taken if (pieces := self._waiting.get(name))}
        if not values:
            return {}
        from mooncake.store import ReplicateConfig

        config = ReplicateConfig()
        config.with_hard_pin = True
        places = [[piece.data_ptr() for piece in pieces] for pieces in values.values()]
        sizes = [[piece.nbytes for piece in pieces] for pieces in values.values()]
        answers = client.batch_put_from_multi_buffers(list(values), places, sizes, config)
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
        """Ask the master; one that was started again is found at the second time."""
        code = call()
        return call() if code == _UNREACHABLE else code

    def _silent(self, code: int) -> UserError:
        return UserError(f"store {self.address}: the master does not answer (Mooncake's code {code})")

    def _join(self) -> tuple[Any, BufferPool, ThreadPoolExecutor]:
        with self._lock:
            # Neither client nor thread survives a fork.
            if self._joined is None or self._joined[0] != os.getpid():
                client = connect(self.address)
                transfers = ThreadPoolExecutor(1, "mooncake")
                self._joined = (os.getpid(), client, BufferPool(client), transfers)
            return self._joined[1:]
