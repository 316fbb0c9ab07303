"""Medusa-1: heads on the frozen target's last hidden state (arXiv 2401.10774).

Head k (from 0) predicts token p+2+k from the last hidden state of token p; the target itself predicts p+1. The loss
is Σ_k decay^k Σ_rows loss / (supervised tokens of the optimizer window), with cross-entropy on the data tokens.
Rows whose label is outside the draft vocabulary are dropped from the loss and count as misses.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from lightning_modules.distilled import DistilledModule, Students
from lightning_modules.optimizers import OptimizerOptions
from specforge.contracts import LAST_HIDDEN_STATES, TrainBatch
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.losses import make_objective
from specforge.modeling.draft.eagle3.plan import plan_unroll
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.heads.drafter import HeadsDrafter
from specforge.modeling.draft.heads.export import MedusaFormat
from specforge.modeling.draft.heads.network import HeadsDraft
from specforge.modeling.draft.starting import SavedDraft, draft_config_for, load_weights
from specforge.options import NonNegativeFloat, PositiveInt


class MedusaModule(DistilledModule):
    """Medusa-1.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft, or fields that replace those derived from the target:
            ``num_draft_heads`` (K, default 4), ``num_head_blocks`` (residual blocks of a head, default 1),
            ``draft_vocab_size``.
        init_from: start from a SpecForge checkpoint or a draft on disk (weights only). By default from the target:
            its head's rows in every linear head, and blocks at zero.
        head_decay: weight of head k is ``head_decay ** k``.
        loss: ``kl``, ``reverse_kl``, ``js``, ``tv``, ``ce``, ``lk_alpha``, ``lk_lambda``, or weights by those names.
        lk_eta: η of ``lk_lambda``.
        label: the token that a row has to get right: the one in the ``data``, or the ``target``'s likeliest.
        gamma: tokens drafted a round in validation, at most K; by default min(4, K).
        optimizer: optimizer and schedule.
        chunk: labels of a loss tile; by default what fits the cache. It does not change the result.
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
        lk_eta: NonNegativeFloat = 3.0,
        label: Literal["data", "target"] = "data",
        gamma: PositiveInt | None = None,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 - jsonargparse shows the defaults
        chunk: PositiveInt | None = None,
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
            objective=make_objective(loss, lk_eta),
            label=label,
            chunk=chunk,
            has_vocabulary=init_from is not None,
            optimizer=optimizer,
            gamma=gamma,
            start=draft.start_from_target if init_from is None else None,
        )

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

    def students(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> Students:
        """Run the heads, each on the rows that some label needs.

        Raises:
            UserError: there are fewer heads than ``positions``.
        """
        draft = self.draft
        steps = positions or len(draft.heads)
        if steps > len(draft.heads):
            raise UserError(f"{steps} tokens a round, but the draft has {len(draft.heads)} heads")
        plan = plan_unroll(batch.lengths, batch.spans, steps, batch.num_tokens).to(batch.input_ids.device)
        embeds = [head.embed(batch.input_ids[tokens]) for tokens in plan.row_tokens]
        states = draft(batch.features[LAST_HIDDEN_STATES][plan.rows], embeds)
        heads = [each.lm_head.weight for each in draft.each[:steps]]
        return Students(states, heads, plan.labels, plan.students, plan.valid, plan.count, plan.count)

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> HeadsDrafter:
        """A drafter of one token a head with the present weights."""
        draft = self.draft
        return HeadsDrafter(draft.decoder(dtype), head.embed, draft.target_ids.clone(), self.target.vocab_size)
