"""The file of a training checkpoint: written with a checksum over all bytes, and read without unpickling code.

The file is the zip archive that ``torch.save`` writes, with the checksum in the archive's comment, which other readers
ignore. Archives of earlier versions have no checksum; their records are checked against the archive's own CRCs.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import torch
import xxhash
from torch import Tensor

from specforge.errors import UserError
from specforge.files import address_of, first_line

_LABEL = b"specforge xxh3-128:"
_COMMENT = re.compile(re.escape(_LABEL) + rb"[0-9a-f]{32}")
CHECKSUM_SIZE = 32  # the last bytes of the file
STEP = re.compile(r"(?:step|best)-(\d{8,})\.ckpt")  # names of a run's checkpoints, except last.ckpt and best.ckpt
_COMMENT_SIZE = len(_LABEL) + CHECKSUM_SIZE
# The last record of a zip archive; its last two bytes are the length of the comment.
_END, _END_SIZE = b"PK\5\6", 22
# Fields that describe the draft to readers without its module.
_FIELDS = {"algorithm": str, "draft_config": Mapping, "target": str, "target_fingerprint": str}


def checkpoint_bytes(checkpoint: Mapping[str, Any]) -> memoryview:
    """Serialise a checkpoint, checksum included."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(-2, io.SEEK_END)
    buffer.write(struct.pack("<H", _COMMENT_SIZE) + _LABEL)
    buffer.write(xxhash.xxh3_128_hexdigest(buffer.getbuffer()).encode())
    return buffer.getbuffer()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a training checkpoint onto the CPU.

    Args:
        path: a file, or an address that fsspec knows, such as ``s3://bucket/run/last.ckpt``.

    Raises:
        UserError: the file is missing or damaged, contains pickled objects, or is not a SpecForge checkpoint.
    """
    if address := address_of(path):
        return _read_at(address)
    if not path.is_file():
        raise UserError(f"{path}: {_missing(path)}")
    try:
        _verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: contains pickled objects, which SpecForge never loads; to start from a draft, name a folder with "
            "config.json and model.safetensors"
        ) from error
    except Exception as error:  # a damaged file may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from error
    saved = content.get("specforge") if isinstance(content, dict) else None
    if not isinstance(saved, dict) or not _is_tensors(content.get("state_dict")):
        raise UserError(f"{path}: not a SpecForge checkpoint")
    for name, kind in _FIELDS.items():
        if not isinstance(saved.get(name), kind):
            raise UserError(f"{path}: not a SpecForge checkpoint ({name} is missing or has the wrong type)")
    return content


def _read_at(address: str) -> dict[str, Any]:
    """Load a checkpoint from a copy, whose memory mapping outlives it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(address).name
        try:
            files, place = fsspec.url_to_fs(address)
            files.get_file(place, str(copy))
        except FileNotFoundError as error:
            raise UserError(f"{address}: no such checkpoint") from error
        except Exception as error:  # every file system has errors of its own
            raise UserError(f"{address}: cannot be read ({first_line(error)})") from error
        try:
            return read_checkpoint(copy)
        except UserError as error:
            raise UserError(str(error).replace(str(copy), address)) from error


def _verify(path: Path) -> None:
    """Check the file against its checksum, or the records of an older file against their CRCs."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(1) == b"\x80":
            raise pickle.UnpicklingError
        file.seek(-min(size, _COMMENT_SIZE), io.SEEK_END)
        tail = file.read()
        if _COMMENT.fullmatch(tail):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
                intact = xxhash.xxh3_128_hexdigest(view[: size - CHECKSUM_SIZE]).encode() == tail[-CHECKSUM_SIZE:]
        elif tail[-_END_SIZE:].startswith(_END) and tail.endswith(b"\0\0"):
            intact = _records_are_intact(path)
        else:
            raise UserError(f"{path}: truncated or damaged, or not a SpecForge checkpoint")
    if not intact:
        raise UserError(f"{path}: the checksum does not match, so the file is damaged; use another checkpoint")


def _records_are_intact(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        # SpecForge does not compress. A compressed record might fill the memory when unpacked.
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise UserError(f"{path}: not a SpecForge checkpoint")
        return archive.testzip() is None


def _missing(path: Path) -> str:
    if path.is_dir():
        return "a folder, not a checkpoint"
    last = path.with_name("last.ckpt")
    if path.name == "best.ckpt" and last.exists():
        return f"no such checkpoint, because no validation has run yet; the newest checkpoint is {last}"
    return "no such checkpoint"


def _is_tensors(state: Any) -> bool:
    return isinstance(state, dict) and all(isinstance(x, Tensor) for x in state.values())
