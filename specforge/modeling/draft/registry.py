"""The base class of draft networks, the registry by architecture name, and a draft's files on disk.

A new network is a class with ``@register_draft("ArchitectureName")`` in any module of this package. The package imports
all its modules, so nothing else has to be edited. On disk a draft is ``config.json`` and ``model.safetensors``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Container, Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specforge.errors import UserError
from specforge.files import first_line, parse_json, read_json, weight_files, write_folder
from specforge.modeling.draft.fields import (
    ANYTHING,
    Fields,
    bookkeeping,
    check_fields,
    check_rope,
    quoted,
    rope_fields,
    without_ignored_fields,
)
from specforge.modeling.draft.speculators import from_speculators, is_speculators
from specforge.modeling.layers.decoder_layer import DecoderLayer, SwiGLUMLP
from specforge.system import available_memory

T = TypeVar("T")


class Draft(nn.Module):
    """Base of every draft network.

    Args:
        config: transformers config with at least ``vocab_size``; ``draft_vocab_size`` if the draft predicts only part
            of the vocabulary. ``attn_implementation`` (not stored) is ``sdpa`` or ``flex_attention``.

    Attributes:
        fields: the config fields that the network reads; any other field that would change a network is rejected.
            None if the class does not declare them, so that every field is accepted.
        d2t: ``[D]`` int64, offset from a draft id to its target id: ``target = draft + d2t[draft]``.
        t2d: ``[V]`` bool, whether a target id is in the draft vocabulary.
        target_ids: ``[D]`` int64, target id of every draft id; the same tensor until the vocabulary or device changes.
        attention_implementations: accepted values of ``attn_implementation``.
        other_names: the class's names in other projects.
        trained: whether its weights come from a checkpoint written after at least one optimizer step.
        flex: whether its layers train with FlexAttention instead of PyTorch's fused kernels.
        recomputes: whether training computes the inside of a layer again in the backward pass.
        fp8: whether training multiplies by large matrices, those of the vocabulary aside, in fp8.

    Raises:
        ValueError: a field describes a network that the class does not implement.
    """

    architecture: str
    other_names: tuple[str, ...]
    config_class: type
    fields: ClassVar[Fields | None] = None
    attention_implementations: ClassVar[tuple[str, ...]] = ("sdpa", "flex_attention")
    d2t: Tensor
    t2d: Tensor
    target_ids: Tensor
    trained: bool = False
    recomputes: bool = False
    fp8: bool = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        size = getattr(config, "draft_vocab_size", None) or config.vocab_size
        config.draft_vocab_size = size
        self.register_buffer("d2t", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.t2d[:size] = True
        self.register_buffer("target_ids", torch.arange(size), persistent=False)
        self.register_load_state_dict_post_hook(Draft._update_target_ids)
        attention = getattr(config, "_attn_implementation", None) or "sdpa"
        if attention not in self.attention_implementations:
            raise ValueError(
                f"attn_implementation is {attention}; the draft has {', '.join(self.attention_implementations)}"
            )
        self.flex = attention == "flex_attention"

    def checkpoint_activations(self, what: Literal["none", "mlp", "layer"]) -> None:
        """Choose the activations that training computes again instead of keeping them."""
        self.recomputes = what == "layer"
        for module in self.modules():
            if isinstance(module, SwiGLUMLP):
                module.keeps_projections = what == "none"

    def multiply_in_fp8(self) -> None:
        """Train with products in fp8, where the sizes of a matrix are multiples of 16.

        Raises:
            UserError: the draft does not consist of this package's layers.
        """
        layers = [m for m in self.modules() if isinstance(m, (DecoderLayer, SwiGLUMLP))]
        if not layers:
            raise UserError(f"model.fp8: {self.architecture} has no layers that multiply in fp8; leave it out")
        self.fp8 = True
        for layer in layers:
            layer.fp8 = True

    def run_layer(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)``, whose inside is computed again in the backward pass if the draft recomputes layers."""
        if not (self.recomputes and torch.is_grad_enabled()):
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    @staticmethod
    def translate(config: dict[str, Any]) -> None:
        """Rename and move, in place, the fields that other projects write under other names or in other places.

        Raises:
            ValueError: two fields contradict each other.
        """

    @classmethod
    def is_described_by(cls, config: Mapping[str, Any]) -> bool:
        """Whether a config describes this class although it names another architecture, as other projects do."""
        return any(name in cls.other_names for name in config.get("architectures", ()))

    def difference(
        self, config: Mapping[str, Any], where: str, ignored: Container[str] = ()
    ) -> tuple[str, Any, Any] | None:
        """The first field, ``ignored`` ones aside, in which this network differs from one that a config describes.

        Returns:
            The field's name, the config's value and this network's value; None if there is no difference.
        """
        if self.fields is None:
            mine = config_fields(self)
            theirs = {key: config[key] for key in mine.keys() & config.keys() - bookkeeping()}
            return _first_difference(theirs, {key: mine[key] for key in theirs})
        with torch.device("meta"):
            other = build_draft(config, where)
        found = _first_difference(
            *(
                _network(x.config.to_dict(), x.fields or {}, ignored) | {"architectures": x.architecture}
                for x in (other, self)
            )
        )
        if found is None and getattr(other, "rotary", None) != getattr(self, "rotary", None):
            return "rope_parameters", other.config.rope_parameters, self.config.rope_parameters
        return found

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
        self._update_target_ids()

    def _update_target_ids(self, *_: Any) -> None:
        self.target_ids = torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def draft_ids(self, target_ids: Tensor) -> Tensor:
        """Draft id of each target id (any shape); -1 outside the draft vocabulary."""
        ids = torch.searchsorted(self.target_ids, target_ids)
        return torch.where(self.t2d[target_ids], ids, -1)


