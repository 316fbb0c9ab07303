"""A shared mount as a feature store: one safetensors file a sample, for several processes and hosts.

A file is written under another name and renamed, so it is there whole or not at all. Its name holds a random part,
so two attempts at the same sample, by whatever processes, never touch each other's bytes: the reference that was
committed says which of them counts.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from specforge.files import disk_error, sync_folder
from specforge.runtime.data_plane.safetensors_io import SAMPLE_HEADER, FlatTensors, write_flat

_URI = re.compile(r"[0-9A-Za-z_.-]{2}/\.?([0-9A-Za-z][0-9A-Za-z_.-]*\.\d+)-[0-9a-f]{16}\.(?:safetensors|tmp)", re.ASCII)


class SharedDirBackend:
    """Safetensors files in a folder that all processes see.

    Args:
        folder: the store.
        create: make it if it is missing; else it is refused.

    Raises:
        OSError: it is missing, or cannot be made.
    """

    def __init__(self, folder: Path, create: bool = True) -> None:
        self.folder = folder
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        elif not folder.is_dir():
            raise OSError("no such folder; a run makes it when it starts")
        self._unsynced: dict[Path, int] = {}

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> str:
        """Write a file of its own.

        Raises:
            UserError: the disk is full or not writable; nothing is left behind.
        """
        uri = f"{key[:2]}/{key}-{secrets.token_hex(8)}.safetensors"
        path = self.folder / uri
        temporary = path.with_name(f".{path.stem}.tmp")
        try:
            self._path(key, uri)
            path.parent.mkdir(exist_ok=True)
            write_flat(temporary, tensors, sync=False)
            os.replace(temporary, path)
        except OSError as error:
            if not (isinstance(error, FileNotFoundError) and path.parent.exists()):
                temporary.unlink(missing_ok=True)
                raise disk_error(path, error) from error
            # Others took us for dead and deleted it: it is as lost as if they had done so a moment later.
        self._unsynced[path] = sum(x.nbytes for x in tensors.values())
        return uri

    def read(self, key: str, uri: str) -> dict[str, Tensor]:
        """Views into the memory-mapped file."""
        try:
            file = FlatTensors.map(self._path(key, uri), SAMPLE_HEADER)
        except FileNotFoundError as error:
            raise KeyError(key) from error
        return {name: file[name] for name in file}

    def remove(self, key: str, uri: str) -> None:
        """Delete the file; readers that have it mapped keep it."""
        path = self._path(key, uri)
        self._unsynced.pop(path, None)
        path.unlink(missing_ok=True)

    def holds(self, key: str, uri: str) -> bool:
        """Whether the file is there."""
        return self._path(key, uri).exists()

    def stored(self) -> list[tuple[str, str]]:
        """Every sample's files, and unfinished ones."""
        uris: list[str] = []
        with suppress(FileNotFoundError), os.scandir(self.folder) as parts:  # somebody deletes the store
            for part in parts:
                if part.is_dir(follow_symlinks=False):
                    uris += [f"{part.name}/{name}" for name in os.listdir(part.path)]
        return [(match.group(1), uri) for uri in sorted(uris) if (match := _URI.fullmatch(uri))]

    def flush(self) -> None:
        """Sync what was written to disk.

        Raises:
            UserError: the disk is full or not writable.
        """
        paths = list(self._unsynced)
        try:
            for path in paths:
                with suppress(FileNotFoundError), path.open("rb") as file:
                    os.fsync(file.fileno())
            for folder in {path.parent for path in paths}:
                sync_folder(folder)
        except OSError as error:
            raise disk_error(self.folder, error) from error
        for path in paths:
            self._unsynced.pop(path, None)

    def pending(self) -> int:
        """Bytes written but not yet synced."""
        return sum(list(self._unsynced.values()))

    def _path(self, key: str, uri: str) -> Path:
        match = _URI.fullmatch(uri)
        if match is None or match.group(1) != key:
            raise OSError(f"{uri!r} is not the name of a file of {key}")
        path = self.folder / uri
        if path.is_symlink() or path.parent.is_symlink():
            raise OSError(f"{path} leads out of the store by a link")
        return path
