"""Domino: a block drafted in parallel, corrected by a GRU over the tokens of the block (arXiv 2605.29707).

Draft d of the block at anchor a predicts token a + 1 + d (d = 0, 1, ...) from the base logits and, from
``pure_draft_prefix_len`` on, a correction that has read the true tokens a .. a + d. The loss is
Σ w ((1 - λ) CE(final logits) + λ CE(base logits)) / (supervised drafts of the optimizer window), w = exp(-d/γ). λ falls
from ``base_start`` to 0, linearly in the optimizer's steps, over ``base_decay`` of the run, so that the base drafts
well before it is corrected; without a run (evaluation), λ = 0.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.dflash import DFlashModule, Supervised
from lightning_modules.optimizers import OptimizerOptions
from specforge.contracts import TrainBatch
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.losses.blocks import BlockLoss, Correction, block_loss
from specforge.modeling.draft.dflash.domino import Domino, DominoCorrector
from specforge.modeling.draft.dflash.export import DominoFormat
from specforge.modeling.draft.dflash.plan import BlockPlan
from specforge.modeling.draft.format import DraftFormat
from specforge.options import NonNegativeInt, PositiveFloat, PositiveInt, Share


class DominoModule(DFlashModule):
    """Domino.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft, or fields that replace those derived from the target; Domino's own
            (``shift_label``, ``pure_draft_prefix_len``, ``gru_hidden_dim``, ``emb_dim``) are in ``dflash_config``.
        layer_ids: decoder layers of the target whose outputs the draft reads; by default those of the draft
            config, else five from the second to the third from the end.
        init_from: start from a SpecForge checkpoint or a draft in the field's own form (weights only). By default
            at random.
        anchors: most blocks of a document in an epoch.
        decay: γ of the weights; by default 7, 5 or 4 for blocks of 16, 10 or fewer tokens.
        base_start: λ at the first step.
        base_decay: share of the run's steps in which λ falls to 0; 0 trains on the final logits alone.
        label: the token that a slot has to get right: the one in the ``data``, or the ``target``'s likeliest.
        anchor_seed: of the anchors.
        gamma: tokens drafted a round in validation, from every token of the answers; by default 4, or fewer if
            a block drafts fewer.
        optimizer: optimizer and schedule.
        chunk: rows of a loss tile; by default what fits the cache. It does not change the result.

    Attributes:
        horizon: optimizer steps until λ is 0; set when training starts.
    """

    algorithm: ClassVar[str] = "domino"
    architectures: ClassVar[tuple[str, ...]] = ("DominoDraftModel",)
    export_format: ClassVar[DraftFormat] = DominoFormat()
    draft: Domino

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        layer_ids: list[NonNegativeInt] | None = None,
        init_from: str | None = None,
        anchors: PositiveInt = 256,
        decay: PositiveFloat | None = None,
        base_start: Share = 1.0,
        base_decay: Share = 0.5,
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
        self.base_start, self.base_decay, self.horizon = base_start, base_decay, 0.0

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """DFlash's, with a GRU of 1,024 and a correction of 256, shifted labels and one uncorrected draft."""
        config = super().default_draft_config(target)
        fields = {
            "projector_type": "domino",
            "shift_label": True,
            "pure_draft_prefix_len": 1,
            "gru_hidden_dim": 1024,
            "emb_dim": 256,
        }
        return {**config, "dflash_config": {**config["dflash_config"], **fields}}

    def on_train_start(self) -> None:
        """Only now is the length of the run known."""
        super().on_train_start()
        self.horizon = self.base_decay * self._total_steps()

    @property
    def base_share(self) -> float:
        """λ of this step."""
        if not self.training or not self.horizon:
            return 0.0
        return self.base_start * max(0.0, 1 - self.global_step / self.horizon)

    def _correction(self, batch: TrainBatch, head: TargetHead, plan: BlockPlan, states: Tensor) -> Correction:
        count = plan.count
        slots = torch.arange(self.draft.drafts, device=states.device)
        # What lies behind a block's document is read too, but by none of its drafts.
        places = (plan.anchors[: plan.blocks].unsqueeze(1) + slots).clamp(max=batch.num_tokens - 1)
        ids, tokens = batch.input_ids[places].unique(return_inverse=True)
        real = self.draft.corrections(head.embed(ids), tokens, states[:count], plan.block[:count], plan.depth[:count])
        return Correction(F.pad(real, (0, 0, 0, len(states) - count)), self.draft.matrix)

    def _corrector(self, head: TargetHead, dtype: torch.dtype) -> DominoCorrector:
        return DominoCorrector(self.draft, head.embed, dtype)

    def _loss(self, batch: TrainBatch, head: TargetHead, drafts: Supervised) -> BlockLoss:
        plan, states, labels, trained = drafts
        return block_loss(
            states,
            head.sliced(self.draft.target_ids),
            labels,
            self._decay(plan) * trained,
            correction=self._correction(batch, head, plan, states),
            base_share=self.base_share,
            chunk=self.chunk,
        )
