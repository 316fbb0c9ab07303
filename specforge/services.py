"""The commands that run until they are stopped. On the loopback, unless they are told otherwise."""

from __future__ import annotations

from pathlib import Path

from specforge.host import interrupt_on_sigterm, pick_device
from specforge.target_files import TargetFiles


def serve_target(
    target: str,
    port: int = 8010,
    host: str = "127.0.0.1",
    token_file: Path = Path("runs/target.token"),
    dtype: str = "bfloat16",
    device: str = "auto",
    max_tokens: int = 65536,
) -> None:
    """Serve a target's features over HTTP until SIGTERM or Ctrl-C; nothing is stored.

    Args:
        target: folder or hub name of the target.
        port: to listen on.
        host: address to listen on; others than the loopback are reached from other hosts, by whoever has the token.
        token_file: holds the token that requests must carry; made if it does not exist.
        dtype: compute dtype, and that of the features.
        device: cpu, cuda, ... or auto.
        max_tokens: most tokens of a request, padding included.
    """
    from specforge.inference.target_engine import HFTargetEngine
    from specforge.inference.target_server import TargetServer, make_token

    files = TargetFiles.find(target)
    token = make_token(token_file)
    engine = HFTargetEngine(files, dtype, pick_device(device))
    interrupt_on_sigterm()
    with TargetServer(engine, files, token, host, port, max_tokens=max_tokens) as server:
        print(
            f"{server.url}: features of {files.name} ({files.fingerprint[:8]}) in {dtype}; token in {token_file}\n"
            f"train on them: specforge fit --config eagle3-online-smollm2.yaml --data.server {server.url} "
            f"--data.token_file {token_file}",
            flush=True,
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)
