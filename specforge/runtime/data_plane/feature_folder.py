"""A folder of captured features: shards, their manifest, and their provenance."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from specforge.contracts import Provenance, SampleRef, TokenCounts, engine_label
from specforge.errors import UserError
from specforge.files import check_folder, first_line, open_safetensors, read_json, write_file
from specforge.runtime.data_plane.encoding import ENCODINGS
from specforge.runtime.data_plane.local import ShardBackend
from specforge.runtime.data_plane.manifest import MANIFEST, Manifest
from specforge.runtime.data_plane.store import FeatureStore

FORMAT = 1
_META = "features.json"
_COUNTS = "token_counts.safetensors"


@dataclass
class FeatureFolder:
    """Captured features on disk."""

    folder: Path
    store: FeatureStore  # tensors of the samples
    manifest: Manifest  # references to the samples
    refs: list[SampleRef]  # references committed when the folder was opened
    provenance: Provenance  # origin of all features
    counts: TokenCounts  # token counts of the prompts

    @staticmethod
    def check(
        folder: Path, provenance: Provenance, counts: TokenCounts, prompts: str = "", mix_engines: bool = False
    ) -> None:
        """Reject a folder that holds features of another origin or of other prompts; it need not exist.

        Args:
            folder: the folder.
            provenance: origin of the features to add.
            counts: token counts of their prompts.
            prompts: identity of the prompt set with all its splits; not compared if empty.
            mix_engines: accept features that another engine has computed.

        Raises:
            UserError: the folder holds such features.
        """
        if provenance.encoding not in ENCODINGS:
            raise UserError(f"encoding {provenance.encoding!r}: use one of {', '.join(ENCODINGS)}")
        if not _holds_samples(folder):
            return
        meta = _read_meta(folder)
        found = _flat(meta)
        found.setdefault("provenance.encoding", found.get("encoding"))  # as folders of earlier versions have it
        engine = str(found.get("provenance.engine", ""))
        if engine != provenance.engine and not mix_engines:
            raise UserError(
                f"{folder}: holds features computed by {engine_label(engine)[:80]}, not "
                f"{engine_label(provenance.engine)}, which differ in their last bits; choose another folder, or mix "
                "them with --mix_engines true"
            )
        for key, value in _flat({"format": FORMAT, "provenance": replace(provenance, engine="").to_json()}).items():
            was = found.get(key)
            if was != value and key != "provenance.target":
                raise UserError(
                    f"{folder}: holds features with {key} {str(was)[:80]}, not {value}; choose another folder"
                )
        # Folders of the first versions identify their prompts only by token counts.
        old = _read_counts(folder)
        same = torch.equal(old.supervised, counts.supervised) and torch.equal(old.context, counts.context)
        if not same or (prompts and meta.get("prompts") and meta["prompts"] != prompts):
            raise UserError(
                f"{folder}: holds features of other prompts (from other data, options or held-out conversations); "
                "choose another folder"
            )

    @staticmethod
    def check_splits(folder: Path, splits: Collection[str]) -> None:
        """Reject a folder with features of a split that the prompts do not have.

        Raises:
            UserError: the folder holds such a split.
        """
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name not in splits and _holds_samples(path):
                raise UserError(
                    f"{folder}: holds features of a split {path.name}, which the prompts do not have; choose another "
                    "folder"
                )

    @classmethod
    def create(
        cls, folder: Path, provenance: Provenance, counts: TokenCounts, prompts: str = "", mix_engines: bool = False
    ) -> FeatureFolder:
        """Create a folder, or open one whose features have the same origin and prompts, as :meth:`check` compares them.

        Raises:
            UserError: the folder holds features of another origin or of other prompts.
        """
        cls.check(folder, provenance, counts, prompts, mix_engines)
        if not _holds_samples(folder):
            if not (folder / _META).exists():
                check_folder(folder.resolve(), _is_unfinished)
            meta = {"format": FORMAT, "provenance": provenance.to_json(), "prompts": prompts}
            tensors = {"supervised": counts.supervised, "context": counts.context}
            write_file(folder / _COUNTS, save(tensors))
            write_file(folder / _META, json.dumps(meta, indent=2) + "\n")
            (folder / MANIFEST).touch()
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> FeatureFolder:
        """Open a folder.

        Raises:
            UserError: the folder holds no features, or is damaged.
        """
        if not (folder / _META).exists():
            raise UserError(f"{folder}: no features here; create them with `specforge capture`")
        meta = _read_meta(folder)
        try:
            provenance = Provenance.from_json(meta["provenance"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{folder / _META}: is damaged ({first_line(error)}); capture into another folder"
            ) from error
        manifest = Manifest(folder)
        refs = manifest.refs()
        store = FeatureStore(ShardBackend(folder))
        store.adopt(refs)
        return cls(folder, store, manifest, refs, provenance, _read_counts(folder))


def _holds_samples(folder: Path) -> bool:
    """Whether anything was captured; a capture that failed early leaves only metadata."""
    manifest = folder / MANIFEST
    return (folder / _META).exists() and manifest.exists() and manifest.stat().st_size > 0


def _read_meta(folder: Path) -> dict[str, Any]:
    meta = read_json(folder / _META)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else "unknown"
        raise UserError(f"{folder / _META}: format {str(found)[:20]}; this version reads {FORMAT}")
    return meta


def _read_counts(folder: Path) -> TokenCounts:
    try:
        with open_safetensors(folder / _COUNTS) as file:
            return TokenCounts(file.get_tensor("supervised"), file.get_tensor("context"))
    except SafetensorError as error:
        raise UserError(f"{folder / _COUNTS}: is damaged ({first_line(error)})") from error


def _is_unfinished(folder: Path) -> bool:
    """Whether a folder holds only the leftovers of a capture that was killed at its start."""
    return all(path.name.lstrip(".").startswith((_COUNTS, _META)) for path in folder.iterdir())


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
