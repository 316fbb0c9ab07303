"""`--trainer.strategy fsdp2`: pure FSDP2, gradients reduced once per optimizer step.

Lightning's ModelParallelStrategy reduces in every micro-step of an accumulated step, its ``auto`` sizes mean tensor
parallelism within a node, which a draft does not need, and it wants a tied tensor once per name in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, OptimStateKeyType

from specforge.callbacks.lightning_internals import DataParallelStrategy
from specforge.checkpoints import read_checkpoint


class FSDP2Strategy(DataParallelStrategy):
    """Shards the draft and its optimizer state over all devices; a checkpoint is one file."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

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

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load this rank's shards from the one file.

        Raises:
            UserError: the file cannot be read, or belongs to another algorithm, draft or target.
        """
        assert self.model is not None
        assert self.lightning_module is not None
        checkpoint = read_checkpoint(Path(self.broadcast(checkpoint_path)))
        self.lightning_module.on_load_checkpoint(checkpoint)  # rejects what does not fit before anything is loaded
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=whole)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            named = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, self.model)
            set_optimizer_state_dict(self.model, optimizer, named, options=whole)
        return checkpoint


def register_strategies() -> None:
    """Register ``fsdp2`` with Lightning."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 with one reduction per optimizer step")
