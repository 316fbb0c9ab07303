"""`specforge target serve` and `store up`: services that run until they are stopped, on the loopback by default."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from specforge.console import say
from specforge.contracts import CapturePolicy
from specforge.errors import UserError
from specforge.inference.target_engine import (
    Engine,
    HFTargetEngine,
    TargetEngine,
    engine_class,
    engine_config,
    engine_summary,
    on_device,
)
from specforge.inference.target_files import TargetFiles
from specforge.options import Dtype, NonNegativeInt, Port, PositiveFloat, PositiveInt
from specforge.packages import install_hint
from specforge.system import check_free, end_with_parent, interrupt_on_sigterm


def serve_target(
    target: str,
    port: Port = 8010,
    host: str = "127.0.0.1",
    token_file: Path = Path("runs/target.token"),
    dtype: Dtype = "bfloat16",
    device: str = "auto",
    engine: Engine = HFTargetEngine,
    max_tokens: PositiveInt = 65536,
    algorithm: str | None = None,
    layer_ids: list[NonNegativeInt] | None = None,
    plan: bool = False,
    device_memory: PositiveFloat | None = None,
) -> None:
    """Serve a target's features over HTTP until SIGTERM or Ctrl-C; nothing is stored.

    Args:
        target: folder or hub name of the target.
        port: port to listen on.
        host: address to listen on; any non-loopback address is reachable from other hosts (token required).
        token_file: file with the token that requests must carry; created if it does not exist.
        dtype: compute dtype, and dtype of the features; auto for that of the target's files.
        device: cpu, cuda, cuda:N or auto, for an engine in this process.
        engine: what runs the target: hf (transformers, in this process), vllm, sglang, http (another `target serve`),
            or the class path of your own; its options are --engine.NAME (see --engine.help hf).
        max_tokens: maximum number of tokens of a request, padding included.
        algorithm: with an engine that captures fixed layers (vllm, sglang): the algorithm that needs them (default:
            eagle3).
        layer_ids: with such an engine: decoder layers to capture instead of the algorithm's default.
        plan: print estimates of memory and bandwidth, which need no weights but config.json only, and start nothing.
        device_memory: for the plan: memory of one GPU in GB.
    """
    from specforge.inference.target_server import TargetServer, make_token

    if plan:
        _say_plan(TargetFiles.find(target), dtype, engine, algorithm, layer_ids, device_memory)
        return
    open_engine, files = on_device(engine, device), TargetFiles.find(target)
    check_free(host, port, "--port")
    policy = _policy(files, algorithm, layer_ids) if engine_class(engine).independent else None
    token = make_token(token_file)
    interrupt_on_sigterm()
    with (
        open_engine(files, dtype) as running,
        TargetServer(running, files, token, host, port, max_tokens=max_tokens) as server,
    ):
        if policy is not None:
            running.check(policy)
        _announce(server.url, running, token_file, policy)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopping", flush=True)  # a server of its own writes what it has captured
    print("stopped", flush=True)


def _announce(url: str, engine: TargetEngine, token_file: Path, policy: CapturePolicy | None) -> None:
    """Print where the features are, and how to train on them."""
    target, captured = engine.target, "" if policy is None else f", {_captured(policy)}"
    options = shlex.join(["--data.server", url, "--data.token_file", str(token_file)])
    print(
        f"{url}: features of {target.name} ({target.fingerprint[:8]}) in {engine.dtype}{captured}; token in "
        f"{token_file}\n"
        f"train on them: specforge fit ... {options}",
        flush=True,
    )
    if engine.options:
        print(f"or directly, on a host that shares the store: specforge fit ... {engine.options}", flush=True)


def _say_plan(
    files: TargetFiles,
    dtype: str,
    engine: Engine,
    algorithm: str | None,
    layer_ids: list[int] | None,
    device_memory: float | None,
) -> None:
    """Print what serving a target and capturing its states takes."""
    from specforge.inference.sizing import estimate

    policy = _policy(files, algorithm, layer_ids)
    devices = int(engine_config(engine)["init_args"].get("tensor_parallel") or 1)
    sizes = estimate(files, policy, dtype=files.compute_dtype(dtype), devices=devices)
    say(f"{files.name} by {engine_summary(engine)}, capturing {_captured(policy)}")
    say("\n".join(sizes.lines(None if device_memory is None else device_memory * 1e9)))


def _captured(policy: CapturePolicy) -> str:
    return f"layers {list(policy.layer_ids)}" + " and the last hidden states" * policy.last_hidden_states


def _policy(files: TargetFiles, algorithm: str | None, layer_ids: list[int] | None) -> CapturePolicy:
    """What an algorithm captures."""
    from lightning_modules.loading import find_algorithm

    return find_algorithm(algorithm or "eagle3").capture_policy(files, layer_ids)


@contextmanager
def mooncake_master(host: str, port: int, metrics_port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A Mooncake master that evicts nothing; it is terminated at the end of the block, or with this process.

    Args:
        host: address to listen on.
        port: RPC port.
        metrics_port: HTTP port.

    Raises:
        UserError: Mooncake is not installed, a port is in use, or the master exits at once.
    """
    from importlib.util import find_spec

    spec = find_spec("mooncake")
    if spec is None or spec.origin is None:
        raise UserError(f"store: Mooncake is not installed: {install_hint('mooncake')}")
    check_free(host, port, "--port")
    check_free(host, metrics_port, "--metrics_port")
    command = [
        str(Path(spec.origin).with_name("mooncake_master")),
        f"--rpc_address={host}",
        f"--rpc_port={port}",
        f"--metrics_host={host}",
        f"--metrics_port={metrics_port}",
        "--default_kv_lease_ttl=60s",
        "--eviction_high_watermark_ratio=1.0",
        "--eviction_ratio=0",
        "--client_ttl=10",
        "--put_start_discard_timeout_sec=30",
        "--put_start_release_timeout_sec=60",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=end_with_parent(os.getpid())
    )
    try:
        for _ in range(1000):
            with socket.socket() as probe:
                if probe.connect_ex((host, port)) == 0:
                    break
            if process.poll() is not None:
                raise UserError(f"{command[0]}: exited with status {process.returncode}; run it by hand to see why")
            time.sleep(0.01)  # the master reports nothing; only its port shows that it is up
        yield process
    finally:
        process.terminate()
        process.wait()


