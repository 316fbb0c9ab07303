"""EAGLE-3: a one-layer draft over fused target features, trained by unrolling its own drafting (arXiv 2503.01840).

Row p of step s reads the embedding of token p+1+s and the draft's own state of step s-1 (at step 0 the fused
features of token p), and predicts token p+2+s; its teacher is the target's distribution at token p+1+s.
The loss is Σ_s decay^s Σ_rows loss / (supervised tokens of the optimizer window). Rows whose label is
outside the draft vocabulary are dropped from the loss and count as misses.
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
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy, StrategySpec, TrainBatch
from specforge.decoding.drafters import ChainDrafter
from specforge.errors import UserError
from specforge.eval.tau import chains
from specforge.inference.target_engine.base import check_layers
from specforge.losses import TeacherRows, chunked_distillation, feature_distance, make_objective
from specforge.modeling.draft import build_draft
from specforge.modeling.draft.eagle3 import Eagle3Draft
from specforge.modeling.draft.unroll import UnrollPlan, plan_unroll
from specforge.modeling.target_head import TargetHead
from specforge.target_files import TargetFiles


class Eagle3Module(DraftModule):
    """EAGLE-3; by options of its draft config EAGLE-3.1, by options of its loss HASS.

    EAGLE-3.1 is ``fc_norm`` (a norm of each captured layer before ``fc``) and ``norm_output`` (the normed state is
    fed back). HASS (arXiv 2408.15766) aligns the context by the same unroll and adds the losses ``topk`` and
    ``feature_weight``.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft, or fields that replace those derived from the target.
        layer_ids: three decoder layers of the target whose outputs the draft reads; by default those of the
            draft config, else the second, the middle and the fourth from the end.
        init_from: start from a SpecForge checkpoint or a draft in the field's own form (weights only); or
            ``target``: from the target's own last layer and head. By default at random.
        steps: T, how many drafted positions are trained.
        step_decay: weight of position s is ``step_decay ** s``.
        loss: ``kl``, ``reverse_kl``, ``js``, ``tv``, ``ce``, ``topk``, ``lk_alpha``, ``lk_lambda``, or weights by
            those names.
        lk_eta: η of ``lk_lambda``.
        topk: K of ``topk``.
        feature_weight: weight of the smooth L1 distance between the state that the draft's head reads and the
            one that the target's reads (EAGLE, arXiv 2401.15077; HASS); meant for a head that is the target's.
        label: the token that a row has to get right: the ``target``'s likeliest, or the one in the ``data``.
            They are the same where the target wrote the data greedily, and ``data`` then saves a product
            with the whole vocabulary.
        gamma: tokens drafted a round in validation.
        optimizer: optimizer and schedule.
        chunk: labels of a loss tile; by default what fits the cache. It does not change the result.
    """

    algorithm: ClassVar[str] = "eagle3"
    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLMEagle3",)
    draft: Eagle3Draft

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        layer_ids: list[int] | None = None,
        init_from: str | None = None,
        steps: int = 7,
        step_decay: float = 0.8,
        loss: str | dict[str, float] = "kl",
        lk_eta: float = 3.0,
        topk: int = 10,
        feature_weight: float = 0.0,
        label: Literal["target", "data"] = "target",
        gamma: int = 4,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 - jsonargparse shows the defaults
        chunk: int | None = None,
    ) -> None:
        files = TargetFiles.find(target)
        config, where = draft_config_for(files, draft_config, self.default_draft_config(files))
        if layer_ids is not None:
            config["eagle_config"] = {
                **config.get("eagle_config", {}), "eagle_aux_hidden_state_layer_ids": list(layer_ids),
            }  # fmt: skip
        draft = build_draft(config, where)
        if not isinstance(draft, Eagle3Draft):
            raise UserError(f"{where}: {draft.architecture} is not a draft of {self.algorithm}")
        check_layers(CapturePolicy(draft.layer_ids), files.num_layers, files.name)
        if steps < 1 or gamma < 1:
            raise UserError(f"model: steps is {steps} and gamma is {gamma}; both must be at least 1")
        draft.apply(_initialise)
        starts_at_target = init_from == "target"
        if init_from is not None and not starts_at_target:
            load_weights(draft, Path(init_from))
        spec = StrategySpec(
            algorithm=self.algorithm,
            capture=CapturePolicy(draft.layer_ids),
            features=(AUX_HIDDEN_STATES, LAST_HIDDEN_STATES),
            positions=steps,
            min_tokens=3,
        )
        super().__init__(
            files,
            draft,
            spec,
            has_vocabulary=init_from not in (None, "target"),
            optimizer=optimizer,
            gamma=gamma,
        )
        self.starts_at_target = starts_at_target
        self.steps, self.step_decay, self.label, self.chunk = steps, step_decay, label, chunk
        self.objective, self.feature_weight = make_objective(loss, lk_eta, topk), feature_weight

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

    @staticmethod
    def default_draft_config(target: TargetFiles) -> dict[str, Any]:
        """One layer of the target's own dimensions, over at most 32,000 tokens."""
        config = target.config
        heads = int(config["num_attention_heads"])
        keep = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
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

    def compute(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> StepOutput:
        """Losses of a batch; with ``positions``, chains of that length against the data tokens."""
        steps = positions or self.steps
        plan, states = self._unroll(batch, head, steps)
        if not plan.count:
            return self.empty_output(steps, states, batch.spans if positions else ())
        last = batch.features[LAST_HIDDEN_STATES][plan.labels - 1]
        labels, log_sum = self._labels(batch, head, plan, last, "data" if positions else self.label)
        decay = self.step_decay ** torch.arange(steps, device=states.device)
        weights = decay * plan.valid * (labels >= 0).unsqueeze(1)
        result = chunked_distillation(
            states.flatten(0, 1), self.draft.lm_head.weight, _flat_students(plan), weights,
            TeacherRows(last, head.sliced(self.draft.target_ids), log_sum, labels),
            self.objective, chunk=self.chunk,
        )  # fmt: skip
        loss = result.loss
        if self.feature_weight:
            distance = feature_distance(states.flatten(0, 1), _flat_students(plan), weights, last)
            loss = loss + self.feature_weight * distance
        found: tuple[Any, ...] = ()
        if positions:
            right, known = result.hits[: plan.count].cpu().numpy(), plan.labels[: plan.count].tolist()
            found = tuple(chains(right, known, batch.spans))
        hits = (result.hits & plan.valid).sum(0)
        return StepOutput(loss, plan.count, result.losses, hits, plan.valid.sum(0), found)

    def _unroll(self, batch: TrainBatch, head: TargetHead, steps: int) -> tuple[UnrollPlan, Tensor]:
        device = batch.input_ids.device
        plan = plan_unroll(batch.lengths, batch.spans, steps, batch.num_tokens).to(device)
        states = self.draft(batch.features[AUX_HIDDEN_STATES], head.embed(batch.input_ids), plan)
        return plan, states

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
        plan, states = self._unroll(batch, head, positions)
        students, flat = _flat_students(plan), states.flatten(0, 1)
        weight = self.draft.lm_head.weight.to(states.dtype)
        for start in range(0, plan.count, 256):
            part = slice(start, min(start + 256, plan.count))
            logits = F.linear(flat[students[part]], weight).float()
            logits.masked_fill_(~plan.valid[part].unsqueeze(-1), 0.0)
            labels = plan.labels[part]
            yield LogitTile(labels, logits, batch.features[LAST_HIDDEN_STATES][labels - 1])

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> ChainDrafter:
        """A chain drafter with the present weights."""
        draft = self.draft
        return ChainDrafter(
            draft.decoder(dtype),
            head.embed,
            draft.target_ids.clone(),
            self.target.vocab_size,
            CapturePolicy(draft.layer_ids, last_hidden_states=False),
        )


def default_layers(num_layers: int) -> list[int]:
    """Outputs of layers 1, L/2 - 1 and L - 4: the inputs of layers 2, L/2 and L - 3 of the EAGLE-3 code."""
    return [1, num_layers // 2 - 1, num_layers - 4]


def _flat_students(plan: UnrollPlan) -> Tensor:
    """``[M, T]`` index of each student among the states of all steps, ``[T R, H]``."""
    return plan.students + torch.arange(plan.steps, device=plan.students.device) * len(plan.rows)


def _initialise(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=0.02)
