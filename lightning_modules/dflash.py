"""DFlash: drafts a block of tokens at once, the target's features injected as keys and values (arXiv 2602.06036).

Blocks start at anchors drawn from every document: supervised tokens, anew in every epoch. Slot k of the block
at anchor a predicts token a + k (k = 1 .. b-1) through the target's frozen head. The loss is Σ w CE /
(supervised slots of the optimizer window), w = exp(-(k-1)/γ) or one of D-PACE's weights (arXiv 2605.18810). A
slot counts where its token is of the anchor's document and supervised; rows whose label is outside the draft
vocabulary (by default there is no such) are dropped from the loss and count as misses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.base import DraftModule, LogitTile, StepOutput
from lightning_modules.optimizers import OptimizerOptions
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy, StrategySpec, TrainBatch
from specforge.errors import UserError
from specforge.inference.target_engine.base import check_layers
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.losses.blocks import BlockLoss, Correction, DPace, block_loss
from specforge.modeling.draft.dflash.drafter import BlockDrafter, Corrector
from specforge.modeling.draft.dflash.export import DFlashFormat
from specforge.modeling.draft.dflash.network import DFlash
from specforge.modeling.draft.dflash.plan import BlockPlan, plan_blocks, sample_anchors, starts
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.starting import (
    SavedDraft,
    distinct_layers,
    draft_config_for,
    initialise,
    layer_fields,
    load_weights,
)
from specforge.options import NonNegativeInt, PositiveFloat, PositiveInt, Share

Weights = Literal["decay", "dpace", "prefix", "continuation"]


class Supervised(NamedTuple):
    """The drafts of a batch that have a label.

    Attributes:
        plan: of which blocks.
        states: ``[M, H]`` what the head reads.
        labels: ``[M]`` draft ids; -1 outside the draft vocabulary.
        trained: ``[M]`` bool, which are in the loss.
    """

    plan: BlockPlan
    states: Tensor
    labels: Tensor
    trained: Tensor


class DFlashModule(DraftModule):
    """DFlash and, by ``weights``, D-PACE.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft, or fields that replace those derived from the target.
        layer_ids: decoder layers of the target whose outputs the draft reads; by default those of the draft
            config, else five from the second to the third from the end.
        init_from: start from a SpecForge checkpoint or a draft in the field's own form (weights only). By default
            at random.
        anchors: most blocks of a document in an epoch.
        weights: ``decay``: exp(-(k-1)/γ) by slot; ``dpace``: what a right token adds to the expected accepted
            length; ``prefix`` or ``continuation``: one factor of that alone.
        decay: γ of ``decay``; by default 7, 5 or 4 for blocks of 16, 10 or fewer tokens.
        alpha: smoothing of D-PACE's confidence.
        label: the token that a slot has to get right: the one in the ``data``, or the ``target``'s likeliest.
        anchor_seed: of the anchors.
        gamma: tokens drafted a round in validation, from every token of the answers; by default 4, or fewer if
            a block drafts fewer.
        optimizer: optimizer and schedule.
        chunk: rows of a loss tile; by default what fits the cache. It does not change the result.
    """

    algorithm: ClassVar[str] = "dflash"
    architectures: ClassVar[tuple[str, ...]] = ("DFlashDraftModel",)
    export_format: ClassVar[DraftFormat] = DFlashFormat()
    contiguous: ClassVar[bool] = False
    draft: DFlash

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        layer_ids: list[NonNegativeInt] | None = None,
        init_from: str | None = None,
        anchors: PositiveInt = 512,
        weights: Weights = "decay",
        decay: PositiveFloat | None = None,
        alpha: Share = 0.5,
        label: Literal["data", "target"] = "data",
        anchor_seed: int = 0,
        gamma: PositiveInt | None = None,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 - jsonargparse shows the defaults
        chunk: PositiveInt | None = None,
    ) -> None:
        files = TargetFiles.find(target)
        source = SavedDraft.named(init_from, self.export_format)
        draft = self._build(files, draft_config, layer_ids, source)
        check_layers(CapturePolicy(draft.layer_ids), files.num_layers, files.name)
        draft.apply(self._initialise)
        if source is not None:
            load_weights(draft, source, self.export_format)
        features = (AUX_HIDDEN_STATES, LAST_HIDDEN_STATES) if self._needs_target(label) else (AUX_HIDDEN_STATES,)
        spec = StrategySpec(self.algorithm, CapturePolicy(draft.layer_ids), features, draft.drafts, min_tokens=2)
        gamma = gamma or min(4, draft.drafts)
        super().__init__(files, draft, spec, has_vocabulary=init_from is not None, optimizer=optimizer, gamma=gamma)
        self._check_positions(gamma)
        self.anchors, self.weights, self.alpha, self.label = anchors, weights, alpha, label
        self.decay = decay or next(g for size, g in ((16, 7.0), (10, 5.0), (0, 4.0)) if draft.block_size >= size)
        self.anchor_seed, self.chunk = anchor_seed, chunk

    @classmethod
    def _build(
        cls,
        files: TargetFiles,
        given: str | dict[str, Any] | None,
        layer_ids: list[int] | None,
        source: SavedDraft | None,
    ) -> DFlash:
        config, where = draft_config_for(files, given, cls.default_draft_config(files), source)
        if layer_ids is not None:
            config["dflash_config"] = {**config.get("dflash_config", {}), "target_layer_ids": list(layer_ids)}
        return cls.build(config, where)  # type: ignore[no-any-return]

    @classmethod
    def default_layers(cls, num_layers: int) -> list[int]:
        """Outputs of five layers, evenly from the second to the third from the end."""
        return distinct_layers(np.linspace(1, num_layers - 3, 5).round().astype(int).tolist(), num_layers)

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """Five Qwen3 layers of the target's own dimensions, blocks of 16; the mask is the last token id."""
        return {
            **layer_fields(target),
            "architectures": list(cls.architectures),
            "model_type": "qwen3",
            "target_hidden_size": target.hidden_size,
            "num_hidden_layers": 5,
            "num_target_layers": target.num_layers,
            "tie_word_embeddings": False,
            "block_size": 16,
            "dflash_config": {
                "mask_token_id": target.vocab_size - 1,
                "target_layer_ids": cls.default_layers(target.num_layers),
            },
        }

    def setup(self, stage: str) -> None:
        """Refuse to train on samples none of which fills a block.

        Raises:
            UserError: says how many supervised tokens there are, and how many a block needs.
        """
        super().setup(stage)
        if stage != "fit" or self.data is None:
            return
        most = max((sample.num_supervised for sample in self.data.sample_refs()), default=None)
        needed = self.draft.drafts + 1
        if most is not None and most < needed:
            raise UserError(
                f"no sample has more than {most} supervised tokens, but a block of {self.draft.block_size} needs "
                f"{needed}, its anchor and {self.draft.drafts} drafts; set a smaller model.draft_config.block_size"
            )

    def compute(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> StepOutput:
        """Losses of a batch; with ``positions``, chains of that length from every token of the answers."""
        depths = positions or self.draft.drafts
        plan = self._plan(batch, positions)
        states = self._states(batch, head, plan)
        if not plan.count:
            return self.empty_output(depths, states, batch.spans if positions else ())
        labels = self.draft.draft_ids(self._labels(batch, head, plan, "data" if positions else self.label))
        trained = (labels >= 0) & (torch.arange(len(labels), device=labels.device) < plan.count)
        result = self._loss(batch, head, Supervised(plan, states, labels, trained))
        depth = plan.depth[: plan.count]
        zeros = torch.zeros(depths, dtype=result.losses.dtype, device=states.device)
        losses = zeros.index_add(0, depth, torch.where(trained, result.losses, 0.0)[: plan.count])
        hits = zeros.long().index_add(0, depth, result.hits[: plan.count].long())
        count = depth.bincount(minlength=depths)
        if not positions:
            return StepOutput(result.loss, plan.count, losses, hits, count)
        found = np.zeros((plan.blocks, depths), dtype=bool)
        found[plan.block[: plan.count].cpu(), depth.cpu()] = result.hits[: plan.count].cpu()
        cuts = np.cumsum([max(0, stop - first - 1) for first, stop in batch.spans])[:-1]
        return StepOutput(result.loss, int(count[0]), losses, hits, count, tuple(np.split(found, cuts)))

    def _plan(self, batch: TrainBatch, positions: int | None) -> BlockPlan:
        """Sampled blocks in training; a block for every token of the answers in evaluation."""
        lengths, spans = batch.lengths, batch.spans
        if positions:
            self._check_positions(positions)
            anchors = starts(spans)
        else:
            names = batch.sample_ids or [str(number) for number in range(len(lengths))]
            keys = [f"{self.anchor_seed}/{self.current_epoch}/{name}" for name in names]
            anchors = sample_anchors(lengths, spans, self.anchors, keys)
        depths, contiguous = positions or self.draft.drafts, self.contiguous or bool(positions)
        plan = plan_blocks(lengths, spans, anchors, depths, batch.num_tokens, contiguous=contiguous)
        return plan.to(batch.input_ids.device)

    def _check_positions(self, positions: int) -> None:
        if not 1 <= positions <= self.draft.drafts:
            raise UserError(
                f"gamma is {positions}, but a block of {self.draft.block_size} drafts at most {self.draft.drafts} "
                "tokens a round"
            )

    def _states(self, batch: TrainBatch, head: TargetHead, plan: BlockPlan) -> Tensor:
        """States of the drafts, ``[M, H]``."""
        rows = self.draft.rows(plan.block, plan.depth)
        mask = batch.input_ids.new_tensor([self.draft.mask_token_id])
        embeds = head.embed(torch.cat([batch.input_ids[plan.anchors], mask]))
        return self.draft(batch.features[AUX_HIDDEN_STATES], embeds, plan, rows)  # type: ignore[no-any-return]

    def _labels(self, batch: TrainBatch, head: TargetHead, plan: BlockPlan, label: str) -> Tensor:
        if label == "data":
            return batch.input_ids[plan.labels]
        tokens, inverse = plan.labels.unique(return_inverse=True)
        return head.rows(batch.features[LAST_HIDDEN_STATES][tokens - 1]).argmax[inverse]

    # What drafters on this backbone change.

    _initialise = staticmethod(initialise)

    @staticmethod
    def _needs_target(label: str) -> bool:
        """Whether the loss reads the target's last hidden states."""
        return label == "target"

    def _loss(self, batch: TrainBatch, head: TargetHead, drafts: Supervised) -> BlockLoss:
        """Loss of the drafts."""
        plan, states, labels, trained = drafts
        output = head.sliced(self.draft.target_ids)
        if self.weights == "decay":
            return block_loss(states, output, labels, self._decay(plan) * trained, chunk=self.chunk)
        weigh = DPace(plan.block, plan.depth, self.draft.drafts, self.alpha, self.weights)
        weights = trained.to(torch.promote_types(states.dtype, torch.float32))
        return block_loss(states, output, labels, weights, weigh=weigh, firsts=plan.firsts, chunk=self.chunk)

    def _decay(self, plan: BlockPlan) -> Tensor:
        """Weight exp(-d/γ) of each draft, d = 0 being the first of its block."""
        return torch.exp(plan.depth / -self.decay)

    def _correction(self, batch: TrainBatch, head: TargetHead, plan: BlockPlan, states: Tensor) -> Correction | None:
        """What is added to the head's logits."""
        return None

    def _add_correction(self, logits: Tensor, extra: Tensor) -> Tensor:
        """The logits with it."""
        return logits.add_(extra)

    def _corrector(self, head: TargetHead, dtype: torch.dtype) -> Corrector | None:
        """The same when decoding."""
        return None

    @torch.no_grad()
    def draft_logits(self, batch: TrainBatch, head: TargetHead, positions: int) -> Iterator[LogitTile]:
        """Logits of every supervised token's ``positions`` drafts, 256 labels at a time."""
        plan = self._plan(batch, positions)
        states = self._states(batch, head, plan)
        correction = self._correction(batch, head, plan, states) if plan.count else None
        rows = plan.labels.new_full((batch.num_tokens, positions), -1)
        count = plan.count
        rows[plan.labels[:count], plan.depth[:count]] = torch.arange(count, device=rows.device)
        output = head.sliced(self.draft.target_ids).to(states.dtype)
        for labels in (rows >= 0).any(1).nonzero().flatten().split(256):
            picked = rows[labels]
            at = picked.clamp(min=0)
            logits = output.scores(states[at])
            if correction is not None:
                extra = F.linear(correction.states[at], correction.matrix.to(states.dtype))
                logits = self._add_correction(logits, extra)
            logits = logits.float().masked_fill_((picked < 0).unsqueeze(-1), 0.0)
            yield LogitTile(labels, logits, batch.features[LAST_HIDDEN_STATES][labels - 1])

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> BlockDrafter:
        """A block drafter with the present weights."""
        draft = self.draft
        return BlockDrafter(
            draft.decoder(dtype),
            head.embed,
            head.sliced(draft.target_ids).to(dtype),
            draft.target_ids.clone(),
            self.target.vocab_size,
            CapturePolicy(draft.layer_ids, last_hidden_states=False),
            block_size=draft.block_size,
            mask_token_id=draft.mask_token_id,
            first=1 - draft.shift,
            corrector=self._corrector(head, dtype),
        )
