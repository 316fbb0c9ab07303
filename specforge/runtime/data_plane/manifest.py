"""Where references come from. Offline: a manifest, one JSON reference a line, beside the shards.

The manifest is the commit: a sample whose line is there has its features in a complete shard. Lines are
appended and synced after their shard; a line cut off by a crash is dropped when the file is opened again,
and its sample is captured again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from specforge.contracts import Provenance, SampleRef
from specforge.errors import UserError
from specforge.files import disk_error, parse_json

MANIFEST = "manifest.jsonl"


class RefSource(Protocol):
    """A fixed, ordered set of committed samples."""

    def refs(self) -> list[SampleRef]:
        """All references, in the source's order."""
        ...


class Manifest:
    """References of a folder of features.

    Args:
        folder: holds ``manifest.jsonl``.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MANIFEST

    def refs(self) -> list[SampleRef]:
        """Read every committed reference, in the order of commitment; of a sample that comes again, the later line.

        Raises:
            UserError: there is no manifest, or a line is not a reference.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError as error:
            raise UserError(f"{self.path}: no such file; make features with `specforge capture`") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        refs: dict[str, SampleRef] = {}
        seen: dict[Provenance, Provenance] = {}
        for number, line in enumerate(lines[:-1], 1):
            try:
                ref = SampleRef.from_json(parse_json(line))
            except ValueError as error:
                raise UserError(f"{self.path}, line {number}: not a sample reference ({error})") from error
            shared = seen.setdefault(ref.provenance, ref.provenance)
            refs[ref.sample_id] = _with_provenance(ref, shared)
        return list(refs.values())

    def append(self, refs: Iterable[SampleRef]) -> None:
        """Commit references; durable when this returns.

        Raises:
            UserError: the disk is full or not writable.
        """
        data = "".join(json.dumps(ref.to_json(), separators=(",", ":")) + "\n" for ref in refs).encode()
        size = self.recover()
        try:
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            raise disk_error(self.path, error) from error

    def recover(self) -> int:
        """Drop a last line that a crash cut off; returns the size of what is left."""
        if not self.path.exists():
            return 0
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            while size > 0:
                step = min(size, 1 << 16)
                file.seek(size - step)
                end = file.read(step).rfind(b"\n")
                if end >= 0:
                    size = size - step + end + 1
                    break
                size -= step
            file.truncate(size)
        return size


def _with_provenance(ref: SampleRef, provenance: Provenance) -> SampleRef:
    if ref.provenance is provenance:
        return ref
    fields: dict[str, Any] = {name: getattr(ref, name) for name in SampleRef.__slots__}  # type: ignore[attr-defined]
    return SampleRef(**{**fields, "provenance": provenance})
