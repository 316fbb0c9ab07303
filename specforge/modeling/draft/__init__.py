"""Draft networks. Importing the package registers every file in it."""

from importlib import import_module
from pkgutil import iter_modules

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

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Draft", "as_trained", "build_draft", "canonical", "config_fields", "draft_class", "read_draft",
    "register_draft", "save_draft",
]  # fmt: skip
