"""`--trainer.strategy fsdp2`: pure FSDP2, gradients reduced once per optimizer step; and context parallelism.

Lightning's ModelParallelStrategy reduces in every micro-step of an accumulated step, its ``auto`` sizes mean tensor
parallelism within a node, which a draft does not need, and it wants a tied tensor once per name in a checkpoint.

With ``context_size`` C, each C consecutive ranks train on the same batches, of which each computes a part
(:mod:`specforge.modeling.draft.context_parallel`). Weights and gradients are handled as without it: over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, OptimStateKeyType
from torch.nn.parallel import DistributedDataParallel

from specforge.callbacks.lightning_internals import DataParallelStrategy
from specforge.checkpoints import read_checkpoint
from specforge.errors import UserError
from specforge.options import PositiveInt


class ContextParallel(ParallelStrategy):
    """Mixin of strategies in which some ranks share their batches.

    Attributes:
        context_size: ranks that share a batch; 0 for all ranks.
        context_group: their process group; None if each rank has its own batches.
    """

    context_group: torch.distributed.ProcessGroup | None = None

    def __init__(self, context_size: PositiveInt | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.context_size = context_size or 0

    def setup_environment(self) -> None:
        """Form the groups.

        Raises:
            UserError: the ranks cannot be divided into such groups.
        """
        super().setup_environment()
        self.context_size = self.context_size or self.world_size
        if self.world_size % self.context_size:
            raise UserError(
                f"trainer.strategy.context_size is {self.context_size}, which does not divide the number of ranks, "
                f"{self.world_size}"
            )
        if self.context_size > 1:
            # Never the group of all ranks: its collectives have an order of their own on each rank.
            self.context_group, _ = torch.distributed.new_subgroups(self.context_size)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The share of the data that this rank reads, the same for all ranks of its group."""
        size = self.context_size
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}


class ContextDDPStrategy(ContextParallel, DDPStrategy):
    """``ddp`` in which ranks share batches.

    Args:
        context_size: ranks that share a batch; divides the number of ranks. By default all.
        **kwargs: options of DDPStrategy.
    """


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


class ContextFSDP2Strategy(ContextParallel, FSDP2Strategy):
    """``fsdp2`` in which ranks share batches.

    Args:
        context_size: ranks that share a batch; divides the number of ranks. By default all.
        **kwargs: options of ModelParallelStrategy.
    """


def data_shards(trainer: pl.Trainer) -> int:
    """Number of ranks, or groups of ranks, that read different batches."""
    strategy = trainer.strategy
    return int(strategy.distributed_sampler_kwargs["num_replicas"]) if isinstance(strategy, ParallelStrategy) else 1


def settle_buckets(model: object) -> None:
    """Make DDP choose the layout of its gradient buckets before the first step, the same in every run.

    DDP lays its buckets out anew after the first backward pass, in the order in which the gradients arrived. Where a
    gradient lies decides in which order more than two ranks add it, so a resumed run's first step would differ from the
    undisturbed run's in its last bits. Here that pass has a zero loss whose gradients arrive in the reverse order of
    the parameters.
    """
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters or model.static_graph:
        return
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    loss = sum((p.sum() * 0.0 for p in parameters), torch.zeros((), device=parameters[0].device))
    prepare_for_backward(model, loss)
    loss.backward()  # type: ignore[no-untyped-call]
    for p in parameters:
        p.grad = None


def register_strategies() -> None:
    """Register ``fsdp2`` with Lightning, and the classes without options under their names."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 with one reduction per optimizer step")
        for cls in (ContextDDPStrategy, ContextFSDP2Strategy):
            StrategyRegistry.register(cls.__name__.lower(), cls, description="all ranks share their batches")
