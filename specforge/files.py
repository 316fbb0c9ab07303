"""Files that appear whole or not at all, and JSON that is read with a clear error."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specforge.errors import UserError


def write_file(path: Path, content: bytes | memoryview | str) -> None:
    """Write ``path`` through a temporary file beside it, flushed to disk before it takes the name.

    Raises:
        UserError: the disk is full or not writable; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise disk_error(path, error) from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files that takes its name only when it is complete.

    Raises:
        UserError: the disk is full or not writable; the old folder, if any, is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.items():
            write_file(staging / name, content)
        staging.chmod(0o777 & ~_umask())
        retired = staging.with_name(staging.name + ".old")
        if folder.exists():
            folder.rename(retired)
        staging.rename(folder)
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(path: Path, error: OSError) -> UserError:
    """A one-line error for a failed write."""
    return UserError(f"{path}: could not be written ({error.strerror or error}); nothing was changed")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except ValueError as error:
        place = (
            f", line {error.__cause__.lineno}" if isinstance(error.__cause__, json.JSONDecodeError) else ""
        )
        raise UserError(f"{path}{place}: {error}") from error


def parse_json(text: bytes | str) -> Any:
    """Parse JSON; bytes are UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is not JSON; the message says why, in one line.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not usable JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"not usable JSON ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(
        lines[: 2 if lines and lines[0].endswith(":") else 1]
    )  # the first may announce the second
    return "".join(c if c.isprintable() else "\ufffd" for c in said[:200]) or type(error).__name__
