"""Algorithms by name, and modules of trained drafts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_modules.base import DraftModule
from specforge.checkpoints import read_checkpoint
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft import read_draft
from specforge.modeling.draft.starting import saved_config


def algorithms() -> dict[str, type[DraftModule]]:
    """The built-in algorithms: their modules by name."""
    found: dict[str, type[DraftModule]] = {}
    pending: list[type[DraftModule]] = [DraftModule]  # type: ignore[type-abstract]
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            if "algorithm" in vars(cls) and cls.__module__.startswith("lightning_modules."):
                found[cls.algorithm] = cls
    return found


def find_algorithm(name: str) -> Any:
    """The module class of an algorithm.

    Args:
        name: name of a built-in algorithm, or a class path. A class path runs the code of its Python module, so it must
            come from the user, never from a file.

    Raises:
        UserError: there is no such algorithm.
    """
    if "." not in name:
        known = algorithms()
        if name not in known:
            raise UserError(f"algorithm {name}: use one of {', '.join(sorted(known))}, or a class path")
        return known[name]
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"algorithm {name}: is not a class path such as my_module.MyModule")
    module, _, cls = name.rpartition(".")
    try:
        found = getattr(import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"algorithm {name}: cannot be imported ({error}); it must be installed or on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, DraftModule) and hasattr(found, "algorithm")):
        raise UserError(f"algorithm {name}: is not a DraftModule with a name (`algorithm`)")
    return found


class Captured(NamedTuple):
    """What a recipe captures: target, algorithm (name or class path), layers, and the folder of its features."""

    target: str
    algorithm: str
    layer_ids: list[int] | None
    features: Path | None


def captured_by(recipe: Mapping[str, Any], target: str | None = None, algorithm: str | None = None) -> Captured:
    """The features that a training recipe reads.

    Args:
        recipe: its content.
        target: folder or hub name of the target, instead of the recipe's.
        algorithm: name or class path of the algorithm, instead of the recipe's.

    Raises:
        UserError: no target is named, or the recipe's model is rejected.
    """
    model, data = recipe["model"], recipe.get("data") or {}
    options = {**(model.get("init_args") or {})} | ({} if target is None else {"target": target})
    name = str(model.get("class_path"))
    named = {cls.__name__: key for key, cls in algorithms().items()}
    algorithm = algorithm or named.get(name.rpartition(".")[2], name)
    features = (data.get("init_args") or {}).get("features")
    cls, layers = find_algorithm(algorithm), None
    if not options.get("target"):
        raise UserError("the recipe has no model.target; set --target")
    if cls.default_layers(TargetFiles.find(options["target"]).num_layers):
        options.pop("optimizer", None)
        # The shapes alone decide; weights are read only for a draft that the run starts from.
        start = options.get("init_from")
        with nullcontext() if start not in (None, "target", "target_mtp") else torch.device("meta"):
            layers = list(cls(**options).spec.capture.layer_ids)
    return Captured(options["target"], algorithm, layers or None, None if features is None else Path(features))


def load_module(draft: Path, target: str | None, algorithm: str | None = None) -> Any:
    """The module of a trained draft.

    Args:
        draft: SpecForge checkpoint or a draft's folder; code that it names is not run.
        target: folder or hub name of the target; by default the one that the checkpoint was trained on.
        algorithm: name or class path of the draft's algorithm; by default the built-in one.

    Raises:
        UserError: the draft cannot be read, or its target or algorithm is unknown or not the one it was trained with.
    """
    cls: Any
    requested = None if algorithm is None else find_algorithm(algorithm)  # its import registers its networks
    if draft.is_dir():
        config, _ = read_draft(draft)
        if target is None:
            raise UserError(f"{draft}: a draft's folder does not say where its target is; give it with --target")
        cls = requested or _algorithm_of_folder(config, draft)
        matches = _has_architecture(cls, config)
    else:
        saved = read_checkpoint(draft)["specforge"]
        config = saved_config(saved, str(draft))
        target = _trained_on(saved, draft, target)
        cls = requested or _algorithm_of_checkpoint(saved, draft)
        matches = cls.algorithm == saved["algorithm"]
    if not matches:
        raise UserError(f"{draft}: is not a draft of {cls.algorithm}, the algorithm given by --algorithm")
    try:
        return cls(target=target, draft_config=dict(config), init_from=str(draft))
    except UserError as error:
        if str(draft) in str(error):  # it is about the draft's own files
            raise
        raise UserError(f"{draft}: is not a draft of the target {target} ({error})") from error


def _trained_on(saved: Mapping[str, Any], draft: Path, target: str | None) -> str:
    """The target to use: the one of a checkpoint, or the given one, which must be the same."""
    name, fingerprint = saved["target"], saved["target_fingerprint"]
    try:
        found = TargetFiles.find(target or name).fingerprint
    except UserError as error:
        if target:
            raise
        raise UserError(f"{draft}: was trained on {name}, which is not found; name its folder with --target") from error
    if found != fingerprint:
        raise UserError(f"{draft}: was trained on {name} ({fingerprint[:8]}), not on {target or name} ({found[:8]})")
    return str(target or name)


def _has_architecture(cls: type[DraftModule], config: Mapping[str, Any]) -> bool:
    return bool(set(cls.architectures) & set(config.get("architectures") or []))


def _algorithm_of_folder(config: Mapping[str, Any], draft: Path) -> type[DraftModule]:
    for cls in algorithms().values():
        if _has_architecture(cls, config):
            return cls
    raise UserError(
        f"{draft}: no built-in algorithm has the architecture {str(config.get('architectures'))[:200]}; name your own "
        "with --algorithm my_module.MyModule"
    )


def _algorithm_of_checkpoint(saved: Mapping[str, Any], draft: Path) -> type[DraftModule]:
    """The built-in algorithm of a checkpoint. Any other class is reported but not imported: its code may be harmful."""
    path, name = str(saved.get("class_path", "lightning_modules")), saved["algorithm"]
    if path.split(".")[0] == "lightning_modules" and name in algorithms():
        return algorithms()[name]
    raise UserError(
        f"{draft}: is a draft of the algorithm {name[:80]!r} in {path[:200]!r}, which is not built in; if you trust "
        "that code, name it: --algorithm my_module.MyModule"
    )
