"""P-EAGLE: an EAGLE-3 draft that drafts all tokens of a round in one pass (arXiv 2602.01469).

Element (a, d) predicts token a+d+2 from anchor a; its teacher is the target's distribution at token a+d+1. Depth 0 is
EAGLE-3's input; deeper elements read a mask token and a learned vector. Training keeps every element of depth 0
and a share max(r^d, r_min) of the deeper ones (COD sampling), such that the kept depths of an anchor are contiguous.
The loss is Σ loss / (elements of the optimizer window that predict a supervised token), all depths with equal weight.
Elements whose label is outside the draft vocabulary are dropped from the loss and count as misses.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lightning_modules.distilled import Students
from lightning_modules.eagle_family import EagleFamilyModule
from specforge.contracts import AUX_HIDDEN_STATES, CapturePolicy, TrainBatch, content_id
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.peagle.drafter import PEagleDrafter
from specforge.modeling.draft.peagle.export import PEagleFormat
from specforge.modeling.draft.peagle.network import PEagleDraft
from specforge.modeling.draft.peagle.plan import DepthSampling, PEaglePlan, plan_peagle
from specforge.options import PositiveInt, PositiveShare, Share


class PEagleModule(EagleFamilyModule):
    """P-EAGLE.

    Args:
        draft_config: JSON file of the draft's config, or fields that replace those derived from the target:
            ``num_hidden_layers`` (4), ``mask_token_id`` (by default the target's padding token, or the token that ends
            its answers), ``embed_requires_grad`` (false; true trains an embedding of the draft's own).
        init_from: weights to start from: a SpecForge checkpoint, an exported or published draft, or ``target`` for the
            target's own last layer and head, with upper layers that start as identities. Random by default.
        depths: number of drafted positions to train.
        keep_ratio: r; training keeps a share max(r^d, r_min) of the elements at depth d, all of them if r is 1.
        keep_least: r_min, the smallest share at any depth.
        gamma: tokens drafted per round in validation, at most ``depths``; by default min(4, depths).
    """

    algorithm: ClassVar[str] = "peagle"
    architectures: ClassVar[tuple[str, ...]] = ("PEagleDraftModel",)
    export_format: ClassVar[DraftFormat] = PEagleFormat()
    draft: PEagleDraft

    def __init__(
        self,
        *draft: Any,
        depths: PositiveInt = 8,
        keep_ratio: PositiveShare = 0.8,
        keep_least: Share = 0.2,
        gamma: PositiveInt | None = None,
        **training: Any,
    ) -> None:
        gamma = gamma or min(4, depths)
        if gamma > depths:
            raise UserError(f"model: gamma is {gamma}, but must be from 1 to {depths}, the number of trained depths")
        super().__init__(*draft, weights=torch.ones(depths), gamma=gamma, **training)
        self.depths, self.sampling = depths, DepthSampling(keep_ratio, keep_least)

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """Four Llama layers of the target's dimensions, over at most 32,000 tokens."""
        config = {**super().default_draft_config(target), "num_hidden_layers": 4}
        ends = target.config.get("eos_token_id")
        masks = [target.config.get("pad_token_id"), *(ends if isinstance(ends, list) else [ends])]
        mask = next((m for m in masks if m is not None), None)
        return config if mask is None else {**config, "mask_token_id": mask}

    def setup(self, stage: str) -> None:
        """Start a new draft's own embedding from the target's, besides the common setup."""
        super().setup(stage)
        if not self.starts_from_draft and stage == "fit":
            self.draft.start_embedding(self.target)

    def training_plan(self, batch: TrainBatch) -> PEaglePlan:
        """Plan of sampled elements; a document's sample depends on the document and the epoch alone."""
        names = batch.sample_ids or [str(number) for number in range(len(batch.lengths))]
        seeds = [int(content_id(name, self.current_epoch), 16) for name in names]
        return plan_peagle(batch.lengths, batch.spans, self.depths, batch.num_tokens, self.sampling, seeds)

    def full_plan(self, batch: TrainBatch, positions: int) -> PEaglePlan:
        """Plan of all elements."""
        return plan_peagle(batch.lengths, batch.spans, positions, batch.num_tokens)

    def students(self, batch: TrainBatch, head: TargetHead, plan: PEaglePlan) -> Students:
        """Run the planned elements."""
        states = self.draft(batch.features[AUX_HIDDEN_STATES], batch.input_ids, head.embedding, plan)
        heads = [self.draft.lm_head.weight]
        return Students(states[None], heads, plan.labels, plan.students, plan.valid, plan.count, plan.num_elements)

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> PEagleDrafter:
        """A drafter with the current weights."""
        draft, reads = self.draft, CapturePolicy(self.draft.layer_ids, last_hidden_states=False)
        ids, size = draft.target_ids.clone(), self.target.vocab_size
        return PEagleDrafter(draft.decoder(dtype), head.embedding, ids, size, reads)
