"""Base of the EAGLE-3 family: drafts that read fused features of three layers and have their own head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_modules.distilled import DistilledModule
from specforge.contracts import CapturePolicy
from specforge.inference.target_engine.base import check_layers
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft.eagle3.network import EagleDraft
from specforge.modeling.draft.starting import (
    SavedDraft,
    distinct_layers,
    draft_config_for,
    initialise_layers,
    layer_fields,
    load_weights,
)
from specforge.options import NonNegativeInt


class EagleFamilyModule(DistilledModule):
    """Base of EAGLE-3 and P-EAGLE.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft's config, or fields that replace those derived from the target.
        layer_ids: three decoder layers of the target whose outputs the draft reads; by default those of the draft
            config, else the second, the middle and the fourth from the end.
        init_from: weights to start from: a SpecForge checkpoint, an exported or published draft, or ``target`` for the
            target's own last layer and head. Random by default.
        weights: ``[T]`` weight of each trained position in the loss.
    """

    draft: EagleDraft

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None = None,
        layer_ids: list[NonNegativeInt] | None = None,
        init_from: str | None = None,
        *,
        weights: Tensor,
        **training: Any,
    ) -> None:
        files = TargetFiles.find(target)
        source = SavedDraft.named(init_from, self.export_format, ("target",))
        config, where = draft_config_for(files, draft_config, self.default_draft_config(files), source)
        if layer_ids is not None:
            config["eagle_config"] = {**config["eagle_config"], "eagle_aux_hidden_state_layer_ids": list(layer_ids)}
        draft = self.build(config, where)
        capture = CapturePolicy(draft.layer_ids)
        check_layers(capture, files.num_layers, files.name)
        draft.apply(initialise_layers)
        if init_from == "target":  # drawn here, not in setup, so that all ranks draw the same numbers
            torch.nn.init.normal_(draft.fc.weight, std=0.002)
        if source is not None:
            load_weights(draft, source, self.export_format, files)
        super().__init__(files, draft, capture, weights=weights, has_vocabulary=source is not None, **training)
        self.start = draft.start_from_target if init_from == "target" else None
        self.starts_from_draft = source is not None

    @classmethod
    def default_layers(cls, num_layers: int) -> list[int]:
        """Outputs of layers 1, L/2 - 1 and L - 4: the inputs of layers 2, L/2 and L - 3 of the EAGLE-3 code."""
        return distinct_layers([1, num_layers // 2 - 1, num_layers - 4], num_layers)

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """One Llama layer of the target's dimensions, over at most 32,000 tokens."""
        return {
            **layer_fields(target),
            "architectures": [cls.architectures[0]],
            "model_type": "llama",
            "target_hidden_size": target.hidden_size,
            "num_hidden_layers": 1,
            "draft_vocab_size": min(32000, target.vocab_size),
            "tie_word_embeddings": False,
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": cls.default_layers(target.num_layers),
                "use_aux_hidden_state": True,
            },
        }
