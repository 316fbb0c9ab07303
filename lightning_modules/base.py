"""What every draft algorithm shares: the frozen target, the global loss normaliser, optimizer, metrics, checkpoints.

An algorithm is a subclass in a file of its own in this folder. It says what it needs (:meth:`spec`), turns a
batch into a sum of losses and a count (:meth:`compute`), and gives evaluation its logits
(:meth:`draft_logits`) and its drafter (:meth:`drafter`). Nothing else in the project names an algorithm.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_modules.optimizers import OptimizerOptions, build_optimizer
from specforge.contracts import CapturePolicy, StrategySpec, TrainBatch, TrainingData
from specforge.data.vocabulary import coverage, draft_vocabulary
from specforge.decoding.drafters import Drafter
from specforge.errors import UserError
from specforge.eval.tau import chains
from specforge.inference.target_engine.base import check_layers
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.modeling.draft import Draft, build_draft, config_fields, draft_class
from specforge.modeling.draft.fields import quoted
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.starting import CHECKPOINT_KEY, CONFIG_VERSION, saved_config


class StepOutput(NamedTuple):
    """What an algorithm makes of one batch.

    Attributes:
        loss: scalar, the *sum* over the batch's rows, with its gradient.
        count: supervised tokens that the sum is over.
        losses: ``[T]`` sum of the unweighted losses of each drafted position.
        hits: ``[T]`` int64, rows of each position whose likeliest token is the label.
        rows: ``[T]`` int64, rows of each position, dropped ones included.
        chains: per supervised span, ``[starts, T]`` bool: whether the k-th token drafted from each start is right.
            Only in validation.
    """

    loss: Tensor
    count: int  # type: ignore[assignment]
    losses: Tensor
    hits: Tensor
    rows: Tensor
    chains: tuple[np.ndarray, ...] = ()


class LogitTile(NamedTuple):
    """Draft logits of some labels, for evaluation.

    Attributes:
        labels: ``[C]`` flat token that the rows predict.
        logits: ``[C, T, D]`` fp32, position t's logits over the draft vocabulary.
        target_hidden: ``[C, H]`` the target's last hidden state that predicts the label.
    """

    labels: Tensor
    logits: Tensor
    target_hidden: Tensor


class DraftModule(pl.LightningModule):
    """Trains one draft against one frozen target.

    Args:
        target: folder or hub name of the target.
        draft: the network.
        spec: what the algorithm asks of the data path.
        has_vocabulary: whether the draft comes with its vocabulary; otherwise the data chooses it.
        optimizer: optimizer and schedule.
        gamma: tokens drafted a round in validation.

    Attributes:
        algorithm: the name in tables and files.
        architectures: names under which drafts of this algorithm are saved.
        export_format: how its drafts look to others.
        reads_layers: whether features of the target's layers are of any use to it.
    """

    algorithm: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    export_format: ClassVar[DraftFormat]
    reads_layers: ClassVar[bool] = True

    def __init__(
        self,
        target: TargetFiles,
        draft: Draft,
        spec: StrategySpec,
        *,
        has_vocabulary: bool,
        optimizer: OptimizerOptions,
        gamma: int,
    ) -> None:
        super().__init__()
        self.target, self.draft, self.spec = target, draft, spec
        self.optimizer_options, self.gamma = optimizer, gamma
        self._has_vocabulary = has_vocabulary or draft.d2t.shape == draft.t2d.shape
        self._head: TargetHead | None = None
        self._window_count = 0
        self.grad_norm: Tensor | None = None

    @classmethod
    def build(cls, config: Mapping[str, Any], where: str) -> Any:
        """The network of a draft config, randomly initialised.

        Raises:
            UserError: the config is of another algorithm, or its fields are refused.
        """
        architecture = draft_class(config, where).architecture
        if architecture not in cls.architectures:
            raise UserError(f"{where}: {architecture} is not a draft of {cls.algorithm}")
        return build_draft(config, where)

    # What an algorithm defines.

    @classmethod
    def default_layers(cls, num_layers: int) -> list[int]:
        """The algorithm's own choice of layers to capture; none unless it says so."""
        return []

    @classmethod
    def capture_policy(cls, target: TargetFiles, layer_ids: list[int] | None = None) -> CapturePolicy:
        """What to capture of a target: the given layers or the algorithm's own choice, and the last hidden state.

        Raises:
            UserError: the target has no such layer, or the algorithm reads none.
        """
        if layer_ids and not cls.reads_layers:
            raise UserError(f"layers {layer_ids}: {cls.algorithm} reads the last hidden state alone")
        policy = CapturePolicy(tuple(layer_ids or cls.default_layers(target.num_layers)))
        check_layers(policy, target.num_layers, target.name)
        return policy

    @abstractmethod
    def compute(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> StepOutput:
        """Losses of a batch; with ``positions``, evaluate that many drafted positions against the data tokens."""

    @abstractmethod
    def draft_logits(self, batch: TrainBatch, head: TargetHead, positions: int) -> Iterator[LogitTile]:
        """Logits of every supervised token's ``positions`` students, a tile at a time."""

    @abstractmethod
    def drafter(self, head: TargetHead, dtype: torch.dtype) -> Drafter:
        """A drafter that decodes with the present weights."""

    # The frozen target.

    def target_head(self, device: torch.device) -> TargetHead:
        """Embedding and lm_head of the target, read at the first use, on ``device``."""
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
        """Shard the draft over the devices where the strategy has a mesh (``fsdp2``); once."""
        mesh = self.device_mesh
        if mesh is None or isinstance(self.draft, FSDPModule):
            return
        # The draft is one layer and a head: one group of shards, gathered once a step, is all there is to gain.
        fully_shard(self.draft, mesh=mesh["data_parallel"], reshard_after_forward=False)

    @property
    def data(self) -> TrainingData | None:
        """The datamodule of the run; None for a run on bare loaders."""
        data: TrainingData | None = self.trainer.datamodule
        return data

    def setup(self, stage: str) -> None:
        """Check the data against the target, and choose the draft vocabulary of a new run."""
        data = self.data
        if data is None:
            return
        for ref in data.sample_refs()[:1]:
            if ref.provenance.target_fingerprint != self.target.fingerprint:
                raise UserError(
                    f"features were captured from {ref.provenance.target} "
                    f"({ref.provenance.target_fingerprint[:8]}), but model.target is {self.target.name} "
                    f"({self.target.fingerprint[:8]})"
                )
        counts = data.token_counts()
        if self._has_vocabulary or counts is None or stage != "fit":
            return
        if not counts.supervised.shape == counts.context.shape == self.draft.t2d.shape:
            raise UserError(
                f"the data counts {len(counts.supervised)} tokens, but {self.target.name} has {len(self.draft.t2d)}; "
                "prepare and capture again"
            )
        ids = draft_vocabulary(counts, len(self.draft.d2t))
        self.draft.set_vocabulary(ids)
        self._has_vocabulary = True
        pl.utilities.rank_zero_info(
            f"draft vocabulary: {len(ids)} of {len(self.draft.t2d)} tokens, {coverage(counts, ids):.1%} of the answers"
        )

    def training_step(self, batch: TrainBatch, batch_idx: int) -> dict[str, Any]:
        """Sum of the batch's losses; the division by the window's count happens before clipping."""
        output = self.compute(batch, self.target_head(batch.input_ids.device))
        self._window_count += output.count
        return {"loss": output.loss, "output": output._replace(loss=output.loss.detach())}

    def validation_step(self, batch: TrainBatch, batch_idx: int) -> StepOutput:
        """Drafted chains of the held-out documents; a rank's empty batch runs too, for a sharded draft's sake."""
        return self.compute(batch, self.target_head(batch.input_ids.device), positions=self.gamma)

    def empty_output(self, positions: int, states: Tensor, spans: Sequence[tuple[int, int]] = ()) -> StepOutput:
        """Output of a batch without supervised rows: zero, but with the draft's states and parameters in its graph.

        A rank whose part of the data ran out has to take part in the reductions of the others.

        Args:
            positions: T.
            states: what the draft made of the batch.
            spans: in validation, the batch's; nothing drafted for them is right.
        """
        loss = sum((p.sum() * 0.0 for p in self.draft.parameters() if p.requires_grad), states.sum() * 0.0)
        zeros = torch.zeros(positions, device=self.device)
        missed = tuple(chains(np.zeros((0, positions), dtype=bool), [], spans))
        return StepOutput(torch.as_tensor(loss), 0, zeros, zeros.long(), zeros.long(), missed)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Turn the summed gradients into those of the mean over the optimizer window and all ranks, then clip.

        Lightning has divided by ``accumulate_grad_batches`` and the strategy by the number of ranks; both
        are undone together with the division by the supervised tokens, in the one pass that clipping takes.
        """
        count = torch.tensor(float(self._window_count), device=self.device)
        self._window_count = 0
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(count)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / count.clamp(min=1.0)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm) * scale
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch._foreach_mul_(grads, scale)
            torch.nn.utils.clip_grad_value_([p for g in optimizer.param_groups for p in g["params"]], gradient_clip_val)
        else:
            clip = 1.0 if not gradient_clip_val else torch.clamp(gradient_clip_val / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(grads, scale * clip)
        self.grad_norm = norm.detach()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer and a schedule by optimizer step."""
        optimizer, schedule = build_optimizer(self.optimizer_options, self.draft, self._total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _total_steps(self) -> int:
        # Not trainer.estimated_stepping_batches: it builds the loader anew and loses its resumed position.
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
        """Copy without waiting; the loader has pinned the memory where that helps."""
        return batch.to(device, non_blocking=True) if isinstance(batch, TrainBatch) else batch

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the draft is, so that evaluation and export need nothing but the file."""
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
        """Refuse a checkpoint of another algorithm, network or target.

        Raises:
            UserError: names what differs.
        """
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None:
            raise UserError("the checkpoint is not one of SpecForge's")
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
