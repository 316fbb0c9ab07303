"""`--trainer.strategy fsdp2`: pure FSDP2, gradients reduced once per optimizer step.

Lightning's ModelParallelStrategy never skips the reduction under accumulation, and its ``auto`` sizes mean
tensor parallelism inside a node; a draft needs neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.fsdp import FSDPModule


class FSDP2Strategy(ModelParallelStrategy):
    """Every device shards the draft and its optimizer state; checkpoints are single, whole files."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """All devices are data parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients local until the window's last micro-step."""
        assert self.model is not None
        shards = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        for shard in shards:
            shard.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for shard in shards:
                shard.set_requires_gradient_sync(True, recurse=False)


def register_strategies() -> None:
    """Make ``fsdp2`` known to Lightning."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register(
            "fsdp2", FSDP2Strategy, description="FSDP2, one reduction per optimizer step"
        )
