"""What drafts share that learn the target's distribution row by row: their losses, hits, chains and logits.

A subclass says which states predict which label (:meth:`DistilledModule.students`); everything else follows from that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.base import DraftModule, LogitTile, StepOutput
from lightning_modules.optimizers import OptimizerOptions
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy, StrategySpec, TrainBatch
from specforge.errors import UserError
from specforge.eval.tau import chains
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import OutputHead, TargetHead
from specforge.losses import TeacherRows, chunked_distillation, feature_distance
from specforge.losses.objectives import Objective
from specforge.modeling.draft import Draft
from specforge.modeling.draft.eagle3.plan import UnrollPlan


@dataclass(frozen=True)
class Students:
    """Which states predict which label.

    Shape legend: G heads, S states of each, H hidden size, D draft vocabulary, M labels, T positions.

    Attributes:
        states: ``[G, S, H]`` the draft's normed states; the g-th head and its states are those of the positions
            ``g T/G`` up to ``(g+1) T/G``.
        heads: the G matrices ``[D, H]``.
        labels: ``[M]`` flat token of each label; padded at the end.
        index: ``[M, T]`` the state that predicts label m at position t; any where there is none. T is 1 where all
            positions are alike.
        valid: ``[M, T]`` whether it exists.
        supervised: how many of the labels are not padding.
        count: what the sum of the losses is divided by.
        bias: ``[D]`` added to the logits of all heads; None where they have none.
    """

    states: Tensor
    heads: Sequence[Tensor]
    labels: Tensor
    index: Tensor
    valid: Tensor
    supervised: int
    count: int
    bias: Tensor | None = None

    def by_head(self, columns: Tensor) -> tuple[Tensor, ...]:
        """The columns ``[M, T]`` of each head."""
        return columns.chunk(len(self.heads), dim=1)


class DistilledModule(DraftModule):
    """Base of drafts that are distilled.

    Args:
        target: the target.
        draft: the network.
        capture: what it reads of the target.
        weights: ``[T]`` of each trained position in the loss.
        objective: the loss of a row.
        label: the token that a row has to get right: the ``target``'s likeliest, or the one in the ``data``.
        chunk: labels of a loss tile; by default what fits the cache.
        has_vocabulary: whether the draft comes with its vocabulary.
        optimizer: optimizer and schedule.
        gamma: tokens drafted a round in validation.
        min_tokens: of a document that supervises anything.
        feature_weight: weight of the feature distance, where there is one head.
        start: copies weights from the target once the draft vocabulary is known, or checks those that were copied;
            None if there are none.
    """

    def __init__(
        self,
        target: TargetFiles,
        draft: Draft,
        capture: CapturePolicy,
        *,
        weights: Tensor,
        objective: Objective,
        label: Literal["target", "data"],
        chunk: int | None,
        has_vocabulary: bool,
        optimizer: OptimizerOptions,
        gamma: int,
        min_tokens: int = 3,
        feature_weight: float = 0.0,
        start: Callable[[TargetFiles], None] | None = None,
    ) -> None:
        spec = StrategySpec(
            algorithm=self.algorithm,
            capture=capture,
            features=(AUX_HIDDEN_STATES, LAST_HIDDEN_STATES) if capture.layer_ids else (LAST_HIDDEN_STATES,),
            positions=len(weights),
            min_tokens=min_tokens,
        )
        super().__init__(target, draft, spec, has_vocabulary=has_vocabulary, optimizer=optimizer, gamma=gamma)
        self.weights, self.objective, self.label, self.chunk = weights, objective, label, chunk
        self.feature_weight, self.start = feature_weight, start
        self._refused: UserError | None = None

    def setup(self, stage: str) -> None:
        """Copy what starts at the target; only now is the draft vocabulary known."""
        super().setup(stage)
        if self.start is not None and stage == "fit":
            try:
                self.start(self.target)
            except UserError as error:
                self._refused = error

    def on_train_start(self) -> None:
        """Raise the refusal of :meth:`setup`, unless the weights come from a checkpoint that the run resumes."""
        super().on_train_start()
        if self._refused is not None and self.trainer.ckpt_path is None:
            raise self._refused

    @abstractmethod
    def students(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> Students:
        """Run the draft: as in training, or so that every label has its students at all ``positions``."""

    def compute(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> StepOutput:
        """Losses of a batch; with ``positions``, chains of that length against the data tokens."""
        students = self.students(batch, head, positions)
        steps = positions or len(self.weights)
        if not students.supervised:
            return self.empty_output(steps, students.states, batch.spans if positions else ())
        last = batch.features[LAST_HIDDEN_STATES][students.labels - 1]
        label = "data" if positions else self.label
        labels, log_sum = self._labels(batch, head, students.labels, last, label)
        by_position = torch.ones(students.index.shape[1]) if positions else self.weights
        weights = by_position.to(last.device) * students.valid * (labels >= 0).unsqueeze(1)
        teacher = TeacherRows(last, head.sliced(self.draft.target_ids), log_sum, labels)
        columns = zip(students.by_head(students.index), students.by_head(weights), strict=True)
        results = [
            chunked_distillation(
                states, matrix, index, weight, teacher, self.objective, bias=students.bias, chunk=self.chunk
            )
            for states, matrix, (index, weight) in zip(students.states, students.heads, columns, strict=True)
        ]
        loss = torch.stack([result.loss for result in results]).sum()
        losses = torch.cat([result.losses for result in results]).expand(steps)
        right = torch.cat([result.hits for result in results], dim=1)
        if self.feature_weight:
            distance = feature_distance(students.states[0], students.index, weights, last)
            loss = loss + self.feature_weight * distance
        found: tuple[Any, ...] = ()
        if positions:
            known = students.labels[: students.supervised].tolist()
            found = tuple(chains(right[: len(known)].expand(-1, steps).cpu().numpy(), known, batch.spans))
        hits, rows = (x.sum(0).expand(steps) for x in (right & students.valid, students.valid))
        return StepOutput(loss, students.count, losses, hits, rows, found)

    def _labels(
        self, batch: TrainBatch, head: TargetHead, tokens: Tensor, last: Tensor, label: str
    ) -> tuple[Tensor, Tensor | None]:
        """Draft ids of the labels (-1 outside the draft vocabulary), and full-vocabulary log-sums if needed."""
        if label == "data" and not self.objective.full_vocabulary:
            return self.draft.draft_ids(batch.input_ids[tokens]), None
        rows = head.rows(last)
        ids = rows.argmax if label == "target" else batch.input_ids[tokens]
        return self.draft.draft_ids(ids), rows.log_sum

    @torch.no_grad()
    def draft_logits(self, batch: TrainBatch, head: TargetHead, positions: int) -> Iterator[LogitTile]:
        """Logits of every supervised token's ``positions`` students, 256 labels at a time."""
        students = self.students(batch, head, positions)
        heads = [OutputHead(matrix, students.bias).to(students.states.dtype) for matrix in students.heads]
        for start in range(0, students.supervised, 256):
            part = slice(start, min(start + 256, students.supervised))
            rows = zip(students.states, students.by_head(students.index[part]), heads, strict=True)
            tiles = [head.scores(states[index]) for states, index, head in rows]
            logits = torch.cat(tiles, dim=1).float()
            logits.masked_fill_(~students.valid[part].unsqueeze(-1), 0.0)
            labels = students.labels[part]
            last = batch.features[LAST_HIDDEN_STATES][labels - 1]
            yield LogitTile(labels, logits.expand(-1, positions, -1), last)


def unrolled(states: Tensor, head: OutputHead | Tensor, plan: UnrollPlan) -> Students:
    """Students of a network that was applied T times: its states ``[T, R, H]`` and its head (or the head's matrix)."""
    head = head if isinstance(head, OutputHead) else OutputHead(head)
    index = plan.students + torch.arange(plan.steps, device=states.device) * len(plan.rows)
    flat = states.flatten(0, 1)[None]
    return Students(flat, [head.weight], plan.labels, index, plan.valid, plan.count, plan.count, head.bias)
