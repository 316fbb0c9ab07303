"""Domino: a block drafted in parallel, corrected by a GRU over the block's tokens (arXiv 2605.29707).

Draft d of the block at anchor a predicts token a + 1 + d (d = 0, 1, ...) from the base logits and, from
``pure_draft_prefix_len`` on, a correction that has read the true tokens a .. a + d. The loss is
Σ w ((1 - λ) CE(final logits) + λ CE(base logits)) / (supervised drafts of the optimizer window), w = exp(-d/γ). λ falls
linearly with the optimizer step from ``base_start`` to 0 over ``base_decay`` of the run, so that the base drafts well
before it is corrected. Outside a run (evaluation), λ = 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.block_family import BlockFamilyModule, Supervised
from specforge.contracts import TrainBatch
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.losses import Correction, TeacherRows, TiledLoss, tiled_loss
from specforge.modeling.draft.dflash.domino import Domino, DominoCorrector
from specforge.modeling.draft.dflash.export import DominoFormat
from specforge.modeling.draft.dflash.plan import BlockPlan
from specforge.modeling.draft.format import DraftFormat
from specforge.options import PositiveInt, Share


class DominoModule(BlockFamilyModule):
    """Domino.

    Args:
        draft_config: JSON file of the draft's config, or fields that replace those derived from the target; Domino's
            own (``shift_label``, ``pure_draft_prefix_len``, ``gru_hidden_dim``, ``emb_dim``) are in ``dflash_config``.
        base_start: λ at the first step, the weight of the base logits' cross-entropy.
        base_decay: share of the run's steps over which λ falls to 0; 0 trains on the final logits alone.

    Attributes:
        horizon: optimizer steps until λ is 0; set when training starts.
    """

    algorithm: ClassVar[str] = "domino"
    architectures: ClassVar[tuple[str, ...]] = ("DominoDraftModel",)
    export_format: ClassVar[DraftFormat] = DominoFormat()
    draft: Domino

    def __init__(
        self, *draft: Any, anchors: PositiveInt = 256, base_start: Share = 1.0, base_decay: Share = 0.5, **training: Any
    ) -> None:
        super().__init__(*draft, anchors=anchors, **training)
        self.base_start, self.base_decay, self.horizon = base_start, base_decay, 0.0

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """DFlash's config with a GRU of 1,024, a correction of rank 256, shifted labels and one uncorrected draft."""
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
        """Set the horizon, now that the length of the run is known."""
        super().on_train_start()
        self.horizon = self.base_decay * self._total_steps()

    @property
    def base_share(self) -> float:
        """λ of the current step."""
        if not self.training or not self.horizon:
            return 0.0
        return self.base_start * max(0.0, 1 - self.global_step / self.horizon)

    def _correction(self, batch: TrainBatch, head: TargetHead, plan: BlockPlan, states: Tensor) -> Correction:
        count = plan.count
        slots = torch.arange(self.draft.drafts, device=states.device)
        # Tokens after the end of a block's document are read too, but no supervised draft depends on them.
        read = (plan.anchors[: plan.blocks].unsqueeze(1) + slots).clamp(max=batch.num_tokens - 1)
        # One product per token instead of per slot, because blocks overlap. On a CPU one per distinct token; to count
        # them, the host would wait for a GPU.
        ids, tokens = batch.input_ids, read
        if not ids.is_cuda:
            ids, tokens = batch.input_ids[read].unique(return_inverse=True)
        real = self.draft.corrections(head.embed(ids), tokens, states[:count], plan.block[:count], plan.depth[:count])
        return Correction(F.pad(real, (0, 0, 0, len(states) - count)), self.draft.matrix)

    def _corrector(self, head: TargetHead, dtype: torch.dtype) -> DominoCorrector:
        return DominoCorrector(self.draft, head.embed, dtype)

    def _loss(self, batch: TrainBatch, head: TargetHead, drafts: Supervised) -> TiledLoss:
        plan, states, labels, _ = drafts
        return tiled_loss(
            states,
            head.sliced(self.draft.target_ids),
            TeacherRows(labels),
            self._weights(drafts),
            correction=self._correction(batch, head, plan, states),
            base_share=self.base_share,
            chunk=self.chunk,
        )
