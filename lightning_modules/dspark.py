"""DSpark: a block of drafts, each corrected by the token before it, with a confidence (arXiv 2607.05147).

Slot k of the block at anchor a predicts token a + 1 + k (k = 0 .. b-1), given the true token a + k. The loss is
Σ w (0.1 CE + 0.9 ‖q - p‖₁ + 1.0 BCE(confidence, 1 - ‖q - p‖₁ / 2)) / (supervised slots of the optimizer window),
w = exp(-k/γ); p is the target's distribution, q the draft's, and the target of the BCE carries no gradient. An
unsupervised token ends its block.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.block_family import BlockFamilyModule, Supervised
from specforge.contracts import LAST_HIDDEN_STATES, TrainBatch
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.losses import Correction, TeacherRows, TiledLoss, tiled_loss
from specforge.losses.blocks import Acceptance
from specforge.modeling.draft.dflash.dspark import DSpark, MarkovCorrector
from specforge.modeling.draft.dflash.export import DSparkFormat
from specforge.modeling.draft.dflash.plan import BlockPlan
from specforge.modeling.draft.format import DraftFormat
from specforge.options import NonNegativeFloat


class DSparkModule(BlockFamilyModule):
    """DSpark.

    Args:
        label: the token of the cross-entropy: the one in the ``data``, or the ``target``'s most likely one.
        ce: weight of the cross-entropy.
        l1: weight of ‖q - p‖₁, which is twice the total variation.
        confidence: weight of the confidence's binary cross-entropy.
    """

    algorithm: ClassVar[str] = "dspark"
    architectures: ClassVar[tuple[str, ...]] = ("Qwen3DSparkModel",)
    export_format: ClassVar[DraftFormat] = DSparkFormat()
    contiguous: ClassVar[bool] = True
    draft: DSpark

    def __init__(
        self,
        *draft: Any,
        ce: NonNegativeFloat = 0.1,
        l1: NonNegativeFloat = 0.9,
        confidence: NonNegativeFloat = 1.0,
        **training: Any,
    ) -> None:
        if ce + l1 == 0:
            raise UserError("model: ce and l1 are both 0, so nothing would be learned; set one of them")
        super().__init__(*draft, **training)
        self.ce, self.l1, self.confidence = ce, l1, confidence

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """DFlash's config with blocks of 7 and a vanilla Markov head of rank 256."""
        return {
            **super().default_draft_config(target),
            "block_size": 7,
            "markov_rank": 256,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        }

    @staticmethod
    def _needs_target(label: str) -> bool:
        return True

    def _before(self, batch: TrainBatch, plan: BlockPlan, states: Tensor) -> Tensor:
        return self.draft.markov_head.embed(batch.input_ids[plan.labels - 1], states.dtype)

    def _correction(self, batch: TrainBatch, head: TargetHead, plan: BlockPlan, states: Tensor) -> Correction:
        return self._corrected(self._before(batch, plan, states), plan, states)

    def _corrected(self, before: Tensor, plan: BlockPlan, states: Tensor) -> Correction:
        count = plan.count
        real = self.draft.corrections(before[:count], states[:count], plan.block[:count], plan.depth[:count])
        padded = F.pad(real, (0, 0, 0, len(states) - count))
        return Correction(padded, self.draft.markov_head.markov_w2.weight)

    def _corrector(self, head: TargetHead, dtype: torch.dtype) -> MarkovCorrector:
        return MarkovCorrector(self.draft, dtype)

    def _loss(self, batch: TrainBatch, head: TargetHead, drafts: Supervised) -> TiledLoss:
        plan, states, labels, _ = drafts
        output = head.sliced(self.draft.target_ids).to(states.dtype)
        last = batch.features[LAST_HIDDEN_STATES][plan.tokens - 1].to(states.dtype)
        log_sum = head.rows(last).log_sum if len(output) < len(head.head) else None
        # Drafts of one token follow one another and share a teacher row.
        order = plan.token.argsort(stable=True)
        teacher = TeacherRows(labels[order], last, output, log_sum, plan.token[order], plan.repeats)
        objective = Acceptance(self.ce, self.l1, states)
        before, weights = self._before(batch, plan, states), self._weights(drafts)
        result = tiled_loss(
            states,
            output,
            teacher,
            weights[order].unsqueeze(1),
            objective,
            students=order.unsqueeze(1),
            correction=self._corrected(before, plan, states),
            chunk=self.chunk,
        )
        back, loss = order.argsort(), result.loss
        logits = self.draft.confidence(before, states)
        if logits is not None and self.confidence:
            aim = objective.accept[back]
            entropy = F.binary_cross_entropy_with_logits(logits.to(aim.dtype), aim, reduction="none")
            loss = loss + self.confidence * (entropy * weights).sum()
        return TiledLoss(loss, result.losses[back, 0], result.hits[back, 0])
