"""Base of drafts that learn the target's distribution row by row: their losses, hits, chains and logits.

A subclass states which of its states predicts which token (:meth:`DistilledModule.students`); the rest follows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_modules.base import DraftModule, LogitTile, StepOutput, ValidationOutput
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy, StrategySpec, TrainBatch
from specforge.errors import UserError
from specforge.eval.tau import chains
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import OutputHead, TargetHead
from specforge.losses import TeacherRows, feature_distance, make_objective, tiled_loss
from specforge.modeling.draft import Draft
from specforge.modeling.draft.eagle3.plan import UnrollPlan, plan_unroll
from specforge.options import NonNegativeFloat, PositiveInt


@dataclass(frozen=True)
class Students:
    """Which state predicts which label.

    Shape legend: G heads, S states of each, H hidden size, D draft vocabulary, M labels, T positions.
    """

    # [G, S, H] the draft's normed states; head g and its states belong to the positions g T/G up to (g+1) T/G
    states: Tensor
    heads: Sequence[Tensor]  # the G matrices [D, H]
    labels: Tensor  # [M] flat token of each label; padded at the end
    # [M, T] the state that predicts label m at position t; any where there is none. T is 1 if all positions are alike
    index: Tensor
    valid: Tensor  # [M, T] whether that state exists
    num_labels: int  # labels before the padding
    num_supervised: int  # number by which the sum of the training losses is divided
    bias: Tensor | None = None  # [D] added to the logits of all heads; None if there is none

    def by_head(self, columns: Tensor) -> tuple[Tensor, ...]:
        """The columns ``[M, T]`` of each head."""
        return columns.chunk(len(self.heads), dim=1)


class _Rows(NamedTuple):
    """Losses of all rows: their weighted sum, sums ``[T]``, hits and weights ``[M, T]``, target states ``[M, H]``."""

    loss: Tensor
    losses: Tensor
    hits: Tensor
    weights: Tensor
    target_hidden: Tensor


class DistilledModule(DraftModule):
    """Base of drafts that are distilled from the target.

    Args:
        target: the target's files.
        draft: the draft network.
        capture: features that the draft reads.
        weights: ``[T]`` weight of each trained position in the loss.
        has_vocabulary: whether the draft comes with its vocabulary.
        loss: training loss: ``kl``, ``reverse_kl``, ``js``, ``tv``, ``ce``, ``topk``, ``lk_alpha``, ``lk_lambda``, or a
            weight for each of several by name.
        lk_eta: η of the loss ``lk_lambda``: how fast it moves from KL to total variation as acceptance grows.
        topk: K of the loss ``topk``.
        label: the token that counts as correct: the ``target``'s most likely one, or the one in the ``data``. They
            agree if the target wrote the data greedily; ``data`` then saves a product with the whole vocabulary.
        chunk: labels per loss tile; sized to the cache by default. It does not change the result.
    """

    min_tokens = 3  # the shortest document that supervises anything
    feature_weight = 0.0
    start: Callable[[TargetFiles], None] | None = None
    """Copies weights from the target once the draft vocabulary is known, or checks those already copied."""

    def __init__(
        self,
        target: TargetFiles,
        draft: Draft,
        capture: CapturePolicy,
        *,
        weights: Tensor,
        has_vocabulary: bool,
        loss: str | dict[str, float] = "kl",
        lk_eta: NonNegativeFloat = 3.0,
        topk: PositiveInt = 10,
        label: Literal["target", "data"] = "target",
        chunk: PositiveInt | None = None,
        **training: Any,
    ) -> None:
        spec = StrategySpec(
            algorithm=self.algorithm,
            capture=capture,
            features=(AUX_HIDDEN_STATES, LAST_HIDDEN_STATES) if capture.layer_ids else (LAST_HIDDEN_STATES,),
            positions=len(weights),
            min_tokens=self.min_tokens,
        )
        super().__init__(target, draft, spec, has_vocabulary=has_vocabulary, **training)
        self.weights, self.label, self.chunk = weights, label, chunk
        self.objective = make_objective(loss, lk_eta, topk)
        self._start_error: UserError | None = None

    def setup(self, stage: str) -> None:
        """Copy weights from the target, now that the draft vocabulary is known."""
        super().setup(stage)
        if self.start is not None and stage == "fit":
            try:
                self.start(self.target)
            except UserError as error:
                self._start_error = error

    def on_train_start(self) -> None:
        """Raise the error of :meth:`setup`, unless the weights come from a checkpoint that the run resumes."""
        super().on_train_start()
        if self._start_error is not None and self.trainer.ckpt_path is None:
            raise self._start_error

    def training_plan(self, batch: TrainBatch) -> Any:
        """Plan of the trained positions."""
        return self.full_plan(batch, self.spec.positions)

    def full_plan(self, batch: TrainBatch, positions: int) -> Any:
        """Plan in which every label has its student at each of ``positions``; by default an unrolled one."""
        return plan_unroll(batch.lengths, batch.spans, positions, batch.num_tokens)

    @abstractmethod
    def students(self, batch: TrainBatch, head: TargetHead, plan: Any) -> Students:
        """Run the draft on a batch, as planned; the plan is on the batch's device."""

    def _all_students(self, batch: TrainBatch, head: TargetHead, positions: int) -> Students:
        return self.students(batch, head, self.full_plan(batch, positions).to(batch.input_ids.device))

    def training_loss(self, batch: TrainBatch, head: TargetHead) -> StepOutput:
        """Loss of a batch under its plan."""
        students, positions = self.students(batch, head, self.batch_plan(batch)), len(self.weights)
        if self.weights.device != batch.input_ids.device:  # once: a copy makes the host wait for the device
            self.weights = self.weights.to(batch.input_ids.device)
        if not students.num_labels:
            return self.empty_output(positions, students.states)
        rows = self._losses(batch, head, students, self.label, self.weights)
        loss = rows.loss
        if self.feature_weight:
            distance = feature_distance(students.states[0], students.index, rows.weights, rows.target_hidden)
            loss = loss + self.feature_weight * distance
        hits, counts = ((x & students.valid).sum(0).expand(positions) for x in (rows.hits, students.valid))
        return StepOutput(loss, students.num_supervised, rows.losses.expand(positions), hits, counts)

    def validation_chains(self, batch: TrainBatch, head: TargetHead, positions: int) -> ValidationOutput:
        """Chains of ``positions`` drafted tokens from every token of the answers, compared with the data."""
        students = self._all_students(batch, head, positions)
        count = students.num_labels
        if not count:
            missed = torch.zeros(0, positions, dtype=torch.bool).numpy()
            return ValidationOutput(torch.zeros(()), 0, tuple(chains(missed, [], batch.spans)))
        rows = self._losses(
            batch, head, students, "data", torch.ones(students.index.shape[1], device=students.states.device)
        )
        hits = rows.hits[:count].expand(-1, positions).cpu().numpy()
        found = tuple(chains(hits, students.labels[:count].tolist(), batch.spans))
        return ValidationOutput(rows.losses[0], count, found)

    def _losses(
        self, batch: TrainBatch, head: TargetHead, students: Students, label: str, weights_by_position: Tensor
    ) -> _Rows:
        last = batch.features[LAST_HIDDEN_STATES][students.labels - 1]
        labels, log_sum = self._labels(batch, head, students.labels, last, label)
        weights = weights_by_position * students.valid * (labels >= 0).unsqueeze(1)
        teacher = TeacherRows(labels, last, head.sliced(self.draft.target_ids), log_sum)
        columns = students.by_head(students.index), students.by_head(weights)
        results = [
            tiled_loss(
                states,
                OutputHead(matrix, students.bias),
                teacher,
                weight,
                self.objective,
                students=index,
                chunk=self.chunk,
            )
            for states, matrix, index, weight in zip(students.states, students.heads, *columns, strict=True)
        ]
        loss = torch.stack([result.loss for result in results]).sum()
        losses = torch.cat(
            [
                torch.where(weight != 0, result.losses, 0.0).sum(0)
                for result, weight in zip(results, students.by_head(weights), strict=True)
            ]
        )
        return _Rows(loss, losses, torch.cat([result.hits for result in results], dim=1), weights, last)

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
        """Logits of every supervised token at all ``positions``, 256 labels at a time."""
        students = self._all_students(batch, head, positions)
        heads = [OutputHead(matrix, students.bias).to(students.states.dtype) for matrix in students.heads]
        for start in range(0, students.num_labels, 256):
            part = slice(start, min(start + 256, students.num_labels))
            rows = zip(students.states, students.by_head(students.index[part]), heads, strict=True)
            tiles = [head.scores(states[index]) for states, index, head in rows]
            logits = torch.cat(tiles, dim=1).float()
            logits.masked_fill_(~students.valid[part].unsqueeze(-1), 0.0)
            labels = students.labels[part]
            last = batch.features[LAST_HIDDEN_STATES][labels - 1]
            yield LogitTile(labels, logits.expand(-1, positions, -1), last)


def unrolled(states: Tensor, head: OutputHead | Tensor, plan: UnrollPlan) -> Students:
    """Students of a network that was applied T times.

    Args:
        states: ``[T, R, H]`` the normed states of each application.
        head: the draft's head, or its matrix ``[D, H]``.
        plan: names the R rows and the labels that they predict.
    """
    head = head if isinstance(head, OutputHead) else OutputHead(head)
    index = plan.students + torch.arange(plan.steps, device=states.device) * len(plan.rows)
    flat = states.flatten(0, 1)[None]
    return Students(flat, [head.weight], plan.labels, index, plan.valid, plan.count, plan.supervised, head.bias)
