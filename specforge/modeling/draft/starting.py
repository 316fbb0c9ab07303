"""How a draft starts: its config for a target, the draft on disk it continues from, and its first weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge.errors import UserError
from specforge.export.checkpoint import read_checkpoint
from specforge.files import read_json
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft.checks import check_stored
from specforge.modeling.draft.fields import draft_rope, quoted, rope_fields
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.registry import Draft, as_trained, canonical, config_fields, find_draft_config, read_draft
from specforge.modeling.layers.decoder_layer import ROPE_TYPES, RotaryTable

CHECKPOINT_KEY = "specforge"
# Checkpoints without it were written before drafts refused fields that they do not read.
CONFIG_VERSION = 1


class SavedDraft(NamedTuple):
    """A draft on disk that a run starts from.

    Attributes:
        path: a SpecForge checkpoint, or a folder in the field's own form.
        config: its config, as SpecForge writes it.
        tensors: its tensors as stored.
        form: the names of a folder's tensors; None for a checkpoint.
        steps: optimizer steps that a checkpoint was trained for.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    form: DraftFormat | None
    steps: int = 0

    @classmethod
    def read(cls, path: str | Path, form: DraftFormat) -> SavedDraft:
        """Read a checkpoint or a folder.

        Raises:
            UserError: it is neither, or damaged.
        """
        path = Path(path)
        if path.is_dir():
            config, tensors = read_draft(path)
            if "d2t" in tensors and tensors["d2t"].ndim == 1:
                config.setdefault("draft_vocab_size", len(tensors["d2t"]))
            return cls(path, config, tensors, form)
        checkpoint = read_checkpoint(path)
        state = checkpoint["state_dict"].items()
        state = {name.removeprefix("draft."): x for name, x in state if name.startswith("draft.")}
        config = saved_config(checkpoint[CHECKPOINT_KEY], str(path))
        return cls(path, config, state, None, int(checkpoint.get("global_step", 0)))

    @classmethod
    def named(cls, init_from: str | None, form: DraftFormat, others: Sequence[str] = ()) -> SavedDraft | None:
        """The draft that ``init_from`` names; None if it is None or one of ``others``, which do not name a draft."""
        return None if init_from is None or init_from in others else cls.read(init_from, form)


