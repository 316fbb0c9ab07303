"""DFlash-2: DFlash whose slots read their neighbours, and whose tokens are chosen in view of the one before.

The network is that of the published checkpoints (see :mod:`specforge.modeling.draft.dflash.dflash2`). How they were
trained is not published; the objective is another public implementation's: Σ w (CE of the base logits + α CE among
the K likeliest tokens with the selector's scores, given the true token before) / (supervised drafts of the optimizer
window), w = exp(-(k-1)/γ). A label that is not among the K replaces the last of them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_modules.dflash import DFlashModule, Supervised
from lightning_modules.optimizers import OptimizerOptions
from specforge.contracts import TrainBatch
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.losses.blocks import BlockLoss, Correction, block_loss
from specforge.losses.candidates import Candidates
from specforge.modeling.draft.dflash.dflash2 import DFlash2, DynamicConv, SelectingCorrector
from specforge.modeling.draft.dflash.plan import BlockPlan
from specforge.modeling.draft.starting import initialise
from specforge.options import NonNegativeInt, PositiveFloat, PositiveInt


class DFlash2Module(DFlashModule):
    """DFlash-2.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft, or fields that replace those derived from the target; DFlash-2's own
            (``conv_kernel_size``, ``conv_group_size``, ``selector_rank``, ``selector_top_k``) are in
            ``dflash_config``.
        layer_ids: decoder layers of the target whose outputs the draft reads; by default those of the draft
            config, else five from the second to the third from the end.
        init_from: start from a SpecForge checkpoint or a draft in the field's own form (weights only). By default
            at random, the convolutions passing on what comes in.
        anchors: most blocks of a document in an epoch.
        decay: γ of the weights; by default 7, 5 or 4 for blocks of 16, 10 or fewer tokens.
        selector: α, weight of the selector's cross-entropy.
        label: the token that a slot has to get right: the one in the ``data``, or the ``target``'s likeliest.
        anchor_seed: of the anchors.
        gamma: tokens drafted a round in validation, from every token of the answers; by default 4, or fewer if
            a block drafts fewer.
        optimizer: optimizer and schedule.
        chunk: rows of a loss tile; by default what fits the cache. It does not change the result.
    """

    algorithm: ClassVar[str] = "dflash2"
    architectures: ClassVar[tuple[str, ...]] = ("DFlash2DraftModel",)
    draft: DFlash2

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        layer_ids: list[NonNegativeInt] | None = None,
        init_from: str | None = None,
        anchors: PositiveInt = 512,
        decay: PositiveFloat | None = None,
        selector: PositiveFloat = 1.0,
        label: Literal["data", "target"] = "data",
        anchor_seed: int = 0,
        gamma: PositiveInt | None = None,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 - jsonargparse shows the defaults
        chunk: PositiveInt | None = None,
    ) -> None:
        super().__init__(
            target,
            draft_config,
            layer_ids,
            init_from,
            anchors,
            decay=decay,
            label=label,
            anchor_seed=anchor_seed,
            gamma=gamma,
            optimizer=optimizer,
            chunk=chunk,
        )
        self.selector = selector

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """DFlash's, with blocks of 8, two taps, groups of 16 channels, and 16 candidates scored at rank 256."""
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

    def _loss(self, batch: TrainBatch, head: TargetHead, drafts: Supervised) -> BlockLoss:
        plan, states, labels, trained = drafts
        chooser = self.draft.candidate_selector
        objective = Candidates(
            self._context(batch, plan, states), chooser.successor_codebook, chooser.top_k, self.selector
        )
        weights = self._decay(plan) * trained
        output = head.sliced(self.draft.target_ids)
        result = block_loss(states, output, labels, weights, objective=objective, chunk=self.chunk)
        loss = result.loss + self.selector * (objective.entropy() * weights).sum()
        return BlockLoss(loss, result.losses, objective.hits & trained)
