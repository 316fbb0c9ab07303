"""EAGLE-3 drafts for others: a folder in the field's own form (``hf``), or one that SGLang serves (``sglang``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge.errors import UserError
from specforge.export.names import check_tensors, from_hf
from specforge.modeling.draft import Draft, build_draft, config_fields, read_draft, save_draft
from specforge.target_files import TargetFiles

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def to_hf(draft: Draft, target: TargetFiles, folder: Path, dtype: str = "bfloat16") -> None:
    """Write config.json and model.safetensors, with the target's embedding, as EAGLE-3 checkpoints have it.

    Raises:
        UserError: the draft is not trained, damaged, or does not fit the target.
    """
    _write(draft, target, folder, dtype, {"embed_tokens.weight": target.embedding()})


def to_sglang(draft: Draft, target: TargetFiles, folder: Path, dtype: str = "bfloat16") -> None:
    """Write a folder for ``--speculative-draft-model-path``; SGLang takes the embedding from the target.

    Raises:
        UserError: the draft is not trained, damaged, or would not be loaded as what it is.
    """
    check_contract(config_fields(draft), target)
    _write(draft, target, folder, dtype, {})


def check_contract(config: dict[str, Any], target: TargetFiles) -> None:
    """What SGLang infers from the config must be what training did.

    Raises:
        UserError: a field is missing or means another network to the server.
    """
    eagle = config.get("eagle_config") or {}
    layers = eagle.get("eagle_aux_hidden_state_layer_ids")
    if not layers:
        raise UserError(
            "export: the draft config has no eagle_config.eagle_aux_hidden_state_layer_ids; "
            "the server would silently capture its default layers"
        )
    if max(layers) >= target.num_layers - 1:
        raise UserError(
            f"export: layer {max(layers)} is the last of {target.name}; SGLang captures what enters the layer "
            "above, so it cannot serve this draft"
        )
    width = config.get("target_hidden_size", config["hidden_size"]) * len(layers)
    if width == config["hidden_size"]:
        raise UserError("export: features as wide as the draft's states; SGLang would skip fc")
    if config.get("draft_vocab_size") is None:
        raise UserError(
            "export: the draft config has no draft_vocab_size; the server would use the target's lm_head"
        )
    if config.get("tie_word_embeddings"):
        raise UserError("export: tie_word_embeddings is set; the server would use the embedding as lm_head")


def _write(draft: Draft, target: TargetFiles, folder: Path, dtype: str, extra: dict[str, Tensor]) -> None:
    where = f"export to {folder}"
    state = {name: x.detach().cpu() for name, x in draft.state_dict().items()}
    config = config_fields(draft)
    check_tensors(state, build_draft(config).state_dict(), where)
    served = build_draft({**config, **_rope_twice(config), "dtype": dtype, "torch_dtype": dtype}, where)
    served.load_state_dict(state)
    served.to(DTYPES[dtype])
    if extra:
        extra = {name: x.to(DTYPES[dtype]) for name, x in extra.items()}
    save_draft(served, folder, extra)
    _read_back(folder, served)


def _rope_twice(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE fields in the old form too; servers read one or the other."""
    rope = dict(config.get("rope_parameters") or {})
    fields: dict[str, Any] = {}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return fields


def _read_back(folder: Path, written: Draft) -> None:
    """Parity probe: what lies on disk, read as a stranger would, is the network that was written."""
    config, tensors = read_draft(folder)
    again = build_draft(config, str(folder))
    again.load_state_dict(from_hf(config, tensors, str(folder)))
    again.to(next(written.parameters()).dtype)
    for name, tensor in written.state_dict().items():
        if not torch.equal(tensor.cpu(), again.state_dict()[name]):
            raise UserError(f"{folder}: tensor {name} did not survive the round trip")