def saved_config(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The draft config of a checkpoint, from the entry that :meth:`DraftModule.on_save_checkpoint` adds.

    Raises:
        UserError: the entry has none.
    """
    if not isinstance(saved, Mapping) or "draft_config" not in saved:
        raise UserError(f"{where}: not a SpecForge checkpoint")
    config = canonical(saved["draft_config"], where)
    return config if saved.get("config_version") == CONFIG_VERSION else as_trained(config, where)


def draft_config_for(
    target: TargetFiles,
    given: str | Mapping[str, Any] | None,
    defaults: Mapping[str, Any],
    source: SavedDraft | None = None,
) -> tuple[dict[str, Any], str]:
    """The draft config of a run.

    Args:
        target: the target it must fit.
        given: path of a JSON file, or name of a shipped one; or fields to change; or None.
        defaults: the algorithm's config for this target, which ``given`` changes.
        source: the draft that the run starts from; if there is one, ``given`` changes its config instead.

    Returns:
        The fields, and what to call them in an error message.

    Raises:
        UserError: the file cannot be read, or a field does not fit the target.
    """
    if source is not None:
        _name_layers(source.config, defaults)
    if isinstance(given, str):
        config, where = canonical(read_json(find_draft_config(given)), given), given
    else:
        base, where = defaults if source is None else source.config, "model.draft_config"
        config = _merged(canonical(base, where), given or {}, where)
    _name_layers(config, defaults)
    fits = {"vocab_size": target.vocab_size, "target_hidden_size": target.hidden_size}
    for key, value in fits.items():
        if config.get(key, value) != value:
            raise UserError(f"{where}: {key} is {config[key]}, but the target {target.name} has {value}")
    size = config.get("draft_vocab_size")
    if isinstance(size, int) and size > target.vocab_size:
        raise UserError(f"{where}: draft_vocab_size is {size}, but {target.name} has {target.vocab_size} tokens")
    if config.get("hidden_size") != target.hidden_size:
        raise UserError(
            f"{where}: hidden_size is {config.get('hidden_size')}, but the draft reads the embedding of "
            f"{target.name}, whose width is {target.hidden_size}"
        )
    return config, where


def _name_layers(config: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Fill in the default captured layers of a draft with fused features, as servers do."""
    own = config.get("eagle_config", {})
    if "eagle_config" in defaults and isinstance(own, Mapping):
        config["eagle_config"] = {**defaults["eagle_config"], **own}


def _merged(base: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config with some fields changed, also inside ``eagle_config`` and ``dflash_config``."""
    loose = ("rope_theta", "partial_rotary_factor")
    rope = {} if not isinstance(given, Mapping) else {key: given[key] for key in loose if key in given}
    if rope and not (given.get("rope_parameters") or given.get("rope_scaling")):
        given = {**given, "rope_parameters": {**base.get("rope_parameters", {}), **rope}}
    changes = canonical(given, where, base.get("architectures"))
    nested = {
        key: {**base[key], **value}
        for key, value in changes.items()
        if key.endswith("_config") and isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
    }
    return {**base, **changes, **nested}


def layer_fields(target: TargetFiles) -> dict[str, Any]:
    """Fields of a draft config whose layers have the target's dimensions and positions.

    The layers are Llama layers, whatever the target's are: gated MLPs, root-mean-square norms, rotary positions.

    Raises:
        UserError: the target's config does not say how many attention heads it has.
    """
    config, hidden = target.config, target.hidden_size
    heads = _first(config, ("num_attention_heads",))
    if heads is None:
        raise UserError(f"{target.name}: its config has no num_attention_heads; set model.draft_config to a JSON file")
    kv_heads = _first(config, ("num_key_value_heads", "num_kv_heads")) or heads
    head_dim = _first(config, ("head_dim",)) or hidden // heads
    # LlamaConfig accepts only numbers of heads that divide the hidden size.
    heads = next(count for count in range(heads, 0, -1) if hidden % count == 0)
    positions = _first(config, ("max_position_embeddings",))
    rope = draft_rope(config)
    return {
        "hidden_size": hidden,
        "intermediate_size": _first(config, ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"))
        or 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": math.gcd(heads, kv_heads),
        "head_dim": max(2, head_dim + head_dim % 2),
        "hidden_act": "silu",
        "rms_norm_eps": config.get("rms_norm_eps") or 1e-6,
        "vocab_size": target.vocab_size,
        **({} if rope is None else {"rope_parameters": rope}),
        **({} if positions is None else {"max_position_embeddings": positions}),
    }


def _first(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The first of some fields that is a size; of a list with an entry for each layer, the last entry."""
    for name in names:
        value = config.get(name)
        value = value[-1] if isinstance(value, list) and value else value
        if type(value) is int and value > 0:
            return value
    return None


def initialise(module: torch.nn.Module) -> None:
    """Draw the matrix of a linear layer anew, as the targets' own are drawn."""
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=0.02)


def initialise_layers(module: torch.nn.Module) -> None:
    """Like :func:`initialise`, and biases start at zero."""
    initialise(module)
    if isinstance(module, torch.nn.Linear) and module.bias is not None:
        torch.nn.init.zeros_(module.bias)


def distinct_layers(chosen: list[int], num_layers: int) -> list[int]:
    """An algorithm's choice of layers; for a target of so few that some of them coincide, as many as there are.

    The last layer is left out, because servers capture what enters the layer above.
    """
    if min(chosen) >= 0 and len(set(chosen)) == len(chosen):
        return chosen
    below = max(1, num_layers - 1)
    return spread(min(len(chosen), below), below)


def spread(count: int, layers: int) -> list[int]:
    """``count`` of a model's layers, evenly spaced, the first and the last among them."""
    return [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]


def copy_into(parameter: Tensor, value: Tensor, what: str) -> None:
    """Start a parameter as a tensor of the target, which a message calls ``what``.

    Raises:
        UserError: it has another shape.
    """
    if parameter.shape != value.shape:
        raise UserError(f"{what} is {tuple(value.shape)}, the draft's {tuple(parameter.shape)}: it cannot start there")
    parameter.copy_(value)


def rotary_of_target(own: RotaryTable, config: Any, target: TargetFiles) -> RotaryTable:
    """The rotary positions with which a draft's layer is compared with the target's layer.

    A derived draft may simplify the target's positions (:func:`draft_rope`). That is no reason to refuse it, so the
    layers are then compared with the target's positions. Positions that the user chose are compared as they are.

    Args:
        own: the draft's table.
        config: the draft's config.
        target: the target.
    """

    def table(rope: Mapping[str, Any] | None) -> RotaryTable | None:
        if rope is None or rope["rope_type"] not in ROPE_TYPES:
            return None
        changed = copy.copy(config)
        changed.rope_parameters = dict(rope)
        return RotaryTable(changed)

    if table(draft_rope(target.config)) in (None, own):
        return own
    return table(rope_fields({"rope_parameters": target.config.get("rope_parameters")})) or own


def load_weights(draft: Draft, source: SavedDraft | str | Path, form: DraftFormat) -> None:
    """Start from a draft on disk: a SpecForge checkpoint, or a folder in the field's own form.

    Raises:
        UserError: it is another network, or tensors are missing, unknown or damaged, or have another shape.
    """
    if not isinstance(source, SavedDraft):
        source = SavedDraft.read(source, form)
    path = source.path
    # A block drafter can be trained further with blocks of another size.
    found = draft.difference(source.config, str(path), ignored=("block_size",))
    if found is not None:
        name, theirs, mine = found
        raise UserError(
            f"{path} was trained with {name} {quoted(theirs)}, but the draft config has {quoted(mine)}; leave it "
            "out of model.draft_config (or model.layer_ids) to continue with what was trained"
        )
    tensors = source.tensors
    if source.form is not None:
        tensors = source.form.read(config_fields(draft), tensors, where=str(path))
    own = draft.state_dict()
    for name, tensor in tensors.items():
        if name not in own:
            raise UserError(f"{path}: tensor {name} has no place in the draft")
        check_stored(name, tensor, own[name], str(path))
    missing = sorted(set(own) - set(tensors))
    if missing:
        raise UserError(f"{path}: tensor {missing[0]} is missing")
    draft.load_state_dict(tensors)
    draft.trained = source.steps > 0
