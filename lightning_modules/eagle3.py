"""EAGLE-3: a one-layer draft over fused target features, trained by unrolling its own drafting (arXiv 2503.01840).

Row p of step s reads the embedding of token p+1+s and the draft's own state of step s-1 (at step 0 the fused
features of token p), and predicts token p+2+s; its teacher is the target's distribution at token p+1+s.
The loss is Σ_s decay^s Σ_rows loss / (supervised tokens of the optimizer window). Rows whose label is
outside the draft vocabulary are dropped from the loss and count as misses.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from lightning_modules.distilled import Students, unrolled
from lightning_modules.fused import FusedModule
from lightning_modules.optimizers import OptimizerOptions
from specforge.contracts import AUX_HIDDEN_STATES, CapturePolicy, TrainBatch
from specforge.decoding.drafters import ChainDrafter
from specforge.inference.target_head import OutputHead, TargetHead
from specforge.losses import make_objective
from specforge.modeling.draft.eagle3.export import Eagle3Format
from specforge.modeling.draft.eagle3.network import Eagle3Draft
from specforge.modeling.draft.eagle3.plan import plan_unroll
from specforge.modeling.draft.format import DraftFormat
from specforge.options import NonNegativeFloat, NonNegativeInt, PositiveInt


class Eagle3Module(FusedModule):
    """EAGLE-3; by options of its draft config EAGLE-3.1, by options of its loss HASS.

    EAGLE-3.1 is ``fc_norm`` (a norm of each captured layer before ``fc``) and ``norm_output`` (the normed state is
    fed back). HASS (arXiv 2408.15766) aligns the context by the same unroll and adds the losses ``topk`` and
    ``feature_weight``.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft, or fields that replace those derived from the target; ``architectures``
            chooses the attention: ``[LlamaForCausalLMEagle3]``, or ``[Eagle3DeepseekV2ForCausalLM]`` (latent).
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
    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLMEagle3", "Eagle3DeepseekV2ForCausalLM")
    export_format: ClassVar[DraftFormat] = Eagle3Format()
    draft: Eagle3Draft

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        layer_ids: list[NonNegativeInt] | None = None,
        init_from: str | None = None,
        steps: PositiveInt = 7,
        step_decay: NonNegativeFloat = 0.8,
        loss: str | dict[str, float] = "kl",
        lk_eta: NonNegativeFloat = 3.0,
        topk: PositiveInt = 10,
        feature_weight: NonNegativeFloat = 0.0,
        label: Literal["target", "data"] = "target",
        gamma: PositiveInt = 4,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 - jsonargparse shows the defaults
        chunk: PositiveInt | None = None,
    ) -> None:
        super().__init__(
            target,
            draft_config,
            layer_ids,
            init_from,
            weights=step_decay ** torch.arange(steps),
            objective=make_objective(loss, lk_eta, topk),
            feature_weight=feature_weight,
            label=label,
            gamma=gamma,
            optimizer=optimizer,
            chunk=chunk,
        )
        self.steps, self.step_decay = steps, step_decay

    def students(self, batch: TrainBatch, head: TargetHead, positions: int | None = None) -> Students:
        """Unroll the draft over the batch."""
        plan = plan_unroll(batch.lengths, batch.spans, positions or self.steps, batch.num_tokens)
        plan = plan.to(batch.input_ids.device)
        states = self.draft(batch.features[AUX_HIDDEN_STATES], head.embed(batch.input_ids), plan)
        return unrolled(states, OutputHead(self.draft.lm_head.weight), plan)

    def drafter(self, head: TargetHead, dtype: torch.dtype) -> ChainDrafter:
        """A chain drafter with the present weights."""
        draft, reads = self.draft, CapturePolicy(self.draft.layer_ids, last_hidden_states=False)
        ids, size = draft.target_ids.clone(), self.target.vocab_size
        return ChainDrafter(draft.decoder(dtype), head.embed, ids, size, reads)
