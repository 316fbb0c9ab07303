"""DFlash (arXiv 2602.06036): the plain block drafter, through the target's frozen head.

The loss is Σ w CE / (supervised slots of the optimizer window), w = exp(-(k-1)/γ) or one of D-PACE's weights
(arXiv 2605.18810).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from lightning_modules.block_family import BlockFamilyModule, Supervised
from specforge.contracts import TrainBatch
from specforge.inference.target_head import TargetHead
from specforge.losses import TeacherRows, TiledLoss, tiled_loss
from specforge.losses.blocks import DPace
from specforge.modeling.draft.dflash.export import DFlashFormat
from specforge.modeling.draft.format import DraftFormat
from specforge.options import Share


class DFlashModule(BlockFamilyModule):
    """DFlash. The option ``weights`` gives D-PACE.

    Args:
        weights: ``decay``: exp(-(k-1)/γ) by slot; ``dpace``: how much a right token adds to the expected accepted
            length; ``prefix`` or ``continuation``: one factor of that alone.
        alpha: smoothing of D-PACE's confidence.
    """

    algorithm: ClassVar[str] = "dflash"
    architectures: ClassVar[tuple[str, ...]] = ("DFlashDraftModel",)
    export_format: ClassVar[DraftFormat] = DFlashFormat()

    def __init__(
        self,
        *draft: Any,
        weights: Literal["decay", "dpace", "prefix", "continuation"] = "decay",
        alpha: Share = 0.5,
        **training: Any,
    ) -> None:
        super().__init__(*draft, **training)
        self.weights, self.alpha = weights, alpha

    def _loss(self, batch: TrainBatch, head: TargetHead, drafts: Supervised) -> TiledLoss:
        plan, states, labels, trained = drafts
        output, teacher = head.sliced(self.draft.target_ids), TeacherRows(labels)
        if self.weights == "decay":
            return tiled_loss(states, output, teacher, self._weights(drafts), chunk=self.chunk)
        weigh = DPace(plan.block, plan.depth, self.draft.drafts, self.alpha, self.weights)
        weights = trained.to(torch.promote_types(states.dtype, torch.float32))
        return tiled_loss(states, output, teacher, weights, weigh=weigh, firsts=plan.firsts, chunk=self.chunk)
