"""MTP: one module over the target's last hidden state, trained by unrolling its own drafting (arXiv 2509.18362).

Row p of step s reads the embedding of token p+1+s and the module's own output of step s-1 (at step 0 the target's
last hidden state of token p), and predicts token p+2+s through the target's frozen head. The loss is
Σ_s α_s Σ_rows loss / (supervised tokens of the optimizer window), α_s = β^s / Σ_j β^j. A query sees what it sees in
decoding: the step-0 keys of its document, and its own of the later steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.base import DraftModule, LogitTile, StepOutput, draft_config_for, load_weights
from lightning_modules.optimizers import OptimizerOptions
from specforge.contracts import LAST_HIDDEN_STATES, CapturePolicy, StrategySpec, TrainBatch
from specforge.decoding.mtp import LastStateChainDrafter
from specforge.errors import UserError
from specforge.eval.tau import chains
from specforge.export import DraftFormat
from specforge.export.mtp import MTPFormat, mtp_family, mtp_tensors, require_mtp
from specforge.losses import TeacherRows, chunked_distillation, make_objective
from specforge.modeling.draft import build_draft
from specforge.modeling.draft.mtp import MTPDraft
from specforge.modeling.draft.unroll import UnrollPlan, plan_unroll
from specforge.modeling.target_head import TargetHead
from specforge.target_files import TargetFiles


class MTPModule(DraftModule):
    """One MTP module, applied again for every position.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft, or fields that replace those derived from the target.
        init_from: ``target_mtp``: the target's own MTP weights; ``target``: its last layer and final norm; or a
            SpecForge checkpoint or a draft on disk (weights only). By default at random.
        steps: K, how many drafted positions are trained.
        step_decay: β of the weights.
        loss: ``kl``, ``reverse_kl``, ``js``, ``tv``, ``ce``, ``lk_alpha``, ``lk_lambda``, or weights by those names.
        lk_eta: η of ``lk_lambda``.
        label: the token that a row has to get right: the one in the ``data``, or the ``target``'s likeliest.
        gamma: tokens drafted a round in validation.
        optimizer: optimizer and schedule.
        chunk: labels of a loss tile; by default what fits the cache. It does not change the result.
    """

    algorithm: ClassVar[str] = "mtp"
    architectures: ClassVar[tuple[str, ...]] = ("MTPDraft", "DeepseekMTPDraft")
    export_format: ClassVar[DraftFormat] = MTPFormat()
    draft: MTPDraft

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        init_from: str | None = None,
        steps: int = 3,
        step_decay: float = 0.6,
        loss: str | dict[str, float] = "ce",
        lk_eta: float = 3.0,
        label: Literal["data", "target"] = "data",
        gamma: int = 3,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 - jsonargparse shows the defaults
        chunk: int | None = None,
    ) -> None:
        files = TargetFiles.find(target)
        if init_from == "target_mtp":
            require_mtp(files)
        config, where = draft_config_for(files, draft_config, self.default_draft_config(files))
        draft = build_draft(config, where)
        if not isinstance(draft, MTPDraft):
            raise UserError(f"{where}: {draft.architecture} is not a draft of {self.algorithm}")
        if steps < 1 or gamma < 1:
            raise UserError(f"model: steps is {steps} and gamma is {gamma}; both must be at least 1")
        draft.apply(_initialise)
        from_disk = init_from not in (None, "target", "target_mtp")
        if init_from == "target_mtp":
            draft.start_from(mtp_tensors(files), f"{files.name}: its MTP weights")
        elif init_from == "target":
            draft.start_from_last_layer(files)
        elif init_from is not None:
            load_weights(draft, Path(init_from), self.export_format)
        spec = StrategySpec(
            algorithm=self.algorithm,
            capture=self.capture_policy(files),
            features=(LAST_HIDDEN_STATES,),
            positions=steps,
            min_tokens=3,
        )
        super().__init__(files, draft, spec, has_vocabulary=from_disk, optimizer=optimizer, gamma=gamma)
        self.steps, self.step_decay, self.label, self.chunk = steps, step_decay, label, chunk
        self.objective = make_objective(loss, lk_eta)

    @classmethod
    def capture_policy(cls, target: TargetFiles, layer_ids: list[int] | None = None) -> CapturePolicy:
        """The last hidden state alone.

        Raises:
            UserError: layers are given.
        """
        if layer_ids:
            raise UserError(f"layers {layer_ids}: {cls.algorithm} reads the last hidden state alone")
        return CapturePolicy((), last_hidden_states=True)

    @staticmethod
    def default_draft_config(target: TargetFiles) -> dict[str, Any]:
        """A layer of the target's own dimensions and form, over its whole vocabulary."""
        config, family = target.config, mtp_family(target)
        heads = int(config["num_attention_heads"])
        keep = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
        latent = (
            "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts",
            "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group",
            "norm_topk_prob", "routed_scaling_factor",
        )  # fmt: skip
        is_latent = config.get("kv_lora_rank") is not None
        names = set(target.weight_files)
        prefix = family.prefix if family else f"model.layers.{target.num_layers - 1}."
        return {
            "architectures": ["DeepseekMTPDraft" if is_latent else "MTPDraft"],
            "model_type": "deepseek_v3" if is_latent else "llama",
            **({key: config[key] for key in latent if key in config} if is_latent else {}),
            **({"moe": f"{prefix}mlp.gate.weight" in names} if is_latent else {}),
            "hidden_size": target.hidden_size,
            "intermediate_size": config["intermediate_size"],
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads", heads),
            "head_dim": config.get("head_dim") or target.hidden_size // heads,
            "hidden_act": "silu",
            "num_hidden_layers": 1,
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "vocab_size": target.vocab_size,
            "draft_vocab_size": target.vocab_size,
            "qk_norm": any(name.endswith("layers.0.self_attn.q_norm.weight") for name in names),
            "attention_bias": any(name.endswith("layers.0.self_attn.q_proj.bias") for name in names),
            "mask_first": family is not None and family.mask_first,
            **{key: config[key] for key in keep if config.get(key) is not None},
        }

    def compute(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> StepOutput:
        """Losses of a batch; with ``positions``, chains of that length against the data tokens."""
        steps = positions or self.steps
        plan, states = self._unroll(batch, head, steps)
        if not plan.count:
            return self.empty_output(steps, states, batch.spans if positions else ())
        last = batch.features[LAST_HIDDEN_STATES][plan.labels - 1]
        labels, log_sum = self._labels(batch, head, plan, last, "data" if positions else self.label)
        decay = self.step_decay ** torch.arange(steps, device=states.device)
        weights = decay / decay.sum() * plan.valid * (labels >= 0).unsqueeze(1)
        frozen = head.sliced(self.draft.target_ids)
        result = chunked_distillation(
            states.flatten(0, 1), frozen, _flat_students(plan), weights, TeacherRows(last, frozen, log_sum, labels),
            self.objective, chunk=self.chunk,
        )  # fmt: skip
        found: tuple[Any, ...] = ()
        if positions:
            right, known = result.hits[: plan.count].cpu().numpy(), plan.labels[: plan.count].tolist()
            found = tuple(chains(right, known, batch.spans))
        hits = (result.hits & plan.valid).sum(0)
        return StepOutput(result.loss, plan.count, result.losses, hits, plan.valid.sum(0), found)

    def _unroll(self, batch: TrainBatch, head: TargetHead, steps: int) -> tuple[UnrollPlan, Tensor]:
        device = batch.input_ids.device
        plan = plan_unroll(batch.lengths, batch.spans, steps, batch.num_tokens).to(device)
        return plan, self.draft(batch.features[LAST_HIDDEN_STATES], head.embed(batch.input_ids), plan)

    def _labels(
        self, batch: TrainBatch, head: TargetHead, plan: UnrollPlan, last: Tensor, label: str
    ) -> tuple[Tensor, Tensor | None]:
        """Draft ids of the labels (-1 outside the draft vocabulary), and full-vocabulary log-sums if needed."""
        if label == "data" and not self.objective.full_vocabulary:
            return self.draft.draft_ids(batch.input_ids[plan.labels]), None
        rows = head.rows(last)
        ids = rows.argmax if label == "target" else batch.input_ids[plan.labels]
        return self.draft.draft_ids(ids), rows.log_sum

    @torch.no_grad()
    def draft_logits(self, batch: TrainBatch, head: TargetHead, positions: int) -> Iterator[LogitTile]:
        """Logits of every supervised token's ``positions`` students, 256 labels at a time."""
        plan, states = self._unroll(batch, head, positions)
        students, flat = _flat_students(plan), states.flatten(0, 1)
        weight = head.sliced(self.draft.target_ids).to(states.dtype)
        for start in range(0, plan.count, 256):
            part = slice(start, min(start + 256, plan.count))
            logits = F.linear(flat[students[part]], weight).float()
            logits.masked_fill_(~plan.valid[part].unsqueeze(-1), 0.0)
            labels = plan.labels[part]
            yield LogitTile(labels, logits, batch.features[LAST_HIDDEN_STATES][labels - 1])

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> LastStateChainDrafter:
        """A chain drafter with the present weights and the target's head."""
        draft = self.draft
        return LastStateChainDrafter(
            draft.decoder(head.sliced(draft.target_ids), dtype), head.embed, draft.target_ids.clone(),
            self.target.vocab_size, self.spec.capture,
        )  # fmt: skip


def _flat_students(plan: UnrollPlan) -> Tensor:
    """``[M, T]`` index of each student among the states of all steps, ``[T R, H]``."""
    return plan.students + torch.arange(plan.steps, device=plan.students.device) * len(plan.rows)


def _initialise(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            torch.nn.init.zeros_(module.bias)
