"""Base of all draft algorithms: the frozen target, loss normalisation, optimizer, validation, checkpoints.

Each algorithm is a subclass in a file of its own. It declares the features it reads (``spec``), computes the loss of a
batch (:meth:`DraftModule.training_loss`) and the drafted chains of a held-out batch
(:meth:`DraftModule.validation_chains`), and provides evaluation with logits (:meth:`DraftModule.draft_logits`) and a
drafter (:meth:`DraftModule.drafter`). No other file names an algorithm.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_modules.optimizers import OptimizerOptions, build_optimizer
from specforge.contracts import CapturePolicy, Sample, StrategySpec, TrainBatch, TrainingData
from specforge.data.vocabulary import coverage, draft_vocabulary
from specforge.decoding.drafters import Drafter
from specforge.errors import UserError
from specforge.fusion import allow_fusion
from specforge.inference.target_engine.base import check_layers
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.modeling.draft import Draft, build_draft, config_fields, draft_class
from specforge.modeling.draft.fields import quoted
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.starting import CHECKPOINT_KEY, CONFIG_VERSION, saved_config
from specforge.modeling.layers.fp8 import check_fp8
from specforge.options import PositiveInt


class StepOutput(NamedTuple):
    """Training loss of one batch.

    Attributes:
        loss: scalar, the *sum* over the batch's rows, with its gradient.
        num_supervised: supervised tokens, by whose number in the optimizer window the sum is divided.
        losses: ``[T]`` sum of the unweighted losses of each drafted position.
        hits: ``[T]`` int64, rows of each position whose most likely token is the label.
        rows: ``[T]`` int64, rows of each position, dropped rows included.
    """

    loss: Tensor
    num_supervised: int
    losses: Tensor
    hits: Tensor
    rows: Tensor


class ValidationOutput(NamedTuple):
    """Validation of one held-out batch.

    Attributes:
        loss: scalar, sum of the unweighted losses of the first drafted position, labels from the data.
        num_supervised: tokens that the sum is over.
        chains: per supervised span, ``[starts, T]`` bool: whether the k-th token drafted from each start is correct.
    """

    loss: Tensor
    num_supervised: int
    chains: tuple[np.ndarray, ...]


class LogitTile(NamedTuple):
    """Draft logits of some labels, for evaluation.

    Attributes:
        labels: ``[C]`` flat index of the token that the rows predict.
        logits: ``[C, T, D]`` fp32, logits over the draft vocabulary at each drafted position.
        target_hidden: ``[C, H]`` the target's last hidden state that predicts the label.
    """

    labels: Tensor
    logits: Tensor
    target_hidden: Tensor


class DraftModule(pl.LightningModule):
    """Trains one draft against one frozen target.

    Args:
        target: the target's files.
        draft: the draft network.
        spec: features that the algorithm reads.
        has_vocabulary: whether the draft comes with its vocabulary; if not, it is chosen from the training data.
        gamma: tokens drafted per round in validation.
        checkpoint_activations: what training computes again instead of keeping it in memory: ``none``, ``mlp`` (the
            widest activations, of the MLP), or ``layer`` (everything inside a layer).
        fuse: whether element-wise work is compiled to fused kernels on GPUs.
        fp8: whether training multiplies by the layers' matrices in fp8 (Ada, Hopper and newer GPUs).
        optimizer: optimizer and learning-rate schedule.

    Attributes:
        algorithm: name in tables, files and checkpoints.
        architectures: ``architectures`` in the config of this algorithm's drafts.
        export_format: layout of exported drafts.
        reads_layers: whether the draft can read captured layers besides the last hidden state.
        shares_batches: whether several ranks can share the rows of a batch (context parallelism).
        context_group: the ranks that share the batches of this one; None if each has its own.
    """

    algorithm: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    export_format: ClassVar[DraftFormat]
    reads_layers: ClassVar[bool] = True
    shares_batches: ClassVar[bool] = False
    context_group: ProcessGroup | None = None

    def __init__(
        self,
        target: TargetFiles,
        draft: Draft,
        spec: StrategySpec,
        *,
        has_vocabulary: bool,
        gamma: PositiveInt = 4,
        checkpoint_activations: Literal["none", "mlp", "layer"] = "mlp",
        fuse: bool = True,
        fp8: bool = False,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 - jsonargparse shows the defaults
    ) -> None:
        super().__init__()
        self.target, self.draft, self.spec = target, draft, spec
        self.optimizer_options, self.gamma = optimizer, gamma
        draft.checkpoint_activations(checkpoint_activations)
        if fp8:
            draft.multiply_in_fp8()
        self.fuse = fuse
        self._has_vocabulary = has_vocabulary or draft.d2t.shape == draft.t2d.shape
        self._head: TargetHead | None = None
        self._window_supervised = 0
        self.grad_norm: Tensor | None = None

    @classmethod
    def build(cls, config: Mapping[str, Any], where: str) -> Any:
        """Randomly initialised network of a draft config.

        Raises:
            UserError: the config belongs to another algorithm, or a field is rejected.
        """
        architecture = draft_class(config, where).architecture
        if architecture not in cls.architectures:
            raise UserError(f"{where}: {architecture} is not a draft of {cls.algorithm}")
        return build_draft(config, where)

    # Defined by each algorithm.

    @classmethod
    def default_layers(cls, num_layers: int) -> list[int]:
        """Layers captured by default, for a target of ``num_layers`` layers."""
        return []

    @classmethod
    def capture_policy(cls, target: TargetFiles, layer_ids: list[int] | None = None) -> CapturePolicy:
        """Features to capture: the given layers or the default ones, and the last hidden state.

        Raises:
            UserError: the target has no such layer, or the algorithm reads no captured layers.
        """
        if layer_ids and not cls.reads_layers:
            raise UserError(f"layers {layer_ids}: {cls.algorithm} reads only the last hidden state")
        policy = CapturePolicy(tuple(layer_ids or cls.default_layers(target.num_layers)))
        check_layers(policy, target.num_layers, target.name)
        return policy

    @abstractmethod
    def training_plan(self, batch: TrainBatch) -> Any:
        """Index tensors of a training batch, on the CPU; called in the thread that fetches the batch.

        Its ``to(device)`` moves it. It may depend on the epoch and the sample ids, but on no earlier batch, so that a
        resumed run makes the same plan.
        """

    @abstractmethod
    def training_loss(self, batch: TrainBatch, head: TargetHead) -> StepOutput:
        """Loss of a batch under its plan."""

    @abstractmethod
    def validation_chains(self, batch: TrainBatch, head: TargetHead, positions: int) -> ValidationOutput:
        """Chains of ``positions`` drafted tokens from every token of the answers, compared with the data."""

    @abstractmethod
    def draft_logits(self, batch: TrainBatch, head: TargetHead, positions: int) -> Iterator[LogitTile]:
        """Logits of every supervised token at all ``positions``, some labels at a time."""

    @abstractmethod
    def drafter(self, head: TargetHead, dtype: torch.dtype) -> Drafter:
        """A drafter that decodes with the current weights."""

    # The frozen target.

    def target_head(self, device: torch.device) -> TargetHead:
        """Embedding and lm_head of the target on ``device``; read from disk on first use."""
        if self._head is None:
            self._head = TargetHead.load(self.target, self.head_dtype)
        if self._head.embedding.device != device:
            self._head.to(device)
        return self._head

    @property
    def head_dtype(self) -> torch.dtype:
        """bf16 under a bf16 precision, else fp32."""
        try:
            trainer = self.trainer
        except RuntimeError:  # not attached to a trainer
            return torch.float32
        return torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32

    # Training.

    def configure_model(self) -> None:
        """Shard the draft if the strategy has a device mesh (``fsdp2``)."""
        mesh = self.device_mesh
        if mesh is None or isinstance(self.draft, FSDPModule):
            return
        # The draft is one layer and a head, so a single FSDP group, gathered once per micro-batch, suffices.
        fully_shard(self.draft, mesh=mesh["data_parallel"], reshard_after_forward=False)

    def setup(self, stage: str) -> None:
        """Check the data against the target, and choose the draft vocabulary of a new run.

        Raises:
            UserError: the features come from another target, the token counts from another vocabulary, the algorithm
                does not support context parallelism, or the device or precision does not support fp8.
        """
        allow_fusion(self.fuse)
        if self.draft.fp8 and stage == "fit":
            check_fp8(self.trainer.strategy.root_device, str(self.trainer.precision))
        self.context_group = getattr(self.trainer.strategy, "context_group", None)
        if self.context_group is not None and not self.shares_batches:
            raise UserError(
                f"trainer.strategy: {self.algorithm} does not support context parallelism; use ddp or fsdp2"
            )
        for ref in self.training_samples()[:1]:
            if ref.provenance.target_fingerprint != self.target.fingerprint:
                raise UserError(
                    f"features were captured from {ref.provenance.target} "
                    f"({ref.provenance.target_fingerprint[:8]}), but model.target is {self.target.name} "
                    f"({self.target.fingerprint[:8]})"
                )
        counts = self.data.token_counts() if self.data is not None else None
        if self._has_vocabulary or counts is None or stage != "fit":
            return
        if not counts.supervised.shape == counts.context.shape == self.draft.t2d.shape:
            raise UserError(
                f"the data has a vocabulary of {len(counts.supervised)} tokens, but {self.target.name} has "
                f"{len(self.draft.t2d)}; prepare and capture again"
            )
        ids = draft_vocabulary(counts, len(self.draft.d2t))
        self.draft.set_vocabulary(ids)
        self._has_vocabulary = True
        pl.utilities.rank_zero_info(
            f"draft vocabulary: {len(ids)} of {len(self.draft.t2d)} tokens, {coverage(counts, ids):.1%} of the answers"
        )

    @property
    def data(self) -> TrainingData | None:
        """The datamodule of the run; None for a run on bare loaders."""
        data: TrainingData | None = self.trainer.datamodule
        return data

    def training_samples(self) -> Sequence[Sample]:
        """The samples to train on; none in a run on bare loaders."""
        return self.data.sample_refs() if self.data is not None else ()

    def batch_plan(self, batch: TrainBatch) -> Any:
        """The batch's training plan on the batch's device; made here if the loader has not."""
        return batch.plan if batch.plan is not None else self.training_plan(batch).to(batch.input_ids.device)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> dict[str, Any]:
        """Sum of the batch's losses; :meth:`configure_gradient_clipping` divides it by the window's tokens."""
        output = self.training_loss(batch, self.target_head(batch.input_ids.device))
        self._window_supervised += output.num_supervised
        return {"loss": output.loss, "output": output._replace(loss=output.loss.detach())}

    def validation_step(self, batch: TrainBatch, batch_idx: int) -> ValidationOutput:
        """Drafted chains of held-out documents; an empty batch runs too, because a sharded draft needs all ranks."""
        return self.validation_chains(batch, self.target_head(batch.input_ids.device), self.gamma)

    def empty_output(self, positions: int, states: Tensor) -> StepOutput:
        """Output of a batch without supervised rows: a zero loss with the draft's parameters in its graph.

        A rank that has run out of data must take part in the gradient reductions of the others.

        Args:
            positions: T.
            states: the draft's states of the batch.
        """
        loss = sum((p.sum() * 0.0 for p in self.draft.parameters() if p.requires_grad), states.sum() * 0.0)
        zeros = torch.zeros(positions, device=self.device)
        return StepOutput(torch.as_tensor(loss), 0, zeros, zeros.long(), zeros.long())

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Normalise the summed gradients by the window's supervised tokens, and clip them."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        by_value = gradient_clip_algorithm == "value"
        self.grad_norm = normalise_and_clip(
            parameters,
            self._loss_scale(),
            None if by_value else gradient_clip_val,
            gradient_clip_val if by_value else None,
        )

    def _loss_scale(self) -> Tensor:
        """Factor from the accumulated gradients to those of the mean over the optimizer window and all ranks.

        Lightning has divided by ``accumulate_grad_batches`` and the strategy by the number of ranks. Both divisions are
        undone, and the sum is divided by the supervised tokens.
        """
        count = torch.tensor(float(self._window_supervised), device=self.device)
        self._window_supervised = 0
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(count)
        return self.trainer.accumulate_grad_batches * self.trainer.world_size / count.clamp(min=1.0)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer, and a schedule that advances per optimizer step."""
        optimizer, schedule = build_optimizer(self.optimizer_options, self.draft, self._total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _total_steps(self) -> int:
        # Not trainer.estimated_stepping_batches: it rebuilds the loader, which then loses its resumed position.
        limits = []
        if self.trainer.max_steps > 0:
            limits.append(self.trainer.max_steps)
        if self.trainer.max_epochs is not None and self.trainer.max_epochs > 0:
            if self.data is None:
                raise UserError("trainer: set max_steps; without a datamodule the length of an epoch is unknown")
            batches = self.data.batches_per_epoch()
            limit = self.trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            limits.append(self.trainer.max_epochs * -(-batches // self.trainer.accumulate_grad_batches))
        if not limits:
            raise UserError("trainer: set max_steps or max_epochs; the schedule needs the length of the run")
        return max(1, min(limits))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy without blocking; the loader pins memory where that helps."""
        return batch.to(device, non_blocking=True) if isinstance(batch, TrainBatch) else batch

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description of the draft, so that evaluation and export need only the checkpoint."""
        checkpoint[CHECKPOINT_KEY] = {
            "algorithm": self.algorithm,
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            "draft_config": config_fields(self.draft),
            "config_version": CONFIG_VERSION,
            "target": self.target.name,
            "target_fingerprint": self.target.fingerprint,
            "spec": self.spec.to_json(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject a checkpoint of another algorithm, network or target.

        Raises:
            UserError: names the difference.
        """
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None:
            raise UserError("the checkpoint was not written by SpecForge")
        if saved["algorithm"] != self.algorithm:
            raise UserError(f"the checkpoint is of {saved['algorithm']}, but the model is {self.algorithm}")
        if saved["target_fingerprint"] != self.target.fingerprint:
            raise UserError(
                f"the checkpoint was trained on {saved['target']} ({saved['target_fingerprint'][:8]}), but "
                f"model.target is {self.target.name} ({self.target.fingerprint[:8]})"
            )
        self._check_network(saved)
        self._has_vocabulary = True

    def _check_network(self, saved: Mapping[str, Any]) -> None:
        found = self.draft.difference(saved_config(saved, "the checkpoint"), "the checkpoint")
        if found is not None:
            name, was, now = found
            raise UserError(
                f"the checkpoint's draft has {name} {quoted(was)}, but the model's has {quoted(now)}; "
                "change model.draft_config"
            )


def normalise_and_clip(
    parameters: Sequence[Tensor], scale: Tensor, max_norm: float | None, max_value: float | None
) -> Tensor:
    """Multiply the gradients of some parameters by ``scale`` and clip them, by norm in the same pass.

    Args:
        parameters: parameters that have a gradient.
        scale: scalar factor.
        max_norm: bound of the total norm after scaling; None or 0 leaves it unbounded.
        max_value: bound of each element's absolute value after scaling; None or 0 leaves it unbounded.

    Returns:
        The total norm after scaling and before clipping.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm) * scale
    clip = torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm else 1.0
    torch._foreach_mul_(grads, scale * clip)
    if max_value:
        torch.nn.utils.clip_grad_value_(parameters, max_value)
    return norm.detach()
