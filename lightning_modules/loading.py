"""Algorithms by name, and the modules of trained drafts."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_modules.base import DraftModule
from specforge.errors import UserError
from specforge.export.checkpoint import read_checkpoint
from specforge.modeling.draft import read_draft
from specforge.modeling.draft.starting import saved_config


def algorithms() -> dict[str, type[DraftModule]]:
    """Every built-in algorithm's module by the algorithm's name, whatever names the user's own modules have."""
    found: dict[str, type[DraftModule]] = {}
    pending: list[type[DraftModule]] = [DraftModule]  # type: ignore[type-abstract]
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            if "algorithm" in vars(cls) and cls.__module__.startswith("lightning_modules."):
                found[cls.algorithm] = cls
    return found


def find_algorithm(name: str) -> Any:
    """A draft module by its algorithm's name, or by class path, which runs the code of the module that it names.

    Args:
        name: from the user, never from a file.

    Raises:
        UserError: there is none.
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


def load_module(draft: Path, target: str | None, algorithm: str | None = None) -> Any:
    """The module of a trained draft, from a checkpoint or a draft's folder.

    Args:
        draft: checkpoint or folder; no code that it names is run.
        target: what it drafts for; by default what a checkpoint was trained on.
        algorithm: name or class path of its algorithm; by default the built-in one that the draft is of.

    Raises:
        UserError: it is neither, or the target or the algorithm is not known or not the one it was trained with.
    """
    named = None if algorithm is None else find_algorithm(algorithm)  # which makes its networks known, too
    if draft.is_dir():
        config, _ = read_draft(draft)
        if target is None:
            raise UserError(f"{draft}: say which --target it drafts for")
        cls, fingerprint = named or _of_folder(config, draft), None
        is_its = bool(set(cls.architectures) & set(config.get("architectures") or []))
    else:
        saved = read_checkpoint(draft)["specforge"]
        config, fingerprint = saved_config(saved, str(draft)), saved["target_fingerprint"]
        target = target or saved["target"]
        cls = named or _of_checkpoint(saved, draft)
        is_its = cls.algorithm == saved["algorithm"]
    if not is_its:
        raise UserError(f"{draft}: is not a draft of {cls.algorithm}, which --algorithm names")
    module = cls(target=target, draft_config=dict(config), init_from=str(draft))
    if fingerprint is not None and module.target.fingerprint != fingerprint:
        raise UserError(f"{draft}: was trained on another target than {target} ({module.target.fingerprint[:8]})")
    return module


def _of_folder(config: dict[str, Any], draft: Path) -> Any:
    """The built-in algorithm of a draft in the field's own form."""
    for cls in algorithms().values():
        if set(cls.architectures) & set(config.get("architectures") or []):
            return cls
    raise UserError(
        f"{draft}: no algorithm of SpecForge's has the architecture {str(config.get('architectures'))[:200]}; "
        "name your own with --algorithm my_module.MyModule"
    )


def _of_checkpoint(saved: dict[str, Any], draft: Path) -> Any:
    """The built-in algorithm of a checkpoint. A class of others is named, not imported: it may be anything."""
    path, name = str(saved.get("class_path", "lightning_modules")), saved["algorithm"]
    if path.split(".")[0] == "lightning_modules" and name in algorithms():
        return algorithms()[name]
    raise UserError(
        f"{draft}: is a draft of the algorithm {name[:80]!r} in {path[:200]!r}, which is not SpecForge's; if you trust "
        "that code, name it: --algorithm my_module.MyModule"
    )
