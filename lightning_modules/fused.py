"""What the EAGLE-3 family shares: drafts that read fused features and have their own head."""

from __future__ import annotations

from typing import Any

import torch

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


class FusedModule(DistilledModule):
    """Base of EAGLE-3 and what is built like it.

    Args:
        target: folder or hub name of the frozen target.
        draft_config: JSON file of the draft, or fields that replace those derived from the target.
        layer_ids: the captured layers, instead of the draft config's.
        init_from: a SpecForge checkpoint or a draft in the field's own form (weights only); ``target``: the target's
            own last layer and head; or None: random.
        training: ``weights``, ``objective`` and the other arguments of :class:`DistilledModule`.

    """

    draft: EagleDraft

    def __init__(
        self,
        target: str,
        draft_config: str | dict[str, Any] | None,
        layer_ids: list[int] | None,
        init_from: str | None,
        **training: Any,
    ) -> None:
        files = TargetFiles.find(target)
        source = SavedDraft.named(init_from, self.export_format, ("target",))
        config, where = draft_config_for(files, draft_config, self.default_draft_config(files), source)
        if layer_ids is not None:
            config["eagle_config"] = {**config["eagle_config"], "eagle_aux_hidden_state_layer_ids": list(layer_ids)}
        draft = self.build(config, where)
        check_layers(CapturePolicy(draft.layer_ids), files.num_layers, files.name)
        draft.apply(initialise_layers)
        if init_from == "target":  # in setup several ranks would draw other numbers than one
            torch.nn.init.normal_(draft.fc.weight, std=0.002)
        if source is not None:
            load_weights(draft, source, self.export_format)
        starts_anew = source is None
        super().__init__(
            files,
            draft,
            CapturePolicy(draft.layer_ids),
            has_vocabulary=not starts_anew,
            start=draft.start_from_target if init_from == "target" else None,
            **training,
        )
        self.starts_anew = starts_anew

    @classmethod
    def default_layers(cls, num_layers: int) -> list[int]:
        """Outputs of layers 1, L/2 - 1 and L - 4: the inputs of layers 2, L/2 and L - 3 of the EAGLE-3 code."""
        return distinct_layers([1, num_layers // 2 - 1, num_layers - 4], num_layers)

    @classmethod
    def default_draft_config(cls, target: TargetFiles) -> dict[str, Any]:
        """One Llama layer of the target's own dimensions, over at most 32,000 tokens."""
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
