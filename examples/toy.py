"""A recurrent draft: state' = tanh(W [state; embedding of the next token]), logits = lm_head state'."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from lightning_modules.distilled import DistilledModule, unrolled
from lightning_modules.optimizers import OptimizerOptions
from specforge.contracts import AUX_HIDDEN_STATES, CapturePolicy
from specforge.decoding.drafters import ChainDrafter
from specforge.inference.target_files import TargetFiles
from specforge.losses import make_objective
from specforge.modeling.draft import Draft, build_draft, register_draft
from specforge.modeling.draft.eagle3.plan import plan_unroll
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.starting import load_weights


class ToyConfig(PreTrainedConfig):
    model_type = "toy"


@register_draft("ToyDraft", ToyConfig)
class ToyDraft(Draft):
    def __init__(self, config):
        super().__init__(config)  # provides the draft vocabulary: d2t, t2d, target_ids, draft_ids
        self.cell = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)

    def forward(self, state, embeds):
        return torch.tanh(self.cell(torch.cat([state, embeds.to(state.dtype)], dim=-1)))


class ToyDecoder:
    """Decodes with the cell, one token at a time. The cell has no cache, so there is nothing to crop."""

    def __init__(self, draft, dtype):
        self.draft, self.dtype = draft, dtype

    def reset(self): ...

    def crop(self, rows): ...

    def fuse(self, aux_hidden_states):
        return aux_hidden_states.float()

    def extend(self, hidden, embeds):
        state = self.draft(hidden[-1], embeds[-1])
        return self.draft.lm_head(state), state


class ToyModule(DistilledModule):
    """A recurrent draft on the output of one layer.

    Args:
        target: folder or hub name of the target.
        draft_config: fields that replace the defaults.
        init_from: checkpoint or folder to start from.
        layer: layer of the target that gives the first state.
        steps: number of draft positions to train.
        gamma: tokens drafted per round in validation.
        optimizer: optimizer and learning-rate schedule.
    """

    algorithm = "toy"  # name in tables and checkpoints
    architectures = ("ToyDraft",)  # names of its networks in config.json
    export_format = DraftFormat()  # tensor names in exported folders

    def __init__(
        self,
        target: str,
        draft_config: dict[str, Any] | None = None,
        init_from: str | None = None,
        layer: int = 1,
        steps: int = 3,
        gamma: int = 4,
        optimizer: OptimizerOptions = OptimizerOptions(),
    ):
        files = TargetFiles.find(target)
        defaults = {
            "architectures": ["ToyDraft"],
            "hidden_size": files.hidden_size,
            "vocab_size": files.vocab_size,
            "draft_vocab_size": min(32000, files.vocab_size),
            "layer": layer,
        }
        draft = build_draft({**defaults, **(draft_config or {})})
        if init_from is not None:
            load_weights(draft, init_from, self.export_format)
        super().__init__(
            files,
            draft,
            CapturePolicy((draft.config.layer,)),
            weights=torch.ones(steps),
            objective=make_objective("kl"),
            label="data",
            chunk=None,
            has_vocabulary=init_from is not None,
            optimizer=optimizer,
            gamma=gamma,
        )

    @classmethod
    def default_layers(cls, num_layers):
        """Layers that `specforge capture` stores, in addition to the input of lm_head."""
        return [1]

    def students(self, batch, head, positions=None):
        """The draft's states and the tokens that they predict: for training, or at all ``positions``."""
        steps = positions or len(self.weights)
        plan = plan_unroll(batch.lengths, batch.spans, steps, batch.num_tokens).to(batch.input_ids.device)
        state, states = batch.features[AUX_HIDDEN_STATES][plan.rows].float(), []
        for tokens in plan.row_tokens:
            state = self.draft(state, head.embed(batch.input_ids[tokens]))
            states.append(state)
        return unrolled(torch.stack(states), self.draft.lm_head.weight, plan)

    def drafter(self, head, dtype):
        """A drafter that decodes with the current weights."""
        return ChainDrafter(
            ToyDecoder(self.draft, dtype),
            head.embed,
            self.draft.target_ids,
            self.target.vocab_size,
            CapturePolicy(self.spec.capture.layer_ids, last_hidden_states=False),
        )
