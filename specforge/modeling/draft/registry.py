"""Draft networks by architecture name, and the two files a draft is on disk: config.json, model.safetensors.

A new network is one file in this folder with a class under ``@register_draft("ArchitectureName")``; the
package imports every file in it, so nothing else has to be edited.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from specforge.errors import UserError
from specforge.files import parse_json, read_json, write_folder


class Draft(nn.Module):
    """Base of every draft network.

    Args:
        config: transformers config with at least ``vocab_size``; ``draft_vocab_size`` when the draft predicts
            a part of the vocabulary. ``attn_implementation`` (not stored) is ``sdpa`` or ``flex_attention``.

    Attributes:
        d2t: ``[D]`` int64, offset from a draft id to its target id: ``target = draft + d2t[draft]``.
        t2d: ``[V]`` bool, whether a target id is in the draft vocabulary.
        attention_implementations: names that ``attn_implementation`` may have.
        flex: whether its layers train with FlexAttention rather than PyTorch's fused kernels.

    Raises:
        ValueError: a field asks for a network that the class is not.
    """

    architecture: str
    config_class: type
    attention_implementations: ClassVar[tuple[str, ...]] = ("sdpa", "flex_attention")
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        size = getattr(config, "draft_vocab_size", None) or config.vocab_size
        config.draft_vocab_size = size
        self.register_buffer("d2t", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.t2d[:size] = True
        self._target_ids: tuple[tuple[int, int], Tensor] | None = None
        attention = getattr(config, "_attn_implementation", None) or "sdpa"
        if attention not in self.attention_implementations:
            raise ValueError(
                f"attn_implementation is {attention}; the draft has {', '.join(self.attention_implementations)}"
            )
        self.flex = attention == "flex_attention"

    def set_vocabulary(self, target_ids: Tensor) -> None:
        """Choose the draft vocabulary.

        Args:
            target_ids: ``[D]`` int64, ascending; the target id of every draft id.
        """
        if target_ids.shape != self.d2t.shape:
            raise ValueError(f"{len(target_ids)} ids for a draft vocabulary of {len(self.d2t)}")
        target_ids = target_ids.to(self.d2t.device)
        self.d2t.copy_(target_ids - torch.arange(len(target_ids), device=target_ids.device))
        self.t2d.zero_()
        self.t2d[target_ids] = True

    @property
    def target_ids(self) -> Tensor:
        """``[D]`` target id of every draft id; the same tensor until the vocabulary changes."""
        key = (self.d2t.data_ptr(), self.d2t._version)
        if self._target_ids is None or self._target_ids[0] != key:
            ids = torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t
            self._target_ids = (key, ids)
        return self._target_ids[1]

    def draft_ids(self, target_ids: Tensor) -> Tensor:
        """Draft id of each target id (any shape), -1 where it is outside the draft vocabulary."""
        ids = torch.searchsorted(self.target_ids, target_ids)
        return torch.where(self.t2d[target_ids], ids, -1)


def copy_into(parameter: Tensor, value: Tensor, what: str) -> None:
    """Start a parameter as a tensor of the target, which a message calls ``what``.

    Raises:
        UserError: it has another shape.
    """
    if parameter.shape != value.shape:
        raise UserError(
            f"{what} is {tuple(value.shape)}, the draft's {tuple(parameter.shape)}: it cannot start there"
        )
    parameter.copy_(value)


_DRAFTS: dict[str, type[Draft]] = {}
_BY_PROJECTOR: dict[str, str] = {}
_D = TypeVar("_D", bound=type[Draft])


def register_draft(
    architecture: str, config_class: type, projector_type: str | None = None
) -> Callable[[_D], _D]:
    """Class decorator: drafts whose config names ``architecture`` are built by this class.

    Args:
        architecture: the name in ``config.json`` under ``architectures``.
        config_class: the transformers config class that reads the rest of the file.
        projector_type: where others call the architecture DFlash's, and tell it by this field of ``dflash_config``.
    """

    def register(cls: _D) -> _D:
        cls.architecture, cls.config_class = architecture, config_class
        _DRAFTS[architecture] = cls
        if projector_type is not None:
            _BY_PROJECTOR[projector_type] = architecture
        return cls

    return register


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """SpecForge's name of a config's architecture, or the names that are there."""
    kind = (config.get("dflash_config") or {}).get("projector_type")
    return [_BY_PROJECTOR[kind]] if kind in _BY_PROJECTOR else list(config.get("architectures") or [])


def build_draft(config: Mapping[str, Any], where: str = "draft config") -> Draft:
    """Build a randomly initialised draft from the fields of a ``config.json``.

    Args:
        config: the fields; ``architectures`` picks the class.
        where: what to call the config in an error message.

    Raises:
        UserError: no registered architecture, or the class refuses the fields.
    """
    names = _architectures(config)
    known = [name for name in names if name in _DRAFTS]
    if not known:
        raise UserError(f"{where}: architectures is {names}; SpecForge has {', '.join(sorted(_DRAFTS))}")
    cls = _DRAFTS[known[0]]
    fields = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    try:
        return cls(cls.config_class(**fields, architectures=[known[0]]))
    except (AttributeError, KeyError) as error:
        raise UserError(f"{where}: field {error} is missing for {known[0]}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def config_fields(draft: Draft) -> dict[str, Any]:
    """The fields of the draft's ``config.json``."""
    fields: dict[str, Any] = json.loads(draft.config.to_json_string(use_diff=False))
    return {key: value for key, value in fields.items() if value is not None}


def save_draft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``; the folder appears whole or not at all.

    Args:
        config: fields of ``config.json``.
        tensors: by the names to write, each in its own dtype, on the CPU.
        folder: new or empty; one that this function wrote is replaced.

    Raises:
        UserError: something else is there, or the disk is full or not writable.
    """
    content = {name: x.contiguous() for name, x in tensors.items()}
    write_folder(
        folder,
        {
            "config.json": json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
            "model.safetensors": save(content, metadata={"format": "pt"}),
        },
        _is_export,
    )


def _is_export(folder: Path) -> bool:
    """Whether a folder's config has the form that :func:`save_draft` gives it: both names of the dtype, sorted."""
    try:
        text = (folder / "config.json").read_bytes()
        config = parse_json(text)
        named = config["dtype"] == config["torch_dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return named and text == json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


def read_draft(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config fields, with SpecForge's name of the architecture, and tensors of a draft on disk.

    Raises:
        UserError: a file is missing, damaged, or a pickle.
    """
    config = read_json(folder / "config.json")
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        path = folder / "model.safetensors"
        pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
        hint = f" ({', '.join(pickles)} is a pickle, which SpecForge never loads)" if pickles else ""
        raise UserError(f"{path}: no such file{hint}; a draft is config.json beside model.safetensors")
    tensors: dict[str, Tensor] = {}
    for path in shards:
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    return {**config, "architectures": _architectures(config)}, tensors
