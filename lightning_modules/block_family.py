"""Base of the block drafters (DFlash, DFlash-2, Domino, DSpark): a block of tokens drafted at once.

The target's features are injected as keys and values. Blocks start at anchors, supervised tokens that are drawn from
every document in every epoch. Slot k of the block at anchor a predicts token a + k (k = 1 .. b-1) through the target's
frozen head. A slot is supervised if its token is in the anchor's document and supervised. Rows whose label is outside
the draft vocabulary (by default the whole one) are dropped from the loss and count as misses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.base import DraftModule, LogitTile, StepOutput, ValidationOutput
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy, StrategySpec, TrainBatch
from specforge.errors import UserError
from specforge.inference.target_engine.base import check_layers
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.losses import Correction, TiledLoss
from specforge.modeling.draft.context_parallel import own
from specforge.modeling.draft.dflash.drafter import BlockDrafter, Corrector
from specforge.modeling.draft.dflash.network import DFlash
from specforge.modeling.draft.dflash.plan import BlockPlan, plan_blocks, sample_anchors, starts
from specforge.modeling.draft.starting import (
    SavedDraft,
    distinct_layers,
    draft_config_for,
    initialise,
    layer_fields,
    load_weights,
)
from specforge.options import NonNegativeInt, PositiveFloat, PositiveInt


class Supervised(NamedTuple):
    """The supervised drafts of a batch."""

    plan: BlockPlan  # names their blocks and labels
    states: Tensor  # [M, H] normed states that the head reads
    labels: Tensor  # [M] draft ids; -1 outside the draft vocabulary
    trained: Tensor  # [M] bool, whether the draft is in the loss


class BlockFamilyModule(DraftModule):
    """Base of the block drafters.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft's config, or fields that replace those derived from the target.
        layer_ids: decoder layers of the target whose outputs the draft reads; by default those of the draft config,
            else five from the second to the third from the end.
        init_from: weights to start from: a SpecForge checkpoint, or an exported or published draft. Random by default.
        anchors: maximum number of blocks per document and epoch.
        decay: γ of the weights exp(-(k-1)/γ); by default 7, 5 or 4 for blocks of at least 16, at least 10 or fewer
            tokens.
        label: the token that counts as correct: the one in the ``data``, or the ``target``'s most likely one.
        anchor_seed: random seed for drawing anchors.
        gamma: tokens drafted per round in validation, from every token of the answers; by default 4, or fewer if a
            block drafts fewer.
        chunk: rows per loss tile; sized to the cache by default. It does not change the result.
    """

    shares_batches: ClassVar[bool] = True
    contiguous: ClassVar[bool] = False  # whether an unsupervised token ends a trained block
    draft: DFlash

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        layer_ids: list[NonNegativeInt] | None = None,
        init_from: str | None = None,
        *,
        anchors: PositiveInt = 512,
        decay: PositiveFloat | None = None,
        label: Literal["data", "target"] = "data",
        anchor_seed: int = 0,
        gamma: PositiveInt | None = None,
        chunk: PositiveInt | None = None,
        **training: Any,
    ) -> None:
        files = TargetFiles.find(target)
        source = SavedDraft.named(init_from, self.export_format)
        config, where = draft_config_for(files, draft_config, self.default_draft_config(files), source)
        if layer_ids is not None:
            config["dflash_config"] = {**config.get("dflash_config", {}), "target_layer_ids": list(layer_ids)}
        draft = self.build(config, where)
        check_layers(CapturePolicy(draft.layer_ids), files.num_layers, files.name)
        draft.apply(self._initialise)
        if source is not None:
            load_weights(draft, source, self.export_format, files)
        features = (AUX_HIDDEN_STATES, LAST_HIDDEN_STATES) if self._needs_target(label) else (AUX_HIDDEN_STATES,)
        spec = StrategySpec(self.algorithm, CapturePolicy(draft.layer_ids), features, draft.drafts, min_tokens=2)
        gamma = gamma or min(4, draft.drafts)
        super().__init__(files, draft, spec, has_vocabulary=init_from is not None, gamma=gamma, **training)
        self._check_positions(gamma)
        self.anchors, self.label, self.anchor_seed, self.chunk = anchors, label, anchor_seed, chunk
        self.decay = decay or next(g for size, g in ((16, 7.0), (10, 5.0), (0, 4.0)) if draft.block_size >= size)

    @classmethod
    def default_layers(cls, num_layers: int) -> list[int]:
        """Outputs of five layers, evenly spaced from the second to the third from the end."""
        return distinct_layers(np.linspace(1, num_layers - 3, 5).round().astype(int).tolist(), num_layers)

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """Five Qwen3 layers of the target's dimensions and blocks of 16; the mask is the last token id."""
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
        """Reject training data in which no sample fills a block, besides the common setup."""
        super().setup(stage)
        if stage != "fit":
            return
        most = max((ref.num_supervised for ref in self.training_samples()), default=None)
        needed = self.draft.drafts + 1
        if most is not None and most < needed:
            raise UserError(
                f"no sample has more than {most} supervised tokens, but a block of {self.draft.block_size} needs "
                f"{needed}, its anchor and {self.draft.drafts} drafts; set a smaller model.draft_config.block_size"
            )

    def training_plan(self, batch: TrainBatch) -> BlockPlan:
        """Plan of blocks at sampled anchors; a document's depend on the document, the epoch and the seed alone."""
        names = batch.sample_ids or [str(number) for number in range(len(batch.lengths))]
        keys = [f"{self.anchor_seed}/{self.current_epoch}/{name}" for name in names]
        anchors = sample_anchors(batch.lengths, batch.spans, self.anchors, keys)
        shape = batch.lengths, batch.spans, anchors, self.draft.drafts, batch.num_tokens
        return plan_blocks(*shape, contiguous=self.contiguous, group=self.context_group)

    def full_plan(self, batch: TrainBatch, positions: int) -> BlockPlan:
        """Plan of a block of ``positions`` drafts at every token of the answers."""
        self._check_positions(positions)
        lengths, spans = batch.lengths, batch.spans
        return plan_blocks(lengths, spans, starts(spans), positions, batch.num_tokens, contiguous=True)

    def _check_positions(self, positions: int) -> None:
        if not 1 <= positions <= self.draft.drafts:
            raise UserError(
                f"gamma is {positions}, but a block of {self.draft.block_size} drafts at most {self.draft.drafts} "
                "tokens per round"
            )

    def training_loss(self, batch: TrainBatch, head: TargetHead) -> StepOutput:
        """Loss of a batch under its plan."""
        plan, drafts = self.batch_plan(batch), self.draft.drafts
        states = self._states(batch, head, plan)
        if not plan.count:
            return self.empty_output(drafts, states)
        trained, result = self._losses(batch, head, plan, states, self.label)
        losses, hits = (
            _by_depth(x, plan, drafts) for x in (torch.where(trained, result.losses, 0.0), result.hits.long())
        )
        rows = _by_depth(torch.ones_like(plan.depth[: plan.count]), plan, drafts)
        return StepOutput(result.loss, plan.count, losses, hits, rows)

    def validation_chains(self, batch: TrainBatch, head: TargetHead, positions: int) -> ValidationOutput:
        """Chains of ``positions`` drafted tokens from every token of the answers, compared with the data."""
        plan = self.full_plan(batch, positions).to(batch.input_ids.device)
        states, count = self._states(batch, head, plan), plan.count
        hits = np.zeros((plan.blocks, positions), dtype=bool)
        loss, num_supervised = torch.zeros(()), 0
        if count:
            trained, result = self._losses(batch, head, plan, states, "data")
            hits[plan.block[:count].cpu(), plan.depth[:count].cpu()] = result.hits[:count].cpu()
            loss = _by_depth(torch.where(trained, result.losses, 0.0), plan, positions)[0]
            num_supervised = int((plan.depth[:count] == 0).sum())
        cuts = np.cumsum([max(0, stop - start - 1) for start, stop in batch.spans])[:-1]
        return ValidationOutput(loss, num_supervised, tuple(np.split(hits, cuts)) if batch.spans else ())

    def _losses(
        self, batch: TrainBatch, head: TargetHead, plan: BlockPlan, states: Tensor, label: str
    ) -> tuple[Tensor, TiledLoss]:
        """Which drafts are in the loss, ``[M]``, and their losses."""
        labels = self.draft.draft_ids(self._labels(batch, head, plan, label))
        trained = (labels >= 0) & (torch.arange(len(labels), device=labels.device) < plan.count)
        return trained, self._loss(batch, head, Supervised(plan, states, labels, trained))

    def _states(self, batch: TrainBatch, head: TargetHead, plan: BlockPlan) -> Tensor:
        """States of the drafts, ``[M, H]``."""
        rows = self.draft.rows(plan.block, plan.depth)
        mask = batch.input_ids.new_full((1,), self.draft.mask_token_id)
        embeds = head.embed(torch.cat([batch.input_ids[plan.anchors], mask]))
        return self.draft(own(batch.features[AUX_HIDDEN_STATES], plan.share), embeds, plan, rows)  # type: ignore[no-any-return]

    def _labels(self, batch: TrainBatch, head: TargetHead, plan: BlockPlan, label: str) -> Tensor:
        if label == "data":
            return batch.input_ids[plan.labels]
        return head.rows(batch.features[LAST_HIDDEN_STATES][plan.tokens - 1]).argmax[plan.token]

    # Defined by each algorithm of the family.

    _initialise = staticmethod(initialise)

    @staticmethod
    def _needs_target(label: str) -> bool:
        """Whether the loss reads the target's last hidden states."""
        return label == "target"

    @abstractmethod
    def _loss(self, batch: TrainBatch, head: TargetHead, drafts: Supervised) -> TiledLoss:
        """Loss of the drafts."""

    def _weights(self, drafts: Supervised) -> Tensor:
        """Weight exp(-d/γ) of each draft, d = 0 being the first of its block; 0 if it is not trained."""
        return torch.exp(drafts.plan.depth / -self.decay) * drafts.trained

    def _correction(self, batch: TrainBatch, head: TargetHead, plan: BlockPlan, states: Tensor) -> Correction | None:
        """Trained addition to the head's logits; None if there is none."""
        return None

    def _add_correction(self, logits: Tensor, extra: Tensor) -> Tensor:
        """Corrected logits; may overwrite ``logits``."""
        return logits.add_(extra)

    def _corrector(self, head: TargetHead, dtype: torch.dtype) -> Corrector | None:
        """The correction as the drafter applies it; None if there is none."""
        return None

    @torch.no_grad()
    def draft_logits(self, batch: TrainBatch, head: TargetHead, positions: int) -> Iterator[LogitTile]:
        """Logits of every supervised token at all ``positions``, 256 labels at a time."""
        plan = self.full_plan(batch, positions).to(batch.input_ids.device)
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
        """A block drafter with the current weights."""
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


def _by_depth(values: Tensor, plan: BlockPlan, drafts: int) -> Tensor:
    """Sums ``[T]`` of the drafts' values ``[M]`` by their place in the block."""
    return values.new_zeros(drafts).index_add(0, plan.depth[: plan.count], values[: plan.count])
