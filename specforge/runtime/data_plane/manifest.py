"""The manifest of a feature folder: one JSON reference per line, next to the shards.

A line in the manifest is the commit of a sample: its features are in a complete shard. Lines are appended and synced
after their shard. A line cut off by a crash does not count; its sample is captured again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from specforge.contracts import Provenance, SampleRef
from specforge.errors import UserError
from specforge.files import LineLog, parse_json

MANIFEST = "manifest.jsonl"


class Manifest:
    """References to the samples of a feature folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / MANIFEST
        self._log = LineLog(self.path)

    def refs(self) -> list[SampleRef]:
        """Read every committed reference, in the order of commitment. If a sample appears twice, the later line counts.

        Raises:
            UserError: there is no manifest, or a line is not a reference.
        """
        try:
            lines = self._log.lines()
        except FileNotFoundError as error:
            raise UserError(f"{self.path}: no such file; create features with `specforge capture`") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        refs: dict[str, SampleRef] = {}
        seen: dict[Provenance, Provenance] = {}
        for number, line in enumerate(lines, 1):
            try:
                ref = SampleRef.from_json(parse_json(line))
            except ValueError as error:
                raise UserError(f"{self.path}, line {number}: not a sample reference ({error})") from error
            shared = seen.setdefault(ref.provenance, ref.provenance)  # of many references; it takes most of the memory
            refs[ref.sample_id] = replace(ref, provenance=shared)
        return list(refs.values())

    def append(self, refs: Iterable[SampleRef]) -> None:
        """Commit references, durably.

        Raises:
            UserError: the disk is full or not writable.
        """
        self._log.append(json.dumps(ref.to_json(), separators=(",", ":")) for ref in refs)