# The exceptions that classes of transformers and torch raise for a user's file.
LIBRARY_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)
_DRAFTS: dict[str, type[Draft]] = {}
_D = TypeVar("_D", bound=type[Draft])


def register_draft(architecture: str, config_class: type, other_names: tuple[str, ...] = ()) -> Callable[[_D], _D]:
    """Class decorator: registers a draft under an architecture, with the transformers class of its ``config.json``."""

    def register(cls: _D) -> _D:
        cls.architecture, cls.config_class, cls.other_names = architecture, config_class, other_names
        _DRAFTS[architecture] = cls
        return cls

    return register


def canonical(config: Any, where: str, architectures: Any = None) -> dict[str, Any]:
    """A draft's config in SpecForge's own form, as a new dict: its names of architectures and fields, without nulls.

    ``config`` may have only some fields of a ``config.json``; ``architectures`` are theirs if they name none.

    Raises:
        UserError: the config is not an object, or two fields contradict each other.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{where}: is {quoted(config)}, not an object with the fields of a draft")
    fields = _without_nulls(config)
    if is_speculators(fields):
        try:
            fields = _without_nulls(from_speculators(fields))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    names = fields.get("architectures", architectures or [])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: architectures is {quoted(names)}, not a list of names")
    cls = next((cls for cls in _DRAFTS.values() if cls.is_described_by(fields)), None)
    cls = cls or next((_DRAFTS[name] for name in names if name in _DRAFTS), None)
    if cls is None or cls.fields is None:
        return fields
    try:
        rope = rope_fields(fields)
        if rope is not None:
            for name in ("rope_scaling", "rope_theta", "partial_rotary_factor"):
                fields.pop(name, None)
            fields["rope_parameters"] = rope
        cls.translate(fields)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from error
    if "architectures" in fields:
        fields["architectures"] = [cls.architecture]
    return fields


def _without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config, also of the objects in it, without nulls."""
    return {
        str(key): dict(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value is not None
    }


def draft_class(config: Mapping[str, Any], where: str = "draft config") -> type[Draft]:
    """The registered class for a config's ``architectures``.

    Raises:
        UserError: none is registered.
    """
    names = canonical(config, where).get("architectures", [])
    cls = next((_DRAFTS[name] for name in names if name in _DRAFTS), None)
    if cls is None:
        raise UserError(f"{where}: architectures is {quoted(names)}; SpecForge has {', '.join(sorted(_DRAFTS))}")
    return cls


def build_draft(config: Mapping[str, Any], where: str = "draft config") -> Draft:
    """Build a randomly initialised draft from the fields of a ``config.json``.

    Raises:
        UserError: the architecture is not registered, or the class rejects the fields.
    """
    fields, cls = canonical(config, where), draft_class(config, where)
    fields.pop("architectures")
    try:
        if cls.fields is not None:
            check_fields(fields, cls.fields, cls.architecture, vars(cls.config_class()))
            check_rope(fields.get("rope_parameters", {"rope_type": "default"}))
        fields.pop("model_type", None)
        made = cls.config_class(**fields, architectures=[cls.architecture])
        check_memory(lambda: cls(copy.deepcopy(made)))
        return cls(made)
    except LIBRARY_ERRORS as error:
        raise UserError(f"{where}: {first_line(error)}") from error


def check_memory(build: Callable[[], nn.Module]) -> None:
    """Reject a network that does not fit into memory, before any of it is allocated.

    Args:
        build: builds the network; called once, on the meta device, without using up random numbers.

    Raises:
        ValueError: reports the size of the network.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        tensors = build().state_dict().values()
    needed, memory = sum(x.nbytes for x in tensors), available_memory()
    if needed > memory:
        raise ValueError(
            f"such a draft needs {needed / 1e9:.1f} GB, but only {memory / 1e9:.1f} GB of memory is available"
        )


# Positions are compared by their angles and widths by the shapes of tensors; the others do not affect trained weights.
_NOT_COMPARED = (
    "rope_parameters",
    "max_position_embeddings",
    "attn_implementation",
    "num_target_layers",
    "max_window_layers",
    "target_hidden_size",
    "num_aux_hidden_states",
)


def _first_difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    names = (name for name in sorted(theirs.keys() | mine.keys()) if theirs.get(name) != mine.get(name))
    return next(((name, theirs.get(name), mine.get(name)) for name in names), None)


def _network(config: Mapping[str, Any], fields: Fields, ignored: Container[str], prefix: str = "") -> dict[str, Any]:
    """Values of the fields that a network reads, by their full names."""
    found: dict[str, Any] = {}
    for name, kind in fields.items():
        if isinstance(kind, Mapping):
            found |= _network(config.get(name) or {}, kind, ignored, f"{prefix}{name}.")
        elif name not in _NOT_COMPARED and name not in ignored and kind is not ANYTHING:
            value = kind.default if config.get(name) is None else config[name]
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def as_trained(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of a checkpoint that has no config_version, without the fields that were ignored at that time.

    Raises:
        UserError: it is not a draft's config.
    """
    fields = canonical(config, where)
    cls = next((_DRAFTS[name] for name in fields.get("architectures", ()) if name in _DRAFTS), None)
    if cls is None or cls.fields is None:
        return fields
    return without_ignored_fields(fields, cls.fields, vars(cls.config_class()))


def config_fields(draft: Draft) -> dict[str, Any]:
    """The fields of the draft's ``config.json``."""
    fields: dict[str, Any] = json.loads(draft.config.to_json_string(use_diff=False))
    return {key: value for key, value in fields.items() if value is not None}


def find_draft_config(name: str) -> Path:
    """Path of a draft config, given its path or the name of one that is shipped.

    Raises:
        UserError: there is no such file.
    """
    folder = Path(str(files("specforge.configs"))) / "draft"
    shipped = {path.name: path for path in sorted(folder.glob("*.json"))}
    if not Path(name).exists() and name not in shipped:
        raise UserError(f"{name}: no such file, and no such draft config (there are {', '.join(shipped)})")
    return Path(name) if Path(name).exists() else shipped[name]


def save_draft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``; the folder appears complete or not at all.

    Args:
        config: fields of ``config.json``.
        tensors: tensors by name, each in the dtype to write, on the CPU.
        folder: a new or empty folder; an earlier export is replaced.

    Raises:
        UserError: the folder has other content, or the disk is full or not writable.
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
    """Config fields, in SpecForge's own form, and tensors of a draft on disk.

    Raises:
        UserError: a file is missing or damaged, or is a pickle.
    """
    where = str(folder / "config.json")
    config = canonical(read_json(folder / "config.json"), where)
    files = weight_files(folder)
    if files is None:
        pickles = sorted(p.name for end in ("bin", "pt", "pth") for p in folder.glob(f"*.{end}"))
        if pickles:
            raise UserError(
                f"{folder / pickles[0]}: is a pickle, which SpecForge never loads; if you trust it, convert it once: "
                f'safetensors.torch.save_file(torch.load("{pickles[0]}", weights_only=True), "model.safetensors")'
            )
        raise UserError(f"{folder / 'model.safetensors'}: no such file; a draft is config.json beside its tensors")
    tensors: dict[str, Tensor] = {}
    for path in sorted(set(files.values())):
        try:
            tensors |= {name: x for name, x in load_file(path).items() if files.get(name) == path}
        except (SafetensorError, OSError, *LIBRARY_ERRORS) as error:
            raise UserError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
    lacking = sorted(files.keys() - tensors.keys())
    if lacking:
        raise UserError(f"{files[lacking[0]]}: has no tensor {lacking[0]}, which the index of the folder says it has")
    if config.get("architectures") == ["LlamaForCausalLM"] and _OF_EAGLE & _plain(tensors):
        config = canonical(_named_by_tensors(config, tensors, where), where)
    return config, tensors


def _plain(names: Iterable[str]) -> set[str]:
    """Names of tensors without the prefix that some projects give them."""
    return {name.removeprefix("model.") for name in names}


# Tensors that drafts of the EAGLE code have, and language models have not.
_OF_EAGLE = {"fc.weight", "midlayer.hidden_norm.weight"}


def _named_by_tensors(config: dict[str, Any], tensors: Iterable[str], where: str) -> dict[str, Any]:
    """The config of a draft of the EAGLE code, which gives all of them the name of a causal LM.

    Raises:
        UserError: it is not an EAGLE-3 draft.
    """
    if not any(name.startswith("midlayer.") for name in _plain(tensors)):
        raise UserError(
            f"{where}: architectures is LlamaForCausalLM and there is a tensor fc.weight, as in drafts of EAGLE-1 and "
            "EAGLE-2, which SpecForge does not have"
        )
    return {**config, "architectures": ["LlamaForCausalLMEagle3"]}
