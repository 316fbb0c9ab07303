"""Time, losses and collectives of the steps of `specforge fit`: the callback of `benchmarks.several_gpus`.

Collectives are counted in the trace of torch.profiler. There, DDP's and FSDP2's are operators of `c10d` with the shapes
of their tensors, whatever the backend, and the trace does not change how a step is computed.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.large import synchronize

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
}
FEW = 1024  # collectives of fewer elements are counts, norms and flags, not weights or gradients
SIZES = {
    **dict.fromkeys(("float", "Float", "int", "Int"), 4),
    **dict.fromkeys(("c10::BFloat16", "BFloat16", "c10::Half", "Half"), 2),
    **dict.fromkeys(("double", "Double", "long int", "long", "Long"), 8),
    **dict.fromkeys(("unsigned char", "signed char", "Byte", "Char", "bool", "Bool"), 1),
}


def elements(dims: Iterable[Any]) -> int:
    """Number of elements of an operator's largest argument; a list of tensors is one argument."""
    found = [0]
    for x in dims:
        if x:
            found.append(sum(math.prod(shape) for shape in x) if isinstance(x[0], list) else math.prod(x))
    return max(found)


def count(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int | None]]:
    """The collectives in a trace.

    Args:
        events: ``traceEvents`` of a trace with shapes.

    Returns:
        By kind, with one more kind for collectives of few elements: ``count``, ``elements`` (of the whole tensors) and
        ``bytes``; None where the trace does not say of what type they are.
    """
    operators: list[tuple[str, int, int | None]] = []
    sizes: dict[int, int] = {}  # bytes of an element, by the number of elements, as the backends say
    for event in events:
        name, args = event.get("name", ""), event.get("args", {})
        dims, types = args.get("Input Dims", []), [x for x in args.get("Input type", []) if x]
        known = next((SIZES[x] for x in types if x in SIZES), None)
        if name.startswith("c10d::"):
            kind = KINDS.get(name.removeprefix("c10d::"), name.removeprefix("c10d::").strip("_"))
            operators.append((kind, elements(dims), known))
        elif name.startswith("gloo:") and known:
            sizes[elements(dims)] = known
        elif name == "record_param_comms" and args.get("dtype") in SIZES:
            sizes[int(args.get("In msg nelems", 0))] = SIZES[args["dtype"]]
    found: dict[str, dict[str, int | None]] = {}
    for kind, number, known in operators:
        row = found.setdefault(kind if number >= FEW else "small", {"count": 0, "elements": 0, "bytes": 0})
        size = known or sizes.get(number)
        row["count"] = (row["count"] or 0) + 1
        row["elements"] = (row["elements"] or 0) + number
        row["bytes"] = None if size is None or row["bytes"] is None else row["bytes"] + size * number
    return found


class RankSteps(pl.Callback):
    """Writes the time per optimizer step, the loss of each step over all ranks, and the collectives of one step.

    Args:
        path: JSON file.
        warmup: optimizer steps that are not timed.
        timed: optimizer steps that are timed, without waiting for the device between them. The next one is counted.
    """

    def __init__(self, path: str, warmup: int, timed: int) -> None:
        self.path, self.warmup, self.timed = Path(path), warmup, timed
        self._sums: list[torch.Tensor] = []
        self._step = self._tokens = self._read = 0
        self._start = self._seconds = 0.0
        self._profile: Any = None
        self._collectives: dict[str, dict[str, int | None]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the sums of the losses, and start or stop the clock and the trace after a step."""
        output = outputs["output"]
        self._sums.append(torch.stack([output.losses.sum().double(), output.rows.sum().double()]))
        self._tokens += sum(batch.lengths)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step == self.warmup:
            synchronize()
            self._tokens, self._start = 0, time.perf_counter()
        elif self._step == self.warmup + self.timed:
            synchronize()
            self._seconds, self._read = time.perf_counter() - self._start, self._tokens
            if trainer.is_global_zero:
                activities = [torch.profiler.ProfilerActivity.CPU]
                self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
                self._profile.start()
        elif self._profile is not None:
            self._collectives = self._stop_profile()

    def _stop_profile(self) -> dict[str, dict[str, int | None]]:
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            self._profile = None
            return count(json.loads(path.read_text())["traceEvents"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write."""
        sums = torch.stack(self._sums).view(-1, trainer.accumulate_grad_batches, 2).sum(1)
        losses, rows = trainer.strategy.reduce(sums, reduce_op="sum").T
        tokens = trainer.strategy.reduce(torch.tensor(self._read, device=pl_module.device), reduce_op="sum")
        result = {
            "step_ms": 1000 * self._seconds / self.timed,
            "tokens_per_second": int(tokens) / self._seconds,
            "peak_gib": 0.0 if not torch.cuda.is_available() else torch.cuda.max_memory_allocated() / 2**30,
            "parameters": sum(p.numel() for p in pl_module.draft.parameters() if p.requires_grad),
            "losses": (losses / rows).tolist(),
            "collectives": self._collectives,
        }
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(result))
