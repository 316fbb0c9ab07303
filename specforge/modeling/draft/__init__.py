"""Draft networks, a folder for each family. Importing the package registers every network in it."""

from importlib import import_module
from pkgutil import walk_packages

from specforge.modeling.draft.registry import (
    Draft,
    as_trained,
    build_draft,
    canonical,
    config_fields,
    draft_class,
    read_draft,
    register_draft,
    save_draft,
)

for _module in walk_packages(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = [
    "Draft",
    "as_trained",
    "build_draft",
    "canonical",
    "config_fields",
    "draft_class",
    "read_draft",
    "register_draft",
    "save_draft",
]
