"""A shared directory as a feature store: one safetensors file per sample, for several processes and hosts.

A file is written under another name and renamed, so it is complete or absent. File names have a random part, so two
attempts at the same sample, even by different processes, never touch each other's bytes; the committed reference
decides which one counts.
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

    Raises:
        OSError: the folder is missing, or cannot be created.
    """

    def __init__(self, folder: Path, create: bool = True) -> None:
        self.folder = folder
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        elif not folder.is_dir():
            raise OSError("no such folder; a run creates it when it starts")
        self._unsynced: dict[Path, int] = {}

    def new_uri(self, key: str, tensors: Mapping[str, Tensor]) -> str:
        """Path of a new file, relative to the folder."""
        return f"{key[:2]}/{key}-{secrets.token_hex(8)}.safetensors"

    def write(self, key: str, tensors: Mapping[str, Tensor], uri: str | None = None) -> str:
        """Write a group to a new file."""
        uri = uri or self.new_uri(key, tensors)
        path = self.folder / uri
        temporary = path.with_name(f".{path.stem}.tmp")
        try:
            self._path(key, uri)
            path.parent.mkdir(exist_ok=True)
            if tensors:
                write_flat(temporary, tensors, sync=False)
            else:
                temporary.touch()  # a full disk has no space for a header
            os.replace(temporary, path)
        except OSError as error:
            if not (isinstance(error, FileNotFoundError) and path.parent.exists()):
                temporary.unlink(missing_ok=True)
                raise disk_error(path, error) from error
            # Another process presumed this one dead and deleted the file: same as if it had done so a moment later.
        self._unsynced[path] = sum(x.nbytes for x in tensors.values())
        return uri

    def read(self, key: str, uri: str) -> dict[str, Tensor]:
        """Return views into the memory-mapped file."""
        try:
            path = self._path(key, uri)
            if path.stat().st_size == 0:
                return {}
            file = FlatTensors.map(path, SAMPLE_HEADER)
        except FileNotFoundError as error:
            raise KeyError(key) from error
        return {name: file[name] for name in file}

    def remove(self, key: str, uri: str) -> None:
        """Delete the file; readers that have mapped it keep their data."""
        path = self._path(key, uri)
        self._unsynced.pop(path, None)
        path.unlink(missing_ok=True)

    def holds(self, key: str, uri: str) -> bool:
        """Whether the file exists."""
        return self._path(key, uri).exists()

    def stored(self) -> list[tuple[str, str]]:
        """All samples' files, including unfinished ones."""
        uris: list[str] = []
        with suppress(FileNotFoundError), os.scandir(self.folder) as parts:  # the store is being deleted
            for part in parts:
                if part.is_dir(follow_symlinks=False):
                    uris += [f"{part.name}/{name}" for name in os.listdir(part.path)]
        return [(match.group(1), uri) for uri in sorted(uris) if (match := _URI.fullmatch(uri))]

    def flush(self) -> None:
        """Sync written files to disk."""
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
