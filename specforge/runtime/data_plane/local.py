"""The local backends: memory, and memory-mapped safetensors shards on disk.

A shard is an ordinary safetensors file; its tensors are named ``<sample id>.<generation>/<feature>`` and are not
padded. Writes are buffered and become a shard when they are flushed. The file is written under a temporary name, synced
and renamed, so a shard is complete or absent. Later sessions only add shards.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from specforge.files import disk_error, sync_folder
from specforge.runtime.data_plane.safetensors_io import FlatTensors, write_flat

_SHARD = re.compile(r"shard-(\d{5,})\.safetensors")


class MemoryBackend:
    """Tensors in a dictionary."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, Tensor]] = {}

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> str:
        """Keep the tensors; page-locked ones are copied, because hosts have little such memory."""
        self._groups[key] = {name: x.clone() if x.is_pinned() else x for name, x in tensors.items()}
        return ""

    def read(self, key: str, uri: str) -> dict[str, Tensor]:
        """Return the tensors themselves, not copies."""
        return dict(self._groups[key])

    def remove(self, key: str, uri: str) -> None:
        """Drop a group."""
        self._groups.pop(key, None)

    def holds(self, key: str, uri: str) -> bool:
        """Whether a group is held."""
        return key in self._groups

    def stored(self) -> list[tuple[str, str]]:
        """Every key; URIs are empty."""
        return [(key, "") for key in self._groups]

    def flush(self) -> None:
        """Nothing to do."""

    def pending(self) -> int:
        """Always 0."""
        return 0


class ShardBackend:
    """Safetensors shards in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(m.group(1)) for p in folder.iterdir() if (m := _SHARD.fullmatch(p.name))]
        self._next = max(numbers, default=-1) + 1
        self._buffer: dict[str, dict[str, Tensor]] = {}
        self._bytes = 0
        self._open: dict[str, tuple[FlatTensors, dict[str, list[str]]]] = {}
        self._removed: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> str:
        """Buffer a group for the next shard; its file name is the URI."""
        self._buffer[key] = dict(tensors)
        self._bytes += sum(x.nbytes for x in tensors.values())
        return self._name()

    def read(self, key: str, uri: str) -> dict[str, Tensor]:
        """Return views into the memory-mapped shard."""
        with self._lock:
            file, names = self._mapped(uri)
        return {name: file[f"{key}/{name}"] for name in names[key]}

    def remove(self, key: str, uri: str) -> None:
        """Delete the shard once all its groups are removed."""
        if self._buffer.pop(key, None) is not None:
            return
        try:
            with self._lock:
                _, names = self._mapped(uri)
                removed = self._removed.setdefault(uri, set())
                removed.add(key)
                if removed < set(names):
                    return
                del self._open[uri], self._removed[uri]
            (self.folder / uri).unlink(missing_ok=True)
        except OSError:
            return

    def holds(self, key: str, uri: str) -> bool:
        """Whether a readable shard, or the buffer, has the group."""
        return (key in self._buffer and uri == self._name()) or key in self._keys(uri)

    def stored(self) -> list[tuple[str, str]]:
        """Groups of all readable shards and of the buffer."""
        shards = sorted(path.name for path in self.folder.iterdir() if _SHARD.fullmatch(path.name))
        found = [(key, uri) for uri in shards for key in sorted(self._keys(uri))]
        return found + [(key, self._name()) for key in self._buffer]

    def _keys(self, uri: str) -> set[str]:
        try:
            with self._lock:
                return set(self._mapped(uri)[1]) - self._removed.get(uri, set())
        except OSError:
            return set()

    def flush(self) -> None:
        """Write the buffer as one shard."""
        if not self._buffer:
            return
        path = self.folder / self._name()
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        flat = {f"{key}/{name}": x for key, group in self._buffer.items() for name, x in group.items()}
        try:
            write_flat(temporary, flat, sync=True)
            os.replace(temporary, path)
            sync_folder(self.folder)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise disk_error(path, error) from error
        self._buffer, self._bytes = {}, 0
        self._next += 1

    def pending(self) -> int:
        """Bytes in the buffer."""
        return self._bytes

    def _name(self) -> str:
        return f"shard-{self._next:05d}.safetensors"

    def _mapped(self, uri: str) -> tuple[FlatTensors, dict[str, list[str]]]:
        """A mapped shard, and the names of the features of each of its groups."""
        if uri not in self._open:
            self._open[uri] = self._map(uri)
        return self._open[uri]

    def _map(self, uri: str) -> tuple[FlatTensors, dict[str, list[str]]]:
        if not _SHARD.fullmatch(uri):
            raise OSError(f"{uri!r} is not the name of a shard")
        path = self.folder / uri
        try:
            file = FlatTensors.map(path)
        except FileNotFoundError as error:
            raise OSError(f"{path} is missing; capture again") from error
        except OSError as error:
            raise OSError(f"{error}; delete it and capture again") from error
        names: dict[str, list[str]] = {}
        for name in file:
            key, _, feature = name.partition("/")  # without a slash, which means damage, the feature is missing
            names.setdefault(key, []).append(feature)
        return file, names