def store_up(
    size: PositiveInt = 4 << 30,
    host: str = "127.0.0.1",
    port: Port = 50051,
    metrics_port: Port = 9003,
    protocol: Literal["tcp", "rdma"] = "tcp",
    devices: str = "",
) -> None:
    """Run a Mooncake store in this host's memory until SIGTERM or Ctrl-C; its content is lost when it stops.

    Args:
        size: bytes of memory for features.
        host: address that the master listens on; any non-loopback address is open to the network.
        port: port of the master.
        metrics_port: HTTP port of the master, which lists the stored objects.
        protocol: tcp or rdma.
        devices: RDMA devices, separated by commas (default: all).
    """
    from specforge.runtime.data_plane.mooncake import MooncakeAddress, connect

    address = MooncakeAddress(host, port, metrics_port, protocol, devices)
    interrupt_on_sigterm()
    with mooncake_master(host, port, metrics_port) as master:
        owner = connect(address, size)
        try:
            interrupt_on_sigterm()  # again: Mooncake installs handlers of its own
            quoted = shlex.quote(str(address))
            print(
                f"{address}: {size / 2**30:.1f} GiB; use it with `specforge fit --data.store {quoted}` and "
                f"`specforge produce --store {quoted}`\n"
                "Mooncake has no authentication, and its clients listen on all addresses: use a trusted network",
                flush=True,
            )
            raise UserError(f"{address}: the master exited with status {_wait(master)}")
        except KeyboardInterrupt:
            print("stopped", flush=True)
        finally:
            owner.close()


def _wait(process: subprocess.Popen[bytes]) -> int:
    while True:  # Python handles a signal that one of Mooncake's threads received only between two system calls
        try:
            return process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
