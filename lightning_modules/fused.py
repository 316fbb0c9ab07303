"""What the EAGLE-3 family shares beyond :class:`DraftModule`: drafts that read fused features and have their own head.

A subclass says which states predict which label (:meth:`students`); the losses, the hits, the chains of validation and
the logits of evaluation follow from that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.base import DraftModule, LogitTile, StepOutput, draft_config_for, load_weights
from lightning_modules.optimizers import OptimizerOptions
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy, StrategySpec, TrainBatch
from specforge.errors import UserError
from specforge.eval.tau import chains
from specforge.inference.target_engine.base import check_layers
from specforge.losses import TeacherRows, chunked_distillation, feature_distance
from specforge.losses.objectives import Objective
from specforge.modeling.draft import build_draft
from specforge.modeling.draft.fused import FusedDraft
from specforge.modeling.target_head import TargetHead
from specforge.target_files import TargetFiles


@dataclass(frozen=True)
class Students:
    """Which states predict which label.

    Attributes:
        states: ``[S, H]`` the draft's normed states.
        labels: ``[M]`` flat token of each label; padded at the end.
        index: ``[M, T]`` the state that predicts label m at position t; any where there is none.
        valid: ``[M, T]`` whether it exists.
        supervised: how many of the labels are not padding.
        count: what the sum of the losses is divided by.
    """

    states: Tensor
    labels: Tensor
    index: Tensor
    valid: Tensor
    supervised: int
    count: int


class FusedModule(DraftModule):
    """Base of EAGLE-3 and what is built like it.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft, or fields that replace those derived from the target.
        layer_ids: the captured layers, instead of the draft config's.
        init_from: a SpecForge checkpoint or a draft in the field's own form (weights only); ``target``: the target's
            own last layer and head; or None: random.
        weights: of each drafted position in the loss; as many as are trained.
        objective: the loss of a row.
        feature_weight: weight of the feature distance.
        label: the token that a row has to get right: the ``target``'s likeliest, or the one in the ``data``.
        gamma: tokens drafted a round in validation.
        optimizer: optimizer and schedule.
        chunk: labels of a loss tile; by default what fits the cache.

    Attributes:
        network: the class of the drafts.
    """

    network: ClassVar[type[FusedDraft]]
    draft: FusedDraft

    def __init__(
        self, target: str, draft_config: str | dict[str, Any] | None, layer_ids: list[int] | None,
        init_from: str | None, *, weights: Tensor, objective: Objective, feature_weight: float,
        label: Literal["target", "data"], gamma: int, optimizer: OptimizerOptions, chunk: int | None,
    ) -> None:  # fmt: skip
        files = TargetFiles.find(target)
        config, where = draft_config_for(files, draft_config, self.default_draft_config(files))
        if layer_ids is not None:
            config["eagle_config"] = {
                **config.get("eagle_config", {}), "eagle_aux_hidden_state_layer_ids": list(layer_ids),
            }  # fmt: skip
        draft = build_draft(config, where)
        if not isinstance(draft, self.network):
            raise UserError(f"{where}: {draft.architecture} is not a draft of {self.algorithm}")
        check_layers(CapturePolicy(draft.layer_ids), files.num_layers, files.name)
        draft.apply(_initialise)
        starts_anew = init_from in (None, "target")
        if init_from == "target":  # in setup several ranks would draw other numbers than one
            torch.nn.init.normal_(draft.fc.weight, std=0.002)
        if init_from is not None and not starts_anew:
            load_weights(draft, Path(init_from), self.export_format)
        spec = StrategySpec(
            algorithm=self.algorithm,
            capture=CapturePolicy(draft.layer_ids),
            features=(AUX_HIDDEN_STATES, LAST_HIDDEN_STATES),
            positions=len(weights),
            min_tokens=3,
        )
        super().__init__(
            files,
            draft,
            spec,
            has_vocabulary=not starts_anew,
            optimizer=optimizer,
            gamma=gamma,
        )
        self.starts_anew, self.starts_at_target = starts_anew, init_from == "target"
        self.weights, self.label, self.chunk = weights, label, chunk
        self.objective, self.feature_weight = objective, feature_weight

    def setup(self, stage: str) -> None:
        """Copy what starts at the target; only now is the draft vocabulary known."""
        super().setup(stage)
        if self.starts_at_target and stage == "fit":
            self.draft.start_from_target(self.target)

    @classmethod
    def capture_policy(cls, target: TargetFiles, layer_ids: list[int] | None = None) -> CapturePolicy:
        """Three layers and the last hidden state."""
        policy = CapturePolicy(tuple(layer_ids or default_layers(target.num_layers)))
        check_layers(policy, target.num_layers, target.name)
        return policy

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """One Llama layer of the target's own dimensions, over at most 32,000 tokens."""
        config = target.config
        heads = int(config["num_attention_heads"])
        keep = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
        return {
            "architectures": [cls.architectures[0]],
            "model_type": "llama",
            "hidden_size": target.hidden_size,
            "target_hidden_size": target.hidden_size,
            "intermediate_size": config["intermediate_size"],
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads", heads),
            "head_dim": config.get("head_dim") or target.hidden_size // heads,
            "hidden_act": "silu",
            "num_hidden_layers": 1,
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "vocab_size": target.vocab_size,
            "draft_vocab_size": min(32000, target.vocab_size),
            "tie_word_embeddings": False,
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": default_layers(target.num_layers),
                "use_aux_hidden_state": True,
            },
            **{key: config[key] for key in keep if config.get(key) is not None},
        }

    @abstractmethod
    def students(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> Students:
        """Run the draft: as in training, or so that every label has its students at all ``positions``."""

    def compute(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> StepOutput:
        """Losses of a batch; with ``positions``, chains of that length against the data tokens."""
        students = self.students(batch, head, positions)
        steps = students.index.shape[1]
        if not students.supervised:
            return self.empty_output(steps, students.states, batch.spans if positions else ())
        last = batch.features[LAST_HIDDEN_STATES][students.labels - 1]
        label = "data" if positions else self.label
        labels, log_sum = self._labels(batch, head, students.labels, last, label)
        by_position = torch.ones(steps) if positions else self.weights
        weights = by_position.to(last.device) * students.valid * (labels >= 0).unsqueeze(1)
        result = chunked_distillation(
            students.states, self.draft.lm_head.weight, students.index, weights,
            TeacherRows(last, head.sliced(self.draft.target_ids), log_sum, labels),
            self.objective, chunk=self.chunk,
        )  # fmt: skip
        loss = result.loss
        if self.feature_weight:
            distance = feature_distance(students.states, students.index, weights, last)
            loss = loss + self.feature_weight * distance
        found: tuple[Any, ...] = ()
        if positions:
            known = students.labels[: students.supervised].tolist()
            found = tuple(chains(result.hits[: len(known)].cpu().numpy(), known, batch.spans))
        hits = (result.hits & students.valid).sum(0)
        return StepOutput(loss, students.count, result.losses, hits, students.valid.sum(0), found)

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
        weight = self.draft.lm_head.weight.to(students.states.dtype)
        for start in range(0, students.supervised, 256):
            part = slice(start, min(start + 256, students.supervised))
            logits = F.linear(students.states[students.index[part]], weight).float()
            logits.masked_fill_(~students.valid[part].unsqueeze(-1), 0.0)
            labels = students.labels[part]
            yield LogitTile(labels, logits, batch.features[LAST_HIDDEN_STATES][labels - 1])


def default_layers(num_layers: int) -> list[int]:
    """Outputs of layers 1, L/2 - 1 and L - 4: the inputs of layers 2, L/2 and L - 3 of the EAGLE-3 code."""
    return [1, num_layers // 2 - 1, num_layers - 4]


def _initialise(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=0.02)
