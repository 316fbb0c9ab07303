"""EAGLE-3: a one-layer draft over fused target features, trained by unrolling its own drafting (arXiv 2503.01840).

Row p of step s reads the embedding of token p+1+s and the draft's own state of step s-1 (at step 0 the fused
features of token p), and predicts token p+2+s; its teacher is the target's distribution at token p+1+s.
The loss is Σ_s decay^s Σ_rows loss / (supervised tokens of the optimizer window). Rows whose label is outside the
draft vocabulary are dropped from the loss and count as misses.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lightning_modules.distilled import Students, unrolled
from lightning_modules.eagle_family import EagleFamilyModule
from specforge.contracts import AUX_HIDDEN_STATES, CapturePolicy, TrainBatch
from specforge.decoding.drafters import ChainDrafter
from specforge.inference.target_head import OutputHead, TargetHead
from specforge.modeling.draft.context_parallel import own
from specforge.modeling.draft.eagle3.export import Eagle3Format
from specforge.modeling.draft.eagle3.network import Eagle3Draft
from specforge.modeling.draft.eagle3.plan import UnrollPlan, plan_unroll
from specforge.modeling.draft.format import DraftFormat
from specforge.options import NonNegativeFloat, PositiveInt


class Eagle3Module(EagleFamilyModule):
    """EAGLE-3. Options of its draft config give EAGLE-3.1, options of its loss give HASS.

    EAGLE-3.1 is ``fc_norm`` (a norm of each captured layer before ``fc``) and ``norm_output`` (the normed state is
    fed back). HASS (arXiv 2408.15766) adds the losses ``topk`` and ``feature_weight``; its context alignment is already
    part of EAGLE-3's unrolled training.

    Args:
        draft_config: JSON file of the draft's config, or fields that replace those derived from the target;
            ``architectures`` chooses the attention: ``[LlamaForCausalLMEagle3]``, or ``[Eagle3DeepseekV2ForCausalLM]``
            for latent attention.
        steps: T, number of drafted positions to train.
        step_decay: weight of position s is ``step_decay ** s``.
        feature_weight: weight of the smooth L1 distance between the states that the draft's and the target's head read
            (EAGLE, arXiv 2401.15077; HASS). Useful if the draft's head starts as the target's.
    """

    algorithm: ClassVar[str] = "eagle3"
    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLMEagle3", "Eagle3DeepseekV2ForCausalLM")
    export_format: ClassVar[DraftFormat] = Eagle3Format()
    shares_batches: ClassVar[bool] = True
    draft: Eagle3Draft

    def __init__(
        self,
        *draft: Any,
        steps: PositiveInt = 7,
        step_decay: NonNegativeFloat = 0.8,
        feature_weight: NonNegativeFloat = 0.0,
        **training: Any,
    ) -> None:
        super().__init__(*draft, weights=step_decay ** torch.arange(steps), **training)
        self.steps, self.step_decay, self.feature_weight = steps, step_decay, feature_weight

    def training_plan(self, batch: TrainBatch) -> UnrollPlan:
        """Plan of the trained positions, or of this rank's share of them."""
        return plan_unroll(batch.lengths, batch.spans, self.spec.positions, batch.num_tokens, self.context_group)

    def students(self, batch: TrainBatch, head: TargetHead, plan: UnrollPlan) -> Students:
        """Unroll the draft over the batch."""
        read = batch.input_ids if plan.read is None else batch.input_ids[plan.read]
        states = self.draft(own(batch.features[AUX_HIDDEN_STATES], plan.share), head.embed(read), plan)
        return unrolled(states, OutputHead(self.draft.lm_head.weight), plan)

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> ChainDrafter:
        """A chain drafter with the current weights."""
        draft, reads = self.draft, CapturePolicy(self.draft.layer_ids, last_hidden_states=False)
        ids, size = draft.target_ids.clone(), self.target.vocab_size
        return ChainDrafter(draft.decoder(dtype), head.embed, ids, size, reads)
