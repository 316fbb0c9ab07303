"""P-EAGLE: an EAGLE-3 draft that drafts all tokens of a round in one pass (arXiv 2602.01469).

Element (a, d) predicts token a+d+2 from anchor a; its teacher is the target's distribution at token a+d+1. Depth 0 is
EAGLE-3's input; deeper elements read a mask token and a learnt vector. Training keeps every element of depth 0
and a share max(r^d, r_min) of the deeper ones (COD sampling), never leaving a hole in an anchor's depths.
The loss is Σ loss / (elements of the optimizer window that predict a supervised token); all depths weigh the same.
Elements whose label is outside the draft vocabulary are dropped from the loss and count as misses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from lightning_modules.distilled import Students
from lightning_modules.fused import FusedModule
from lightning_modules.optimizers import OptimizerOptions
from specforge.contracts import AUX_HIDDEN_STATES, CapturePolicy, TrainBatch, content_id
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.losses import make_objective
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.peagle.drafter import PEagleDrafter
from specforge.modeling.draft.peagle.export import PEagleFormat
from specforge.modeling.draft.peagle.network import PEagleDraft
from specforge.modeling.draft.peagle.plan import DepthSampling, plan_peagle
from specforge.options import NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveShare, Share


class PEagleModule(FusedModule):
    """P-EAGLE.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft, or fields that replace those derived from the target;
            ``num_hidden_layers`` (4), ``mask_token_id`` (by default the target's padding token, or the token that
            ends its answers), and ``embed_requires_grad`` (false): train an embedding of the draft's own.
        layer_ids: three decoder layers of the target whose outputs the draft reads; by default those of the
            draft config, else the second, the middle and the fourth from the end.
        init_from: start from a SpecForge checkpoint or a draft in the field's own form (weights only); or
            ``target``: from the target's own last layer and head, with upper layers that do nothing yet. By default
            at random.
        depths: how many drafted positions are trained.
        keep_ratio: r of the sampling; 1 keeps every element.
        keep_least: r_min.
        loss: ``kl``, ``reverse_kl``, ``js``, ``tv``, ``ce``, ``topk``, ``lk_alpha``, ``lk_lambda``, or weights by
            those names.
        lk_eta: η of ``lk_lambda``.
        topk: K of ``topk``.
        label: the token that an element has to get right: the ``target``'s likeliest, or the one in the ``data``.
            They are the same where the target wrote the data greedily, and ``data`` then saves a product
            with the whole vocabulary.
        gamma: tokens drafted a round in validation, at most ``depths``; by default min(4, depths).
        optimizer: optimizer and schedule.
        chunk: labels of a loss tile; by default what fits the cache. It does not change the result.
    """

    algorithm: ClassVar[str] = "peagle"
    architectures: ClassVar[tuple[str, ...]] = ("PEagleDraftModel",)
    export_format: ClassVar[DraftFormat] = PEagleFormat()
    draft: PEagleDraft

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        layer_ids: list[NonNegativeInt] | None = None,
        init_from: str | None = None,
        depths: PositiveInt = 8,
        keep_ratio: PositiveShare = 0.8,
        keep_least: Share = 0.2,
        loss: str | dict[str, float] = "kl",
        lk_eta: NonNegativeFloat = 3.0,
        topk: PositiveInt = 10,
        label: Literal["target", "data"] = "target",
        gamma: PositiveInt | None = None,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 - jsonargparse shows the defaults
        chunk: PositiveInt | None = None,
    ) -> None:
        gamma = gamma or min(4, depths)
        if gamma > depths:
            raise UserError(f"model: gamma is {gamma}; want 1 to {depths}, the depths that are trained")
        super().__init__(
            target,
            draft_config,
            layer_ids,
            init_from,
            weights=torch.ones(depths),
            objective=make_objective(loss, lk_eta, topk),
            label=label,
            gamma=gamma,
            optimizer=optimizer,
            chunk=chunk,
        )
        self.depths, self.sampling = depths, DepthSampling(keep_ratio, keep_least)

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """Four Llama layers of the target's own dimensions, over at most 32,000 tokens."""
        config = {**super().default_draft_config(target), "num_hidden_layers": 4}
        ends = target.config.get("eos_token_id")
        masks = [target.config.get("pad_token_id"), *(ends if isinstance(ends, list) else [ends])]
        mask = next((m for m in masks if m is not None), None)
        return config if mask is None else {**config, "mask_token_id": mask}

    def setup(self, stage: str) -> None:
        """As everywhere; a new draft's own embedding begins as the target's."""
        super().setup(stage)
        if self.starts_anew and stage == "fit":
            self.draft.start_embedding(self.target)

    def students(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> Students:
        """Run sampled elements; with ``positions``, all."""
        sampling = None if positions else self.sampling
        depths, seeds = positions or self.depths, () if positions else self._seeds(batch)
        plan = plan_peagle(batch.lengths, batch.spans, depths, batch.num_tokens, sampling, seeds)
        count = plan.count if positions else int(plan.valid.sum())
        plan = plan.to(batch.input_ids.device)
        states = self.draft(batch.features[AUX_HIDDEN_STATES], batch.input_ids, head.embedding, plan)
        heads = [self.draft.lm_head.weight]
        return Students(states[None], heads, plan.labels, plan.students, plan.valid, plan.count, count)

    def _seeds(self, batch: TrainBatch) -> Sequence[int]:
        """A document's sampling depends on the document and the step alone, so a resumed run repeats it."""
        names = batch.sample_ids or [str(i) for i in range(len(batch.lengths))]
        return [int(content_id(name, self.global_step), 16) for name in names]

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> PEagleDrafter:
        """A parallel drafter with the present weights."""
        draft, reads = self.draft, CapturePolicy(self.draft.layer_ids, last_hidden_states=False)
        ids, size = draft.target_ids.clone(), self.target.vocab_size
        return PEagleDrafter(draft.decoder(dtype), head.embedding, ids, size, reads)
