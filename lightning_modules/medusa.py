"""Medusa-1 and Hydra: heads on the frozen target's last hidden state (arXiv 2401.10774, 2402.05109).

Head k (from 0) predicts token p+2+k from the last hidden state of token p; the target itself predicts p+1. Hydra makes
the heads sequential: head k also reads the embeddings of tokens p+1 .. p+1+k, in training those of the data (teacher
forcing), in decoding the committed token and the tokens drafted by the heads before it. The loss is
Σ_k decay^k Σ_rows loss / (supervised tokens of the optimizer window), by default cross-entropy on the data tokens.
Rows whose label is outside the draft vocabulary are dropped from the loss and count as misses.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from lightning_modules.distilled import DistilledModule, Students
from specforge.contracts import LAST_HIDDEN_STATES, TrainBatch
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.modeling.draft.eagle3.plan import UnrollPlan
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.heads.drafter import HeadsDrafter
from specforge.modeling.draft.heads.export import HeadsFormat, MedusaFormat
from specforge.modeling.draft.heads.network import HeadsDraft
from specforge.modeling.draft.starting import SavedDraft, draft_config_for, load_weights
from specforge.options import NonNegativeFloat, PositiveInt


class MedusaModule(DistilledModule):
    """Medusa-1.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft's config, or fields that replace those derived from the target:
            ``num_draft_heads`` (K, default 4), ``num_head_blocks`` (residual blocks per head, default 1),
            ``draft_vocab_size``.
        init_from: weights to start from: a SpecForge checkpoint or a draft on disk. By default every linear head is a
            copy of the target's and the residual blocks are zero.
        head_decay: weight of head k is ``head_decay ** k``.
        gamma: tokens drafted per round in validation, at most K; by default min(4, K).
    """

    algorithm: ClassVar[str] = "medusa"
    architectures: ClassVar[tuple[str, ...]] = ("MedusaDraft",)
    export_format: ClassVar[DraftFormat] = MedusaFormat()
    reads_layers: ClassVar[bool] = False
    draft: HeadsDraft

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        init_from: str | None = None,
        head_decay: NonNegativeFloat = 0.8,
        loss: str | dict[str, float] = "ce",
        label: Literal["data", "target"] = "data",
        gamma: PositiveInt | None = None,
        **training: Any,
    ) -> None:
        files = TargetFiles.find(target)
        source = SavedDraft.named(init_from, self.export_format)
        config, where = draft_config_for(files, draft_config, self.default_draft_config(files), source)
        draft = self.build(config, where)
        gamma = gamma or min(4, len(draft.heads))
        if gamma > len(draft.heads):
            raise UserError(f"model: gamma is {gamma}, but the draft has {len(draft.heads)} heads")
        if source is not None:
            load_weights(draft, source, self.export_format)
        super().__init__(
            files,
            draft,
            self.capture_policy(files),
            weights=head_decay ** torch.arange(len(draft.heads)),
            has_vocabulary=source is not None,
            loss=loss,
            label=label,
            gamma=gamma,
            **training,
        )
        self.start = draft.start_from_target if source is None else None

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """Four heads of one block over at most 32,000 tokens."""
        return {
            "architectures": [cls.architectures[0]],
            "hidden_size": target.hidden_size,
            "vocab_size": target.vocab_size,
            "draft_vocab_size": min(32000, target.vocab_size),
            "num_draft_heads": 4,
            "num_head_blocks": 1,
        }

    def full_plan(self, batch: TrainBatch, positions: int) -> UnrollPlan:
        """Plan of one position per head."""
        if positions > len(self.draft.heads):
            raise UserError(f"gamma is {positions}, but the draft has {len(self.draft.heads)} heads")
        plan: UnrollPlan = super().full_plan(batch, positions)
        return plan

    def students(self, batch: TrainBatch, head: TargetHead, plan: UnrollPlan) -> Students:
        """Run the heads, each on the rows that some label needs."""
        embeds = [head.embed(batch.input_ids[tokens]) for tokens in plan.row_tokens]
        states = self.draft(batch.features[LAST_HIDDEN_STATES][plan.rows], embeds)
        heads = [each.lm_head.weight for each in self.draft.each[: plan.steps]]
        return Students(states, heads, plan.labels, plan.students, plan.valid, plan.count, plan.count)

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> HeadsDrafter:
        """A drafter of one token per head with the current weights."""
        draft = self.draft
        return HeadsDrafter(draft.decoder(dtype), head.embed, draft.target_ids.clone(), self.target.vocab_size)


class HydraModule(MedusaModule):
    """Hydra, with the options of Medusa.

    Two parts of Hydra++ are options: its teacher loss is ``loss: kl``, its deeper MLP ``num_head_blocks`` of the
    draft config.
    """

    algorithm: ClassVar[str] = "hydra"
    architectures: ClassVar[tuple[str, ...]] = ("HydraDraft",)
    export_format: ClassVar[DraftFormat] = HeadsFormat()
