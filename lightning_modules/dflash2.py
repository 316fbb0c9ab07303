"""DFlash-2: DFlash with convolutions across slots and a selector that conditions each token on the previous one.

The network is that of the published checkpoints (see :mod:`specforge.modeling.draft.dflash.dflash2`). Their training is
not published; the objective is that of another public implementation: Σ w (CE of the base logits + α CE among the K
most likely tokens with the selector's scores, given the true previous token) / (supervised drafts of the optimizer
window), w = exp(-(k-1)/γ). A label that is not among the K replaces the last of them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_modules.block_family import BlockFamilyModule, Supervised
from specforge.contracts import TrainBatch
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.losses import Correction, TeacherRows, TiledLoss, tiled_loss
from specforge.losses.blocks import Candidates
from specforge.modeling.draft.dflash.dflash2 import DFlash2, DynamicConv, SelectingCorrector
from specforge.modeling.draft.dflash.export import DFlash2Format
from specforge.modeling.draft.dflash.plan import BlockPlan
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.starting import initialise
from specforge.options import PositiveFloat


class DFlash2Module(BlockFamilyModule):
    """DFlash-2.

    Args:
        draft_config: JSON file of the draft's config, or fields that replace those derived from the target; DFlash-2's
            own (``conv_kernel_size``, ``conv_group_size``, ``selector_rank``, ``selector_top_k``) are in
            ``dflash_config``.
        init_from: weights to start from: a SpecForge checkpoint, or an exported or published draft. Random by default,
            with convolutions that start as identities.
        selector: α, weight of the selector's cross-entropy.
    """

    algorithm: ClassVar[str] = "dflash2"
    architectures: ClassVar[tuple[str, ...]] = ("DFlash2DraftModel",)
    export_format: ClassVar[DraftFormat] = DFlash2Format()
    draft: DFlash2

    def __init__(self, *draft: Any, selector: PositiveFloat = 1.0, **training: Any) -> None:
        super().__init__(*draft, **training)
        self.selector = selector

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """DFlash's config with blocks of 8, two taps, groups of 16 channels, and 16 candidates scored at rank 256."""
        config = super().default_draft_config(target)
        fields = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}
        return {**config, "block_size": 8, "dflash_config": {**config["dflash_config"], **fields}}

    @staticmethod
    def _initialise(module: torch.nn.Module) -> None:
        initialise(module)
        if isinstance(module, DynamicConv):
            module.start_as_identity()

    def _context(self, batch: TrainBatch, plan: BlockPlan, states: Tensor) -> Tensor:
        return self.draft.candidate_selector.context(states, batch.input_ids[plan.labels - 1])

    def _correction(self, batch: TrainBatch, head: TargetHead, plan: BlockPlan, states: Tensor) -> Correction:
        return Correction(self._context(batch, plan, states), self.draft.candidate_selector.successor_codebook)

    def _add_correction(self, logits: Tensor, extra: Tensor) -> Tensor:
        return self.draft.candidate_selector.choose(logits, extra)

    def _corrector(self, head: TargetHead, dtype: torch.dtype) -> SelectingCorrector:
        return SelectingCorrector(self.draft, dtype)

    def _loss(self, batch: TrainBatch, head: TargetHead, drafts: Supervised) -> TiledLoss:
        plan, states, labels, trained = drafts
        chooser = self.draft.candidate_selector
        objective = Candidates(
            self._context(batch, plan, states), chooser.successor_codebook, chooser.top_k, self.selector
        )
        weights = self._weights(drafts)
        output = head.sliced(self.draft.target_ids)
        result = tiled_loss(states, output, TeacherRows(labels), weights, objective, chunk=self.chunk)
        loss = result.loss + self.selector * (objective.entropy() * weights).sum()
        return TiledLoss(loss, result.losses, objective.hits & trained)
