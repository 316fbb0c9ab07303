"""Medusa-1: heads on the frozen target's last hidden state (arXiv 2401.10774).

Head k (from 0) predicts token p+2+k from the last hidden state of token p; the target itself predicts p+1. The loss
is Σ_k decay^k Σ_rows loss / (supervised tokens of the optimizer window), with cross-entropy on the data tokens.
Rows whose label is outside the draft vocabulary are dropped from the loss and count as misses.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.base import DraftModule, LogitTile, StepOutput, draft_config_for, load_weights
from lightning_modules.optimizers import OptimizerOptions
from specforge.contracts import LAST_HIDDEN_STATES, CapturePolicy, StrategySpec, TrainBatch
from specforge.decoding.heads import HeadsDrafter
from specforge.errors import UserError
from specforge.eval.tau import chains
from specforge.export import DraftFormat
from specforge.export.heads import HeadsFormat
from specforge.losses import TeacherRows, chunked_distillation, make_objective
from specforge.modeling.draft import build_draft
from specforge.modeling.draft.heads import HeadsDraft
from specforge.modeling.draft.unroll import UnrollPlan, plan_unroll
from specforge.modeling.target_head import TargetHead
from specforge.target_files import TargetFiles


class MedusaModule(DraftModule):
    """Medusa-1.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft, or fields that replace those derived from the target:
            ``num_draft_heads`` (K, default 4), ``num_head_blocks`` (residual blocks of a head, default 1),
            ``draft_vocab_size``.
        init_from: start from a SpecForge checkpoint or a draft on disk (weights only). By default from the target:
            its head's rows in every linear head, and blocks at zero.
        head_decay: weight of head k is ``head_decay ** k``.
        loss: ``kl``, ``reverse_kl``, ``js``, ``tv``, ``ce``, ``lk_alpha``, ``lk_lambda``, or weights by those names.
        lk_eta: η of ``lk_lambda``.
        label: the token that a row has to get right: the one in the ``data``, or the ``target``'s likeliest.
        gamma: tokens drafted a round in validation; at most K.
        optimizer: optimizer and schedule.
        chunk: labels of a loss tile; by default what fits the cache. It does not change the result.
    """

    algorithm: ClassVar[str] = "medusa"
    architectures: ClassVar[tuple[str, ...]] = ("MedusaDraft",)
    export_format: ClassVar[DraftFormat] = HeadsFormat()
    draft: HeadsDraft

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        init_from: str | None = None,
        head_decay: float = 0.8,
        loss: str | dict[str, float] = "ce",
        lk_eta: float = 3.0,
        label: Literal["data", "target"] = "data",
        gamma: int = 4,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 - jsonargparse shows the defaults
        chunk: int | None = None,
    ) -> None:
        files = TargetFiles.find(target)
        config, where = draft_config_for(files, draft_config, self.default_draft_config(files))
        draft = build_draft(config, where)
        if not isinstance(draft, HeadsDraft) or draft.architecture not in self.architectures:
            raise UserError(f"{where}: {draft.architecture} is not a draft of {self.algorithm}")
        if not 1 <= gamma <= len(draft.heads):
            raise UserError(f"model: gamma is {gamma}, but the draft has {len(draft.heads)} heads")
        if init_from is not None:
            load_weights(draft, Path(init_from), self.export_format)
        spec = StrategySpec(
            algorithm=self.algorithm,
            capture=self.capture_policy(files),
            features=(LAST_HIDDEN_STATES,),
            positions=len(draft.heads),
            min_tokens=3,
        )
        super().__init__(
            files, draft, spec, has_vocabulary=init_from is not None, optimizer=optimizer, gamma=gamma
        )
        self.starts_at_target = init_from is None
        self.head_decay, self.label, self.chunk = head_decay, label, chunk
        self.objective = make_objective(loss, lk_eta)

    def setup(self, stage: str) -> None:
        """Copy the target's head; only now is the draft vocabulary known."""
        super().setup(stage)
        if self.starts_at_target and stage == "fit":
            self.draft.start_from_target(self.target)

    @classmethod
    def capture_policy(cls, target: TargetFiles, layer_ids: list[int] | None = None) -> CapturePolicy:
        """The last hidden state alone.

        Raises:
            UserError: layers are given.
        """
        if layer_ids:
            raise UserError(f"layers {layer_ids}: {cls.algorithm} reads the last hidden state alone")
        return CapturePolicy((), last_hidden_states=True)

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """Four heads of one block over at most 32,000 tokens."""
        return {
            "architectures": [cls.architectures[0]],
            "hidden_size": target.hidden_size,
            "vocab_size": target.vocab_size,
            "draft_vocab_size": min(32000, target.vocab_size),
            "num_draft_heads": 4,
            "num_head_blocks": 1,
        }

    def compute(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> StepOutput:
        """Losses of a batch; with ``positions``, chains of that length against the data tokens."""
        steps = positions or len(self.draft.heads)
        plan, states = self._states(batch, head, steps)
        if not plan.count:
            return self.empty_output(steps, states, batch.spans if positions else ())
        last = batch.features[LAST_HIDDEN_STATES][plan.labels - 1]
        labels, log_sum = self._labels(batch, head, plan, last, "data" if positions else self.label)
        decay = self.head_decay ** torch.arange(steps, device=states.device)
        weights = decay * plan.valid * (labels >= 0).unsqueeze(1)
        teacher = TeacherRows(last, head.sliced(self.draft.target_ids), log_sum, labels)
        results = [
            chunked_distillation(
                states[k], self.draft.each[k].lm_head.weight, plan.students[:, k : k + 1],
                weights[:, k : k + 1], teacher, self.objective, chunk=self.chunk,
            )
            for k in range(steps)
        ]  # fmt: skip
        loss = torch.stack([result.loss for result in results]).sum()
        losses = torch.cat([result.losses for result in results])
        right = torch.cat([result.hits for result in results], dim=1)
        found: tuple[Any, ...] = ()
        if positions:
            rows, known = right[: plan.count].cpu().numpy(), plan.labels[: plan.count].tolist()
            found = tuple(chains(rows, known, batch.spans))
        return StepOutput(loss, plan.count, losses, (right & plan.valid).sum(0), plan.valid.sum(0), found)

    def _states(self, batch: TrainBatch, head: TargetHead, steps: int) -> tuple[UnrollPlan, Tensor]:
        if steps > len(self.draft.heads):
            raise UserError(f"{steps} tokens a round, but the draft has {len(self.draft.heads)} heads")
        device = batch.input_ids.device
        plan = plan_unroll(batch.lengths, batch.spans, steps, batch.num_tokens).to(device)
        embeds = [head.embed(batch.input_ids[tokens]) for tokens in plan.row_tokens]
        return plan, self.draft(batch.features[LAST_HIDDEN_STATES][plan.rows], embeds)

    def _labels(
        self, batch: TrainBatch, head: TargetHead, plan: UnrollPlan, last: Tensor, label: str
    ) -> tuple[Tensor, Tensor | None]:
        """Draft ids of the labels (-1 outside the draft vocabulary), and full-vocabulary log-sums if needed."""
        if label == "data" and not self.objective.full_vocabulary:
            return self.draft.draft_ids(batch.input_ids[plan.labels]), None
        rows = head.rows(last)
        ids = rows.argmax if label == "target" else batch.input_ids[plan.labels]
        return self.draft.draft_ids(ids), rows.log_sum

    @torch.no_grad()
    def draft_logits(self, batch: TrainBatch, head: TargetHead, positions: int) -> Iterator[LogitTile]:
        """Logits of every supervised token's ``positions`` students, 256 labels at a time."""
        plan, states = self._states(batch, head, positions)
        for start in range(0, plan.count, 256):
            part = slice(start, min(start + 256, plan.count))
            logits = torch.stack(
                [
                    F.linear(
                        states[k][plan.students[part, k]], self.draft.each[k].lm_head.weight.to(states.dtype)
                    )
                    for k in range(positions)
                ],
                dim=1,
            ).float()
            logits.masked_fill_(~plan.valid[part].unsqueeze(-1), 0.0)
            labels = plan.labels[part]
            yield LogitTile(labels, logits, batch.features[LAST_HIDDEN_STATES][labels - 1])

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> HeadsDrafter:
        """A drafter of one token a head with the present weights."""
        draft = self.draft
        return HeadsDrafter(
            draft.decoder(dtype), head.embed, draft.target_ids.clone(), self.target.vocab_size
        )
