"""MTP: one module over the target's last hidden state, trained by unrolling its own drafting (arXiv 2509.18362).

Row p of step s reads the embedding of token p+1+s and the module's own output of step s-1 (at step 0 the target's
last hidden state of token p), and predicts token p+2+s through the target's frozen head. The loss is
Σ_s α_s Σ_rows loss / (supervised tokens of the optimizer window), α_s = β^s / Σ_j β^j. A query attends to the keys
that it has in decoding: those of step 0 in its document, and its own of later steps.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from lightning_modules.distilled import DistilledModule, Students, unrolled
from specforge.contracts import LAST_HIDDEN_STATES, TrainBatch
from specforge.decoding.drafters import ChainDrafter
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.modeling.draft.eagle3.plan import UnrollPlan
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.mtp.export import MTPFormat, mtp_family, mtp_tensors, require_mtp
from specforge.modeling.draft.mtp.network import MTPDraft
from specforge.modeling.draft.servers import SGLang
from specforge.modeling.draft.starting import (
    SavedDraft,
    draft_config_for,
    initialise_layers,
    layer_fields,
    load_weights,
)
from specforge.options import PositiveFloat, PositiveInt


class MTPModule(DistilledModule):
    """One MTP module, applied once per drafted position.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft's config, or fields that replace those derived from the target.
        init_from: weights to start from: ``target_mtp`` for the target's own MTP module, ``target`` for its last layer
            and final norm, a SpecForge checkpoint, or a draft on disk. Random by default.
        steps: K, number of drafted positions to train.
        step_decay: β; the weight of position s is proportional to ``step_decay ** s``.
    """

    algorithm: ClassVar[str] = "mtp"
    architectures: ClassVar[tuple[str, ...]] = ("MTPDraft", "DeepseekMTPDraft")
    export_format: ClassVar[DraftFormat] = MTPFormat()
    reads_layers: ClassVar[bool] = False
    draft: MTPDraft

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        init_from: str | None = None,
        steps: PositiveInt = 3,
        step_decay: PositiveFloat = 0.6,
        loss: str | dict[str, float] = "ce",
        label: Literal["data", "target"] = "data",
        gamma: PositiveInt = 3,
        **training: Any,
    ) -> None:
        files = TargetFiles.find(target)
        if init_from == "target_mtp":
            require_mtp(files)
        source = SavedDraft.named(init_from, self.export_format, ("target", "target_mtp"))
        config, where = draft_config_for(files, draft_config, self.default_draft_config(files), source)
        draft = self.build(config, where)
        draft.apply(initialise_layers)
        if init_from == "target_mtp":
            draft.start_from(mtp_tensors(files), f"{files.name}: its MTP weights")
        elif init_from == "target":
            draft.start_from_last_layer(files)
        elif source is not None:
            load_weights(draft, source, self.export_format)
        decay = step_decay ** torch.arange(steps)
        super().__init__(
            files,
            draft,
            self.capture_policy(files),
            weights=decay / decay.sum(),
            has_vocabulary=source is not None,
            loss=loss,
            label=label,
            gamma=gamma,
            **training,
        )
        self.start = draft.check_start if init_from == "target" else None
        self.steps = steps

    @staticmethod
    def default_draft_config(target: TargetFiles) -> dict[str, Any]:
        """A layer of the target's dimensions and architecture, over its whole vocabulary."""
        config, family = target.config, mtp_family(target)
        latent = (
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "n_group",
            "topk_group",
            "norm_topk_prob",
            "routed_scaling_factor",
        )
        is_latent = config.get("kv_lora_rank") is not None
        names = set(target.weight_files)
        prefix = family.prefix if family else f"model.layers.{target.num_layers - 1}."
        return {
            **layer_fields(target),
            "architectures": ["DeepseekMTPDraft" if is_latent else "MTPDraft"],
            "model_type": "deepseek_v3" if is_latent else "llama",
            **({key: config[key] for key in latent if key in config} if is_latent else {}),
            **({"moe": f"{prefix}mlp.gate.weight" in names} if is_latent else {}),
            "num_hidden_layers": 1,
            "draft_vocab_size": target.vocab_size,
            "qk_norm": any(name.endswith("layers.0.self_attn.q_norm.weight") for name in names),
            "attention_bias": any(name.endswith("layers.0.self_attn.q_proj.bias") for name in names),
            "mask_first": family is not None and SGLang.name in family.mask_first,
        }

    def students(self, batch: TrainBatch, head: TargetHead, plan: UnrollPlan) -> Students:
        """Unroll the module over the batch."""
        states = self.draft(batch.features[LAST_HIDDEN_STATES], head.embed(batch.input_ids), plan)
        return unrolled(states, head.sliced(self.draft.target_ids), plan)

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> ChainDrafter:
        """A chain drafter with the current weights and the target's head."""
        ids, size = self.draft.target_ids.clone(), self.target.vocab_size
        decoder = self.draft.decoder(head.sliced(self.draft.target_ids), dtype)
        return ChainDrafter(decoder, head.embed, ids, size, self.spec.capture)
