"""A folder of captured features: shards, their manifest, and what they were made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from specforge.contracts import Provenance, SampleRef, TokenCounts
from specforge.errors import UserError
from specforge.files import check_folder, read_json, write_file
from specforge.runtime.data_plane.encoding import ENCODINGS
from specforge.runtime.data_plane.local import ShardBackend
from specforge.runtime.data_plane.refs import Manifest
from specforge.runtime.data_plane.store import FeatureStore
from specforge.target_files import open_safetensors

FORMAT = 1
_META = "features.json"
_COUNTS = "token_counts.safetensors"


@dataclass
class FeatureFolder:
    """Captured features on disk.

    Attributes:
        folder: where they lie.
        store: their tensors.
        manifest: their references.
        refs: those committed so far.
        provenance: what all of them have in common.
        counts: token counts of the prompts.
    """

    folder: Path
    store: FeatureStore
    manifest: Manifest
    refs: list[SampleRef]
    provenance: Provenance
    counts: TokenCounts

    @classmethod
    def create(cls, folder: Path, provenance: Provenance, counts: TokenCounts) -> FeatureFolder:
        """Start a folder, or go on with one that was made from the same target in the same way.

        Raises:
            UserError: the folder holds features made otherwise.
        """
        if provenance.encoding not in ENCODINGS:
            raise UserError(f"encoding {provenance.encoding!r}: use one of {', '.join(ENCODINGS)}")
        meta = {"format": FORMAT, "provenance": provenance.to_json()}
        path = folder / _META
        if path.exists():
            found = _flat(read_json(path))
            found.setdefault("provenance.encoding", found.get("encoding"))  # where folders had it before
            for key, value in _flat(meta).items():
                was = found.get(key)
                if was != value and key != "provenance.target":
                    raise UserError(
                        f"{folder}: holds features with {key} {was}, not {value}; choose another folder"
                    )
        else:
            check_folder(folder.resolve(), _is_begun)
            tensors = {"supervised": counts.supervised, "context": counts.context}
            write_file(folder / _COUNTS, save(tensors))
            write_file(path, json.dumps(meta, indent=2) + "\n")
            (folder / "manifest.jsonl").touch()
        Manifest(folder).recover()
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> FeatureFolder:
        """Read a folder.

        Raises:
            UserError: it holds no features, or is damaged.
        """
        if not (folder / _META).exists():
            raise UserError(f"{folder}: no features here; make them with `specforge capture`")
        meta: dict[str, Any] = read_json(folder / _META)
        if meta.get("format") != FORMAT:
            raise UserError(f"{folder / _META}: format {meta.get('format')}; this version reads {FORMAT}")
        with open_safetensors(folder / _COUNTS) as file:
            counts = TokenCounts(file.get_tensor("supervised"), file.get_tensor("context"))
        manifest = Manifest(folder)
        refs = manifest.refs()
        store = FeatureStore(ShardBackend(folder))
        store.adopt(refs)
        return cls(folder, store, manifest, refs, Provenance.from_json(meta["provenance"]), counts)


def _is_begun(folder: Path) -> bool:
    """Whether a folder holds only what a start that was killed leaves."""
    return all(path.name.lstrip(".").startswith((_COUNTS, _META)) for path in folder.iterdir())


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
