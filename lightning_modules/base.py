"""What every draft algorithm shares: the frozen target, the global loss normaliser, optimizer, metrics, checkpoints.

An algorithm is a subclass in a file of its own in this folder. It says what it needs (:meth:`spec`), turns a
batch into a sum of losses and a count (:meth:`compute`), and gives evaluation its logits
(:meth:`draft_logits`) and its drafter (:meth:`drafter`). Nothing else in the project names an algorithm.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
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
from specforge.export.checkpoint import read_checkpoint
from specforge.files import read_json
from specforge.inference.target_engine.base import check_layers
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.modeling.draft import Draft, as_trained, build_draft, canonical, config_fields, draft_class, read_draft
from specforge.modeling.draft.checks import check_stored
from specforge.modeling.draft.fields import draft_rope, quoted
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.registry import find_draft_config
from specforge.modeling.draft.standalone.network import spread

CHECKPOINT_KEY = "specforge"
# Checkpoints without it were written before drafts refused fields that they do not read.
CONFIG_VERSION = 1


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
        trainer = self._trainer
        return torch.bfloat16 if trainer is not None and "bf16" in str(trainer.precision) else torch.float32

    # Training.

    def configure_model(self) -> None:
        """Shard the draft over the devices where the strategy has a mesh (``fsdp2``); once."""
        mesh = getattr(self, "_device_mesh", None)
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

    def test_step(self, batch: TrainBatch, batch_idx: int) -> StepOutput:
        """As :meth:`validation_step`."""
        return self.validation_step(batch, batch_idx)

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


class SavedDraft(NamedTuple):
    """A draft on disk that a run starts from.

    Attributes:
        path: a SpecForge checkpoint, or a folder in the field's own form.
        config: its config, as SpecForge writes it.
        tensors: its tensors as stored.
        form: the names of a folder's tensors; None for a checkpoint.
        steps: optimizer steps that a checkpoint was trained for.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    form: DraftFormat | None
    steps: int = 0

    @classmethod
    def read(cls, path: str | Path, form: DraftFormat) -> SavedDraft:
        """Read a checkpoint or a folder.

        Raises:
            UserError: it is neither, or damaged.
        """
        path = Path(path)
        if path.is_dir():
            config, tensors = read_draft(path)
            if "d2t" in tensors and tensors["d2t"].ndim == 1:
                config.setdefault("draft_vocab_size", len(tensors["d2t"]))
            return cls(path, config, tensors, form)
        checkpoint = read_checkpoint(path)
        state = checkpoint["state_dict"].items()
        state = {name.removeprefix("draft."): x for name, x in state if name.startswith("draft.")}
        config = saved_config(checkpoint[CHECKPOINT_KEY], str(path))
        return cls(path, config, state, None, int(checkpoint.get("global_step", 0)))

    @classmethod
    def named(cls, init_from: str | None, form: DraftFormat, others: Sequence[str] = ()) -> SavedDraft | None:
        """The draft that ``init_from`` names; None if it is None or one of ``others``, which do not name a draft."""
        return None if init_from is None or init_from in others else cls.read(init_from, form)


