"""Workers of Ray in processes forked from one that has imported what they need: imports take longer than a tiny run.

A node that has this file as its `worker_path` starts it for each worker; what is forked runs Ray's own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESS = "SPECFORGE_TEST_WORKERS"  # variable of the environment
_SERVE = "import sys; from tests.ray_workers import serve; serve(sys.argv[1])"


@contextmanager
def forked_workers(address: Path) -> Iterator[None]:
    """While nodes may start this file.

    Args:
        address: where the socket for requests is made, and beside it a file for each worker, with its environment.
    """
    command = [sys.executable, "-P", "-c", _SERVE, str(address), " " * 500]  # room for titles
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        os.environ[ADDRESS] = str(address)
        yield
        del os.environ[ADDRESS]
        process.stdin.close()


def serve(address: str) -> None:
    """Fork for each request until the process that started this one ends or closes its pipe."""
    import pandas  # noqa: F401 - for ray.train; Ray itself reads its environment when it is imported
    from transformers import LlamaForCausalLM  # noqa: F401

    import specforge.cli.fit
    import specforge.inference.producer  # noqa: F401

    gc.collect()
    gc.freeze()  # otherwise the end of a fork touches, and so copies, everything
    requests = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    requests.bind(address)
    requests.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"ready\n")
    while requests in select.select([0, requests], [], [])[0]:
        with requests.accept()[0] as asking:
            message, files, _, _ = socket.recv_fds(asking, 1 << 20, 4)
            if os.fork() == 0:
                requests.close()
                asking.close()
                return _work(Path(address), json.loads(message), files)
            for file in files:
                os.close(file)


def _work(address: Path, request: dict, files: list[int]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, network = files
    for number, file in enumerate(streams):
        os.dup2(file, number)
        os.close(file)
    if os.fstat(network).st_ino != os.stat("/proc/self/ns/net").st_ino:  # the node is on a host of its own
        assert ctypes.CDLL(None).setns(network, 0) == 0
    os.close(network)
    address.with_name(str(os.getpid())).write_text(json.dumps(request["environment"]))
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv[1:] = request["words"]
    runpy.run_module("ray._private.workers.default_worker", run_name="__main__", alter_sys=True)


def environment_of(worker: int) -> dict[str, str]:
    """The environment with which a process was started as a worker of Ray; OSError if it is none of these."""
    return json.loads(Path(os.environ[ADDRESS]).with_name(str(worker)).read_text())


if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.connect(os.environ[ADDRESS])
        request = {"words": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
        with open("/proc/self/ns/net") as network:
            socket.send_fds(asking, [json.dumps(request).encode()], [0, 1, 2, network.fileno()])
        asking.recv(1)  # until it has forked
