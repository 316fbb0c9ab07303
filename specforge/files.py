"""Writes files and folders atomically, without replacing anything else; reads JSON with clear errors."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from specforge.errors import UserError

_STAGED, _RETIRED = ".part", ".old"  # suffixes of folders that are being filled, and of replaced ones
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

Recogniser = Callable[[Path], bool]


def write_file(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file atomically: a temporary file next to it is synced to disk and then renamed.

    Raises:
        UserError: the disk is full or not writable; no file remains.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise disk_error(path, error) from error
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


def write_folder(folder: Path, files: Mapping[str, bytes], is_ours: Recogniser | None = None) -> None:
    """Write a folder of files atomically.

    Args:
        folder: new or empty folder, or one with only files of these names, which is replaced.
        files: contents of the files, by name.
        is_ours: further condition on a folder that is to be replaced.

    Raises:
        UserError: the folder contains something else, or the disk is full or not writable; nothing is changed.
    """
    named = holds_only(*files)
    with staged_folder(folder, lambda found: named(found) and (is_ours is None or is_ours(found))) as staging:
        for name, content in files.items():
            write_file(staging / name, content)


def holds_only(*names: str) -> Recogniser:
    """A test for folders that, subfolders included, contain only files of these names."""
    known = {Path(name).name for name in names}

    def recognise(folder: Path) -> bool:
        return all(
            stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and path.name in known)
            for path in folder.rglob("*")
            for mode in [path.lstat().st_mode]
        )

    return recognise


def check_folder(folder: Path, is_ours: Recogniser | None = None) -> Path:
    """Check before the work starts that a folder can be written without replacing anything else.

    Args:
        folder: new or empty folder, or one that ``is_ours`` accepts, which will be replaced.
        is_ours: whether a folder contains only output of the same command.

    Returns:
        Its absolute path.

    Raises:
        UserError: names what is in the way.
    """
    check_local(folder)
    try:
        place = folder.resolve()
        if folder.is_symlink():
            reason = f"is a link to {place}; name that folder itself, or a new one"
        elif not place.exists() and (".." not in folder.parts or folder.parent.exists()):
            return place
        elif not place.exists():
            reason = f"leads through {folder.parent}, which does not exist"
        elif not place.is_dir():
            reason = "is a file; name a new or an empty folder"
        elif Path.cwd().is_relative_to(place):
            reason = "is the current folder or contains it; name a new or an empty folder"
        elif not any(place.iterdir()) or (is_ours is not None and is_ours(place)):
            return place
        else:
            names = sorted(path.name for path in place.iterdir())
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            reason = (
                f"contains more than this command writes ({', '.join(names[:3])}{more}); name a new or an empty "
                "folder, or remove it first"
            )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UserError(f"{folder}: cannot be examined ({error})") from error
    raise UserError(f"{folder}: {reason}")


def address_of(path: Path | str) -> str | None:
    """The address, such as ``s3://bucket/run``, that was given as a path; None if it is a path."""
    scheme, *rest = Path(path).parts or ("",)
    if not rest or not re.fullmatch(r"[a-z][a-z0-9+.-]+:", scheme):
        return None
    return f"{scheme}//{'/' * (scheme == 'file:')}{'/'.join(rest)}"


def check_local(path: Path | str, what: str = "", hint: str = "") -> None:
    """Reject an address, which as a path would name a folder ``s3:``.

    Args:
        path: where something is to be read or written.
        what: what it is, for the error.
        hint: what else to do.

    Raises:
        UserError: it is an address.
    """
    if address := address_of(path):
        raise UserError(f"{what} {address}: is an address, but a path is needed; mount the store{hint}".lstrip())