def saved_config(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The draft config of a checkpoint, from the entry that :meth:`DraftModule.on_save_checkpoint` adds.

    Raises:
        UserError: the entry has none.
    """
    if not isinstance(saved, Mapping) or "draft_config" not in saved:
        raise UserError(f"{where}: not a SpecForge checkpoint")
    config = canonical(saved["draft_config"], where)
    return config if saved.get("config_version") == CONFIG_VERSION else as_trained(config, where)


def draft_config_for(
    target: TargetFiles,
    given: str | Mapping[str, Any] | None,
    defaults: Mapping[str, Any],
    source: SavedDraft | None = None,
) -> tuple[dict[str, Any], str]:
    """The draft config of a run.

    Args:
        target: the target it must fit.
        given: path of a JSON file, or name of a shipped one; or fields to change; or None.
        defaults: the algorithm's config for this target, which ``given`` changes.
        source: the draft that the run starts from; if there is one, ``given`` changes its config instead.

    Returns:
        The fields, and what to call them in an error message.

    Raises:
        UserError: the file cannot be read, or a field does not fit the target.
    """
    if source is not None:
        _name_layers(source.config, defaults)
    if isinstance(given, str):
        config, where = canonical(read_json(find_draft_config(given)), given), given
    else:
        base, where = defaults if source is None else source.config, "model.draft_config"
        config = _merged(canonical(base, where), given or {}, where)
    _name_layers(config, defaults)
    fits = {"vocab_size": target.vocab_size, "target_hidden_size": target.hidden_size}
    for key, value in fits.items():
        if config.get(key, value) != value:
            raise UserError(f"{where}: {key} is {config[key]}, but the target {target.name} has {value}")
    size = config.get("draft_vocab_size")
    if isinstance(size, int) and size > target.vocab_size:
        raise UserError(f"{where}: draft_vocab_size is {size}, but {target.name} has {target.vocab_size} tokens")
    if config.get("hidden_size") != target.hidden_size:
        raise UserError(
            f"{where}: hidden_size is {config.get('hidden_size')}, but the draft reads the embedding of "
            f"{target.name}, whose width is {target.hidden_size}"
        )
    return config, where


def _name_layers(config: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Fill in the default captured layers of a draft with fused features, as servers do."""
    own = config.get("eagle_config", {})
    if "eagle_config" in defaults and isinstance(own, Mapping):
        config["eagle_config"] = {**defaults["eagle_config"], **own}


def _merged(base: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config with some fields changed, also inside ``eagle_config`` and ``dflash_config``."""
    loose = ("rope_theta", "partial_rotary_factor")
    rope = {} if not isinstance(given, Mapping) else {key: given[key] for key in loose if key in given}
    if rope and not (given.get("rope_parameters") or given.get("rope_scaling")):
        given = {**given, "rope_parameters": {**base.get("rope_parameters", {}), **rope}}
    changes = canonical(given, where, base.get("architectures"))
    nested = {
        key: {**base[key], **value}
        for key, value in changes.items()
        if key.endswith("_config") and isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
    }
    return {**base, **changes, **nested}


def layer_fields(target: TargetFiles) -> dict[str, Any]:
    """Fields of a draft config whose layers have the target's dimensions and positions.

    The layers are Llama layers, whatever the target's are: gated MLPs, root-mean-square norms, rotary positions.

    Raises:
        UserError: the target's config does not say how many attention heads it has.
    """
    config, hidden = target.config, target.hidden_size
    heads = _first(config, ("num_attention_heads",))
    if heads is None:
        raise UserError(f"{target.name}: its config has no num_attention_heads; set model.draft_config to a JSON file")
    kv_heads = _first(config, ("num_key_value_heads", "num_kv_heads")) or heads
    head_dim = _first(config, ("head_dim",)) or hidden // heads
    # LlamaConfig accepts only numbers of heads that divide the hidden size.
    heads = next(count for count in range(heads, 0, -1) if hidden % count == 0)
    positions = _first(config, ("max_position_embeddings",))
    rope = draft_rope(config)
    return {
        "hidden_size": hidden,
        "intermediate_size": _first(config, ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"))
        or 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": math.gcd(heads, kv_heads),
        "head_dim": max(2, head_dim + head_dim % 2),
        "hidden_act": "silu",
        "rms_norm_eps": config.get("rms_norm_eps") or 1e-6,
        "vocab_size": target.vocab_size,
        **({} if rope is None else {"rope_parameters": rope}),
        **({} if positions is None else {"max_position_embeddings": positions}),
    }


def _first(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The first of some fields that is a size; of a list with an entry for each layer, the last entry."""
    for name in names:
        value = config.get(name)
        value = value[-1] if isinstance(value, list) and value else value
        if type(value) is int and value > 0:
            return value
    return None


def initialise(module: torch.nn.Module) -> None:
    """Draw the matrix of a linear layer anew, as the targets' own are drawn."""
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=0.02)


def initialise_layers(module: torch.nn.Module) -> None:
    """Like :func:`initialise`, and biases start at zero."""
    initialise(module)
    if isinstance(module, torch.nn.Linear) and module.bias is not None:
        torch.nn.init.zeros_(module.bias)


def distinct_layers(chosen: list[int], num_layers: int) -> list[int]:
    """An algorithm's choice of layers; for a target of so few that some of them coincide, as many as there are.

    The last layer is left out, because servers capture what enters the layer above.
    """
    if min(chosen) >= 0 and len(set(chosen)) == len(chosen):
        return chosen
    below = max(1, num_layers - 1)
    return spread(min(len(chosen), below), below)


def load_weights(draft: Draft, source: SavedDraft | str | Path, form: DraftFormat) -> None:
    """Start from a draft on disk: a SpecForge checkpoint, or a folder in the field's own form.

    Raises:
        UserError: it is another network, or tensors are missing, unknown or damaged, or have another shape.
    """
    if not isinstance(source, SavedDraft):
        source = SavedDraft.read(source, form)
    path = source.path
    # A block drafter can be trained further with blocks of another size.
    found = draft.difference(source.config, str(path), ignored=("block_size",))
    if found is not None:
        name, theirs, mine = found
        raise UserError(
            f"{path} was trained with {name} {quoted(theirs)}, but the draft config has {quoted(mine)}; leave it "
            "out of model.draft_config (or model.layer_ids) to continue with what was trained"
        )
    tensors = source.tensors
    if source.form is not None:
        tensors = source.form.read(config_fields(draft), tensors, where=str(path))
    own = draft.state_dict()
    for name, tensor in tensors.items():
        if name not in own:
            raise UserError(f"{path}: tensor {name} has no place in the draft")
        check_stored(name, tensor, own[name], str(path))
    missing = sorted(set(own) - set(tensors))
    if missing:
        raise UserError(f"{path}: tensor {missing[0]} is missing")
    draft.load_state_dict(tensors)
    draft.trained = source.steps > 0
