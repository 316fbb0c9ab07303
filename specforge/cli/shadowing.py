"""Other projects' packages that have the names of SpecForge's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from specforge.errors import UserError

_ROOT = Path(__file__).parents[2]


def check() -> None:
    """Check that Python finds SpecForge's own packages, without importing them.

    Raises:
        UserError: a folder of another project comes first on the path.
    """
    for name in ("specforge", "lightning_modules", "datamodules"):
        spec = find_spec(name)
        found = [] if spec is None else list(spec.submodule_search_locations or [])
        if not found:
            raise UserError(f"package {name} is not installed next to {_ROOT / 'specforge'}; reinstall SpecForge")
        if Path(found[0]).resolve() != (_ROOT / name).resolve():
            raise UserError(
                f"{found[0]}: this package of another project hides {_ROOT / name}; rename it, or leave its folder out "
                "of PYTHONPATH"
            )
