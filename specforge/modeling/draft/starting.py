"""How a draft starts: its config for a target, the draft on disk it continues from, and its first weights."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge.checkpoints import read_checkpoint
from specforge.errors import UserError
from specforge.files import read_json
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft.checks import check_borrowed, check_stored
from specforge.modeling.draft.fields import draft_rope, quoted, target_rope
from specforge.modeling.draft.format import DraftFormat
from specforge.modeling.draft.registry import Draft, as_trained, canonical, config_fields, find_draft_config, read_draft
from specforge.modeling.draft.speculators import verifier_of
from specforge.modeling.layers.decoder_layer import ROPE_TYPES, RotaryTable

logger = logging.getLogger(__name__)

CHECKPOINT_KEY = "specforge"
# Checkpoints without a version were written before drafts rejected fields that they do not read.
CONFIG_VERSION = 1


class SavedDraft(NamedTuple):
    """A draft on disk from which a run starts."""

    path: Path  # a SpecForge checkpoint, or the folder of a published draft
    config: dict[str, Any]  # its config in SpecForge's own form
    tensors: dict[str, Tensor]  # its tensors as stored
    form: DraftFormat | None  # format of a folder; None for a checkpoint
    steps: int = 0  # optimizer steps of a checkpoint
    verifier: str | None = None  # the target that a folder names

    @property
    def where(self) -> str:
        """The file with its config, for error messages."""
        return str(self.path if self.form is None else self.path / "config.json")

    @classmethod
    def read(cls, path: str | Path, form: DraftFormat) -> SavedDraft:
        """Read a checkpoint or a folder.

        Raises:
            UserError: the path is neither, or its content is damaged.
        """
        path = Path(path)
        if path.is_dir():
            config, tensors = read_draft(path)
            if "d2t" in tensors and tensors["d2t"].ndim == 1:
                config.setdefault("draft_vocab_size", len(tensors["d2t"]))
            return cls(path, config, tensors, form, verifier=verifier_of(read_json(path / "config.json")))
        checkpoint = read_checkpoint(path)
        state = checkpoint["state_dict"].items()
        state = {name.removeprefix("draft."): x for name, x in state if name.startswith("draft.")}
        config = saved_config(checkpoint[CHECKPOINT_KEY], str(path))
        return cls(path, config, state, None, int(checkpoint.get("global_step", 0)))

    @classmethod
    def named(cls, init_from: str | None, form: DraftFormat, others: Sequence[str] = ()) -> SavedDraft | None:
        """The draft at ``init_from``; None if that is None or one of the keywords in ``others``."""
        return None if init_from is None or init_from in others else cls.read(init_from, form)


def saved_config(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The draft config in a checkpoint's own entry (:data:`CHECKPOINT_KEY`).

    Raises:
        UserError: the entry has no draft config.
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
        target: the target that the draft must fit.
        given: path of a JSON file or name of a shipped one; or fields to change; or None.
        defaults: the algorithm's config for this target, to which the changes apply.
        source: the draft from which the run starts; the changes apply to its config instead.

    Returns:
        The fields, and their name for error messages.

    Raises:
        UserError: the file cannot be read, or a field does not fit the target.
    """
    if source is not None and _name_layers(source.config, defaults):
        layers = source.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        logger.warning("%s names no captured layers; the draft reads %s, as in servers", source.where, list(layers))
    if isinstance(given, str):
        config, where = canonical(read_json(find_draft_config(given)), given), given
    else:
        base = defaults if source is None else source.config
        where = "model.draft_config" if source is None or _changes(base, given or {}) else source.where
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


def _changes(base: Mapping[str, Any], given: Any) -> bool:
    """Whether what is given differs from the config that it is to change."""
    return not isinstance(given, Mapping) or any(base.get(key) != value for key, value in given.items())