@contextmanager
def staged_folder(folder: Path, is_ours: Recogniser | None = None) -> Iterator[Path]:
    """Context manager for a temporary folder that is renamed to ``folder`` on success and removed on failure.

    Leftovers of killed processes for this name are removed. The arguments are those of :func:`check_folder`.

    Raises:
        UserError: the folder contains something else, or the disk is full or not writable; nothing is changed.
    """
    check_local(folder)
    try:
        place = Path(os.path.realpath(folder))
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            _clear_leftovers(place)
        check_folder(folder, is_ours)
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=_STAGED, dir=place.parent))
    except (OSError, ValueError) as error:
        raise disk_error(folder, error) from error
    lock = os.open(staging, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system locks folders
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield staging
        staging.chmod(0o777 & ~_umask())
        sync_folder(staging)
        check_folder(folder, is_ours)  # again, as the work may have taken hours
        _take_place(staging, place)
        sync_folder(place.parent)
    except OSError as error:
        raise disk_error(folder, error) from error
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def _take_place(staging: Path, place: Path) -> None:
    """Rename a staged folder; an existing folder gets the staged name in exchange."""
    if not place.exists():
        staging.rename(place)
    elif not _exchange(staging, place):
        retired = staging.with_suffix(_RETIRED)
        # If the process is killed after the next line, the next call restores the retired folder.
        place.rename(retired)
        try:
            staging.rename(place)
        except BaseException:
            retired.rename(place)
            raise
        shutil.rmtree(retired, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Atomically exchange two names; False if the system or the file system does not support it."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _clear_leftovers(place: Path) -> None:
    """Clean up after killed processes: remove staged folders of this name, restore a folder that was being replaced."""
    ours = re.compile(rf"\.{re.escape(place.name)}\.[a-z0-9_]{{8}}({_STAGED}|{_RETIRED})")
    for path in [x for x in place.parent.iterdir() if ours.fullmatch(x.name)]:
        if path.suffix == _RETIRED and not place.exists():
            path.rename(place)
        elif path.suffix == _RETIRED or _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(staging: Path) -> bool:
    """Whether no process is filling this staged folder."""
    try:
        handle = os.open(staging, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def replace_link(link: Path, target: Path) -> None:
    """Point ``link`` at ``target`` atomically."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames in it persist after a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(path: Path, error: OSError | ValueError) -> UserError:
    """A one-line error for a failed write."""
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: could not be written ({reason}); nothing was changed")


class LineLog:
    """A text file that only grows, by whole lines; each append is durable.

    A crash may leave a cut-off last line. It is not read, and the next append removes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[bytes]:
        """All complete lines, without their line ends.

        Raises:
            OSError: the file is missing or cannot be read.
        """
        return self.path.read_bytes().split(b"\n")[:-1]

    def append(self, lines: Iterable[str]) -> None:
        """Append lines, all or none.

        Raises:
            UserError: the disk is full or not writable.
        """
        data = "".join(f"{line}\n" for line in lines).encode()
        size = self._remove_torn_line()
        try:
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            raise disk_error(self.path, error) from error

    def _remove_torn_line(self) -> int:
        """Truncate the file to its complete lines; returns its size."""
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


def read_secret(path: Path, what: str, private: bool = False) -> str:
    """Read a text file, named ``what`` in error messages, and strip whitespace.

    ``private`` rejects a file of this user that other users can read or write.

    Raises:
        UserError: the file cannot be read, is empty, or is not private.
    """
    try:
        status, text = path.stat(), path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {path}: cannot be read ({first_line(error)})") from error
    # The owner of another user's file, such as a mounted secret, decides who may read it.
    if private and hasattr(os, "getuid") and status.st_uid == os.getuid() and status.st_mode & 0o077:
        raise UserError(f"{what} {path}: other users can read or write it; run chmod 600 {shlex.quote(str(path))}")
    if not text:
        raise UserError(f"{what} {path}: is empty")
    return text


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
        place = f", line {error.__cause__.lineno}" if isinstance(error.__cause__, json.JSONDecodeError) else ""
        raise UserError(f"{path}{place}: {error}") from error


def check_json(path: Path, *keys: str) -> None:
    """Check before the work starts that a JSON file can be written without replacing anything else.

    A new or empty file can be written, and a JSON object with all of ``keys``, those that the command writes.

    Raises:
        UserError: the file contains something else.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        found = read_json(path)
    except UserError:
        found = None
    if not (isinstance(found, dict) and found.keys() >= set(keys)):
        raise UserError(f"{path}: was not written by this command; name a new file")


def parse_json(text: bytes | str) -> Any:
    """Parse JSON; bytes are UTF-8, with or without a byte order mark.

    Raises:
        ValueError: the text is not JSON; the message is one line with the reason.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not usable JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"not usable JSON ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The message of an error in one line of at most 200 characters, or its type if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1  # the first line may introduce the second
    text = " ".join(lines[:count])
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:200]) or type(error).__name__


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file for reading on the CPU.

    Raises:
        UserError: the file is missing or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def weight_files(folder: Path) -> dict[str, Path] | None:
    """The safetensors file of each tensor of a model; None if the folder has none.

    As in transformers, a single file takes precedence over an index of several, and files that an index does not name
    are not the model's.

    Raises:
        UserError: a file is damaged, or the index names one that is not there.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.exists():
        return None
    found = read_json(index)
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    for name in sorted(set(names.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{index}: names {name!r}, which is not a file in the same folder")
    return {tensor: folder / name for tensor, name in names.items()}
