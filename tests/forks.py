"""Runs programs in forks of a process that has imported them: imports take longer than a tiny run.

``python forks.py PROGRAM WORDS...`` does what ``python PROGRAM WORDS...`` does, for a Python file with a function
``main(words)``. Its first start in a session of tests imports it; ``main`` then runs in a fork, with the words,
environment, folder, streams and signals of the start, which ends as the fork does. A start that is killed takes its
fork along; one that leads a process group takes all of that group, whenever it ends. This file needs no package, so
that it starts quickly in any environment.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

FOLDER = "SPECFORGE_TEST_FORKS"  # variable of the environment: where the sockets of this session are
_NETWORK = "/proc/self/ns/net"  # the network namespace of a process
_PR_SET_CHILD_SUBREAPER = 36
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def session() -> Iterator[None]:
    """While programs may be started; the processes that fork end with it, or with this process."""
    folder = tempfile.mkdtemp(prefix=f"forks-{os.getpid()}-")
    os.environ[FOLDER] = folder
    try:
        yield
    finally:
        del os.environ[FOLDER]
        shutil.rmtree(folder)


def start(
    program: Path, words: Sequence[str], environment: dict[str, str], files: Sequence[int], leads: bool = False
) -> socket.socket:
    """Run a program.

    Args:
        program: its file.
        words: its arguments.
        environment: its variables.
        files: descriptors of its stdin, stdout and stderr.
        leads: it gets a process group of its own, to which its signals are sent, and which ends with it.

    Returns:
        Where to :func:`read` its process identity, and then its exit status. Closed earlier, it kills the program.
    """
    connection = _connect(program, environment)
    request = {"words": [*words], "environment": environment, "folder": os.getcwd(), "leads": leads}
    with open(_NETWORK) as network:
        socket.send_fds(connection, [json.dumps(request).encode()], [*files, network.fileno()])
    return connection


def read(connection: socket.socket) -> int:
    """The next number that a program's process reports."""
    found = connection.recv(4)
    assert len(found) == 4, "the process that forks has ended"
    return int.from_bytes(found, "little", signed=True)


def _connect(program: Path, environment: dict[str, str]) -> socket.socket:
    name = hashlib.sha256(f"{sys.executable} {program}".encode()).hexdigest()[:8]
    address = Path(os.environ[FOLDER]) / name
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with _lock(address).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            command = [sys.executable, "-P", __file__, "--serve", str(program), str(address), " " * 500]  # for titles
            with address.with_suffix(".log").open("w") as log:
                process = subprocess.Popen(
                    command,
                    env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
            assert process.stdout is not None
            assert process.stdout.readline(), address.with_suffix(".log").read_text()
        connection.connect(str(address))
    return connection


def _lock(address: Path) -> Path:
    """A file that whoever starts a program holds, and whoever ends one that was killed."""
    return address.with_suffix(".lock")


def _serve(program: Path, address: Path) -> int:
    """Import a program and fork for each start; in a fork, run it."""
    sys.path[0:0] = [str(program.parent)]
    before = dict(os.environ)
    main: Callable[[list[str]], int | None] = importlib.import_module(program.stem).main
    own = dict(os.environ.items() - before.items())  # variables that the import sets
    gc.collect()
    gc.freeze()  # otherwise the end of a fork touches, and so copies, everything
    starts = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    starts.bind(str(address))
    starts.listen()
    os.write(1, b"ready\n")
    os.dup2(2, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    session = Path("/proc", address.parent.name.split("-")[1])
    while address.exists() and session.exists():
        if not select.select([starts], [], [], 1)[0]:
            continue
        connection = starts.accept()[0]
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 4)
        if message and os.fork() == 0:
            starts.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request = json.loads(message)
            request["environment"] |= own
            return _run(main, request, files, connection, _lock(address))
        for file in files:
            os.close(file)
        connection.close()
    return 0


def _run(
    main: Callable[[list[str]], int | None], request: dict, files: list[int], connection: socket.socket, lock: Path
) -> int:
    """Report the identity and the exit status of a fork, which does what is asked."""
    pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        _mind(pid, request["leads"], connection, lock)
    connection.close()
    if request["leads"]:
        os.setpgid(0, 0)
    *streams, network = files
    if os.fstat(network).st_ino != os.stat(_NETWORK).st_ino:  # the start is on a host of its own
        assert ctypes.CDLL(None).setns(network, 0) == 0
    os.close(network)
    for number, file in enumerate(streams):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[1:1] = filter(None, request["environment"].get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(request["folder"])
    sys.argv[1:] = request["words"]
    return main(request["words"]) or 0


def _mind(pid: int, leads: bool, connection: socket.socket, lock: Path) -> NoReturn:
    """Report a child's identity and exit status, and send it the signals that its start gets."""
    kill = os.killpg if leads else os.kill
    if leads:
        os.setpgid(pid, pid)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # so that the whole group can be waited for
    process = os.pidfd_open(pid)
    with suppress(ConnectionError):
        _write(connection, pid)
    watched: list[int | socket.socket] = [process, connection]
    while process not in (ready := select.select(watched, [], [])[0]):
        assert ready == [connection]
        number = b""
        with suppress(ConnectionResetError):  # it ended before it read everything
            number = connection.recv(1)
        if not number:
            watched.remove(connection)
            fcntl.flock(os.open(lock, os.O_RDONLY), fcntl.LOCK_EX)  # to its end: the next one may need the same port
        with suppress(ProcessLookupError):
            kill(pid, number[0] if number else signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if leads:
        with suppress(ProcessLookupError, ChildProcessError):
            kill(pid, signal.SIGKILL)
            while True:
                os.waitpid(-pid, 0)
    with suppress(ConnectionError):
        _write(connection, status)
    os._exit(0)


def _write(connection: socket.socket, number: int) -> None:
    connection.send(number.to_bytes(4, "little", signed=True))


def main(program: str, *words: str) -> int:
    """Start a program and end as it does."""
    leads = os.getpgrp() == os.getpid()
    connection = start(Path(program), words, dict(os.environ), [0, 1, 2], leads)
    for number in _PASSED_ON:
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    read(connection)
    status = read(connection)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.exit(_serve(Path(sys.argv[2]), Path(sys.argv[3])))
    sys.exit(main(*sys.argv[1:]))