def _name_layers(config: dict[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Fill in the default captured layers of an EAGLE draft, as servers do; whether it named none."""
    own = config.get("eagle_config", {})
    if "eagle_config" not in defaults or not isinstance(own, Mapping):
        return False
    config["eagle_config"] = {**defaults["eagle_config"], **own}
    return "eagle_aux_hidden_state_layer_ids" not in own


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

    They describe Llama layers whatever the target's layers are: gated MLPs, RMS norms, rotary positions.

    Raises:
        UserError: the target's config has no number of attention heads.
    """
    config, hidden = target.config, target.hidden_size
    heads = _first_size(config, ("num_attention_heads",))
    if heads is None:
        raise UserError(f"{target.name}: its config has no num_attention_heads; set model.draft_config to a JSON file")
    kv_heads = _first_size(config, ("num_key_value_heads", "num_kv_heads")) or heads
    head_dim = _first_size(config, ("head_dim",)) or hidden // heads
    # LlamaConfig accepts only numbers of heads that divide the hidden size.
    heads = next(count for count in range(heads, 0, -1) if hidden % count == 0)
    positions = _first_size(config, ("max_position_embeddings",))
    rope = draft_rope(config)
    return {
        "hidden_size": hidden,
        "intermediate_size": _first_size(config, ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"))
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


def _first_size(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The first of the named fields that is a size; for a list with one entry per layer, its last entry."""
    for name in names:
        value = config.get(name)
        value = value[-1] if isinstance(value, list) and value else value
        if type(value) is int and value > 0:
            return value
    return None


def initialise(module: torch.nn.Module) -> None:
    """Draw a linear layer's matrix from a normal distribution with standard deviation 0.02, as targets do."""
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=0.02)


def initialise_layers(module: torch.nn.Module) -> None:
    """As :func:`initialise`, with biases of zero."""
    initialise(module)
    if isinstance(module, torch.nn.Linear) and module.bias is not None:
        torch.nn.init.zeros_(module.bias)


def distinct_layers(chosen: list[int], num_layers: int) -> list[int]:
    """An algorithm's choice of layers, or evenly spaced ones if the target has too few for the choice to be distinct.

    The last layer is never chosen, because servers capture the input of the layer above.
    """
    if min(chosen) >= 0 and len(set(chosen)) == len(chosen):
        return chosen
    below = max(1, num_layers - 1)
    return spread(min(len(chosen), below), below)


def spread(count: int, layers: int) -> list[int]:
    """``count`` evenly spaced layers of a model, including the first and the last."""
    return [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]


def copy_into(parameter: Tensor, value: Tensor, what: str) -> None:
    """Copy a tensor of the target, named ``what`` in error messages, into a parameter.

    Raises:
        UserError: it has another shape.
    """
    if parameter.shape != value.shape:
        raise UserError(
            f"{what} is {tuple(value.shape)}, but the draft's is {tuple(parameter.shape)}, so the draft cannot start "
            "from it"
        )
    parameter.copy_(value)


def rotary_of_target(own: RotaryTable, config: Any, target: TargetFiles) -> RotaryTable:
    """The rotary positions to use when a draft's layer is compared with the target's.

    A derived draft may have simpler positions than the target (:func:`draft_rope`), which is no reason to reject it:
    the comparison then uses the target's positions. Positions chosen by the user are compared as they are.
    """

    def table(rope: Mapping[str, Any] | None) -> RotaryTable | None:
        if rope is None or rope["rope_type"] not in ROPE_TYPES:
            return None
        changed = copy.copy(config)
        changed.rope_parameters = dict(rope)
        return RotaryTable(changed)

    if table(draft_rope(target.config)) in (None, own):
        return own
    return table(target_rope(target.config)) or own


def load_weights(
    draft: Draft, source: SavedDraft | str | Path, form: DraftFormat, target: TargetFiles | None = None
) -> None:
    """Load the weights of a draft on disk: a SpecForge checkpoint, or the folder of a published draft.

    Args:
        draft: the network, on the CPU.
        source: the draft on disk.
        form: layout of folders.
        target: compare a folder's copies of the target's tensors with this target's.

    Raises:
        UserError: it is a different network, or a tensor is missing, unknown, damaged or of another shape; or the
            folder has an embedding or head that is not the target's.
    """
    if not isinstance(source, SavedDraft):
        source = SavedDraft.read(source, form)
    path = source.path
    # A block drafter may continue training with another block size.
    found = draft.difference(source.config, str(path), ignored=("block_size",))
    if found is not None:
        name, theirs, mine = found
        raise UserError(
            f"{path} was trained with {name} {quoted(theirs)}, but the draft config has {quoted(mine)}; to continue "
            f"with the trained network, set {_option(name)} to the trained value or leave it out"
        )
    tensors = source.tensors
    if source.form is not None:
        tensors = source.form.read(config_fields(draft), tensors, where=str(path))
    own = draft.state_dict()
    for name, tensor in tensors.items():
        if name not in own:
            raise UserError(f"{path}: the draft has no tensor {name}")
        check_stored(name, tensor, own[name], str(path))
    missing = sorted(set(own) - set(tensors))
    if missing:
        raise UserError(f"{path}: tensor {missing[0]} is missing")
    draft.load_state_dict(tensors)
    if source.form is not None and target is not None:
        borrowed = source.form.named(source.tensors, str(path)).items()
        check_borrowed({name: x for name, x in borrowed if name not in own}, target, draft.target_ids, str(path))
        if source.verifier is not None and Path(source.verifier).name.lower() != Path(target.name).name.lower():
            logger.warning("%s: its config names the target %s, not %s", path, source.verifier, target.name)
    draft.trained = source.steps > 0


def _option(field: str) -> str:
    """The option that sets a field of the draft config."""
    return "model.layer_ids" if field.endswith("layer_ids") else f"model.draft_config.{field}"
