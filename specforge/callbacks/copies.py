"""Copies of a run's checkpoints in an object store, by fsspec."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from specforge.checkpoints import CHECKSUM_SIZE, STEP
from specforge.console import say
from specforge.errors import UserError
from specforge.files import disk_error, first_line, replace_link, write_file

_NAME = re.compile(r"(?:(?:step|best)-\d{8,}|last|best)\.ckpt")
_RUN = ".run"  # a file with the run's own random name, in its folder and among its copies
_LINKS = {"last.ckpt": "step-", "best.ckpt": "best-"}  # and how the names of what they link to begin


class Copies:
    """The same checkpoints as in a run's folder; ``last.ckpt`` and ``best.ckpt`` are files there.

    Args:
        url: such as ``s3://bucket/run``; a file has to appear there when it is complete, as in object stores.

    Raises:
        UserError: here and by all methods: the file system is unknown, is not installed or has failed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._known: dict[str, int] = {}  # when the files were changed that are known to be there
        with self._explained():
            self._fs, self._root = fsspec.url_to_fs(url)

    @classmethod
    def at(cls, url: str | None) -> Copies | None:
        """The copies at a URL; None without one."""
        return None if url is None else cls(url)

    def names(self) -> set[str]:
        """Names of the checkpoints there."""
        with self._explained():
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return set()
            return {name for path in found if _NAME.fullmatch(name := path.rpartition("/")[2])}

    def join(self, folder: Path) -> None:
        """Make these the copies of a run, before its first checkpoint; writing its name shows whether the place works.

        Args:
            folder: the run's checkpoints.

        Raises:
            UserError: they are another run's.
        """
        with _locked(folder), self._explained():
            ours, theirs = self._runs(folder)
            name = ours or theirs or uuid.uuid4().hex.encode()
            if not theirs:
                with tempfile.TemporaryDirectory() as made:
                    (Path(made) / _RUN).write_bytes(name)
                    self._write(self._fs.put_file, f"{made}/{_RUN}", _RUN)
            if not ours:
                write_file(folder / _RUN, name)

    def put(self, folder: Path) -> None:
        """Copy what is new in the folder, the links last, and remove what the folder does not have."""
        with self._explained():
            found = {path.name: path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.exists()}
            here = {name: path for name, path in found.items() if name not in _LINKS}
            for name, path in here.items():
                changed = path.stat().st_mtime_ns
                if self._known.get(name) != changed and self._checksum(name) != _checksum(path):
                    self._write(self._fs.put_file, str(path), name)
                self._known[name] = changed
            for link in found.keys() - here.keys():
                if self._checksum(link) != _checksum(found[link]):
                    self._write(self._fs.cp_file, self._place(found[link].resolve().name), link)
            for name in self.names() - found.keys():
                self._fs.rm_file(self._place(name))

    def get(self, folder: Path) -> None:
        """Copy everything into the folder, unless its last checkpoint is as new.

        Links there point to what they do here. Other files of the folder stay.

        Raises:
            UserError: the folder has checkpoints of another run.
        """
        names = self.names()
        if not names:
            return
        with _locked(folder), self._explained():
            ours, theirs = self._runs(folder)
            checksums = {name: self._checksum(name) for name in names}
            last = _newest(name for name in names if checksums[name] == checksums.get("last.ckpt"))
            if _last_step(folder) >= (_newest(names) if last < 0 else last):
                return
            if theirs and not ours:
                write_file(folder / _RUN, theirs)
            for name in sorted(checksums.keys() - _LINKS):
                if checksums[name] != _checksum(folder / name):
                    write_file(folder / name, self._fs.cat_file(self._place(name)))
            for link, start in _LINKS.items():
                same = [x for x in checksums if x.startswith(start) and checksums[x] == checksums.get(link)]
                if same and (folder / link).resolve().name != max(same):
                    replace_link(folder / link, folder / max(same))
            say(f"checkpoints are fetched from {self.url}")

    def _runs(self, folder: Path) -> tuple[bytes, bytes]:
        """The names of the run in the folder and of the run that is copied; empty where none is known."""
        ours = (folder / _RUN).read_bytes() if (folder / _RUN).exists() else b""
        try:
            theirs = bytes(self._fs.cat_file(self._place(_RUN)))
        except FileNotFoundError:
            theirs = b""
        is_another = theirs != ours if ours else _last_step(folder) >= 0
        if theirs and is_another:
            raise UserError(
                f"checkpoint.copy_to {self.url}: holds copies of another run than {folder}; choose another place, or "
                "another trainer.default_root_dir to go on with that run"
            )
        return ours, theirs

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _write(self, write: Callable[[str, str], None], source: str, name: str) -> None:
        """Write a file, which an object store shows when it is complete; a folder would show a part of it."""
        place = self._place(name)
        if isinstance(self._fs, LocalFileSystem):
            os.makedirs(self._root, exist_ok=True)
            write(source, f"{place}.part")
            os.replace(f"{place}.part", place)
        else:
            write(source, place)

    def _checksum(self, name: str) -> bytes:
        try:
            return bytes(self._fs.cat_file(self._place(name), start=-CHECKSUM_SIZE))
        except FileNotFoundError:
            return b""

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # every file system has errors of its own
            raise UserError(f"checkpoint.copy_to {self.url}: cannot be used ({first_line(error)})") from error


def _newest(names: Iterable[str]) -> int:
    """The last step among names of checkpoints; -1 without any."""
    return max((int(found[1]) for name in names if (found := STEP.fullmatch(name))), default=-1)


def _last_step(folder: Path) -> int:
    """The step of a folder's last checkpoint; -1 without any."""
    link = folder / "last.ckpt"
    return _newest([link.resolve().name] if link.exists() else [path.name for path in folder.glob("*.ckpt")])


def _checksum(path: Path) -> bytes:
    """The last bytes of a file, which are a checkpoint's checksum; empty if there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(-CHECKSUM_SIZE, os.SEEK_END)
            return file.read()
    except OSError:
        return b""


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let the ranks of a host work one after the other, if the file system of the folder has locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise disk_error(folder, error) from error
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
