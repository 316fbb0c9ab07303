"""Real Redis servers for tests: on the loopback, with a password or with TLS, nothing on disk unless they are told."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "secret"


class RedisServer:
    """A server that can be killed and started again, on its port and over its folder."""

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.tls = tls
        listen = ["--port", "0", "--tls-port", str(self.port)] if tls else ["--port", str(self.port)]
        self.command = ["redis-server", "--bind", "127.0.0.1", "--save", "", "--dir", str(folder), *listen, *options]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    if self.tls:
                        return
                    probe.sendall(b"PING\r\n")
                    if not probe.recv(64).startswith(b"-LOADING"):
                        return
            assert self.process.poll() is None, "redis-server ended"
            time.sleep(0.01)  # there is nothing to wait on but the port

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def redis_server(folder: Path, *options: str, tls: bool = False) -> Iterator[int]:
    """Run a server; gives its port."""
    server = RedisServer(folder, *options, tls=tls)
    try:
        yield server.port
    finally:
        server.kill()


def make_certificates(folder: Path) -> dict[str, str]:
    """A certificate authority, and a certificate for the loopback that it signed."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ["req", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    openssl(*new, "-x509", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    openssl(*new, "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    openssl(
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        "names",
        "-out",
        "server.pem",
    )
    return {name: str(folder / name) for name in ("ca.pem", "server.pem", "server.key")}
