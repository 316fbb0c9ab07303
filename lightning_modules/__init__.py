"""One LightningModule per algorithm. Importing the package makes every one of them known by name."""

from importlib import import_module
from pkgutil import iter_modules

from lightning_modules.base import DraftModule
from lightning_modules.loading import algorithms

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


__all__ = ["DraftModule", "algorithms"]
