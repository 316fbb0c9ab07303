"""One LightningModule per algorithm. Importing the package makes every one of them known by name."""

from importlib import import_module
from pkgutil import iter_modules

from lightning_modules.base import DraftModule

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def algorithms() -> dict[str, type[DraftModule]]:
    """Every built-in algorithm's module by the algorithm's name, whatever names the user's own modules have."""
    found: dict[str, type[DraftModule]] = {}
    pending: list[type[DraftModule]] = [DraftModule]  # type: ignore[type-abstract]
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            if "algorithm" in vars(cls) and cls.__module__.startswith(f"{__name__}."):
                found[cls.algorithm] = cls
    return found


__all__ = ["DraftModule", "algorithms"]
