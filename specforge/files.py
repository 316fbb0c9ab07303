"""Files and folders that appear whole or not at all and replace only their own kind; JSON read with a clear error."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from specforge.errors import UserError

_STAGED, _RETIRED = ".part", ".old"  # end the names of folders that are being filled, and that were replaced
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

Recogniser = Callable[[Path], bool]


def write_file(path: Path, content: bytes | memoryview | str) -> None:
    """Write ``path`` through a temporary file beside it, flushed to disk before it takes the name.

    Raises:
        UserError: the disk is full or not writable; nothing is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
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
    """Write a folder of files that takes its name only when it is complete.

    Args:
        folder: new, empty, or one that holds nothing but files of these names, which is replaced.
        files: their contents by name.
        is_ours: what else a folder must be to be replaced.

    Raises:
        UserError: something else is there, or the disk is full or not writable; what was there is as it was.
    """
    named = holds_only(*files)
    with staged_folder(folder, lambda place: named(place) and (is_ours is None or is_ours(place))) as staging:
        for name, content in files.items():
            write_file(staging / name, content)


def holds_only(*names: str) -> Recogniser:
    """Recognises folders in which, and in whose folders, there are only files of these names."""
    known = {Path(name).name for name in names}

    def recognise(folder: Path) -> bool:
        return all(
            stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and path.name in known)
            for path in folder.rglob("*")
            for mode in [path.lstat().st_mode]
        )

    return recognise


def check_folder(folder: Path, is_ours: Recogniser | None = None) -> Path:
    """Refuse to write a folder in the place of something else; to be called before the work that fills it.

    Args:
        folder: may be new or empty, or what ``is_ours`` recognises, which is to be replaced.
        is_ours: whether a folder is what the same command wrote, and nothing else is in it.

    Returns:
        Its full path.

    Raises:
        UserError: says what is in the way.
    """
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
            reason = "is the current folder, or one that holds it; name a new or an empty folder"
        elif not any(place.iterdir()) or (is_ours is not None and is_ours(place)):
            return place
        else:
            names = sorted(path.name for path in place.iterdir())
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            reason = (
                f"holds {', '.join(names[:3])}{more}, not only what this command writes; name a new or an empty "
                "folder, or remove it first"
            )
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise UserError(f"{folder}: cannot be looked at ({error})") from error
    raise UserError(f"{folder}: {reason}")


@contextmanager
def staged_folder(folder: Path, is_ours: Recogniser | None = None) -> Iterator[Path]:
    """A folder to fill, which takes the name ``folder`` when the block ends well and is removed otherwise.

    What a killed process had staged for this name is removed. See :func:`check_folder` for the arguments.

    Raises:
        UserError: something else is there, or the disk is full or not writable; what was there is as it was.
    """
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
        check_folder(folder, is_ours)  # the work may have taken hours
        _take_place(staging, place)
        sync_folder(place.parent)
    except OSError as error:
        raise disk_error(folder, error) from error
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def _take_place(staging: Path, place: Path) -> None:
    """Give a staged folder its name; what had it is under the staged one's name then."""
    if not place.exists():
        staging.rename(place)
    elif not _exchange(staging, place):
        retired = staging.with_suffix(_RETIRED)
        # A kill behind the next line leaves it there, and the next call gives it its name again.
        place.rename(retired)
        try:
            staging.rename(place)
        except BaseException:
            retired.rename(place)
            raise
        shutil.rmtree(retired, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names at once; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _clear_leftovers(place: Path) -> None:
    """Undo what killed processes left of this name: staged folders go, one that was to be replaced comes back."""
    ours = re.compile(rf"\.{re.escape(place.name)}\.[a-z0-9_]{{8}}({_STAGED}|{_RETIRED})")
    for path in [x for x in place.parent.iterdir() if ours.fullmatch(x.name)]:
        if path.suffix == _RETIRED and not place.exists():
            path.rename(place)
        elif path.suffix == _RETIRED or _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(staging: Path) -> bool:
    """Whether no process is filling a staged folder."""
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


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power loss."""
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

    Args:
        path: the file, which need not exist.
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
    """The text of a file, without what blank surrounds it.

    Args:
        path: the file.
        what: what to call it in a message.
        private: refuse one that others than its owner can read or write, where that is this user.

    Raises:
        UserError: it cannot be read, is empty, or is not private.
    """
    try:
        status, text = path.stat(), path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {path}: cannot be read ({first_line(error)})") from error
    # Of another's file, such as a mounted secret, its owner has decided who may read it.
    if private and hasattr(os, "getuid") and status.st_uid == os.getuid() and status.st_mode & 0o077:
        raise UserError(f"{what} {path}: others than its owner can read or write it; run chmod 600 {path}")
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
    """Refuse to replace a file that is not a JSON object with these keys; to be called before the work that makes it.

    Raises:
        UserError: something else is there.
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
        raise UserError(f"{path}: holds something else than what this command writes; name a new file")


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
    count = 2 if lines and lines[0].endswith(":") else 1  # the first may announce the second
    said = " ".join(lines[:count])
    return "".join(c if c.isprintable() else "\ufffd" for c in said[:200]) or type(error).__name__


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
