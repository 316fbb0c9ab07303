"""Running SGLang's server so that it captures hidden states; its plugin is in `sglang_plugin.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specforge.contracts import CapturePolicy
from specforge.errors import UserError
from specforge.inference.engine_server import EngineServer
from specforge.inference.sglang_plugin import write_distribution
from specforge.inference.target_files import TargetFiles

_MAX_BYTES = 1 << 30  # features that may wait in the server's memory until the store has taken them


def capture_arguments(layers: Sequence[int]) -> list[str]:
    """The arguments that make SGLang's server capture the outputs of layers, and the last hidden states."""
    return [
        "--enable-return-aux-hidden-states",
        "--speculative-algorithm",  # names a convention for layers here; nothing is drafted
        "EAGLE3",
        "--return-aux-hidden-state-layer-ids",
        *map(str, sorted(layers)),
        "--disable-radix-cache",
        "--sleep-on-idle",  # else its loop spins, and the thread that writes features waits for the interpreter's lock
    ]


class SGLangServer(EngineServer):
    """An SGLang server of its own."""

    title, needs = "SGLang", ("sglang", "xxhash")
    launch = ("-m", "sglang.launch_server")

    def _arguments(self, target: TargetFiles, dtype: str, policy: CapturePolicy) -> list[str]:
        last = target.num_layers - 1
        if last in policy.layer_ids:
            raise UserError(
                f"layer {last}: SGLang captures the output of every layer but the last; choose others, or --engine vllm"
            )
        layers = policy.layer_ids or (0,)  # it captures the last hidden states beside those of some layer only
        return ["--model-path", str(target.folder.resolve()), "--dtype", dtype, *capture_arguments(layers)]

    def _fill_path(self, path: Path) -> None:
        write_distribution(path, self.store, _MAX_BYTES)
