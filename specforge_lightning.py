"""Entry point of the `specforge` executable, under a name that no other project uses."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    """Run SpecForge's command line, unless another project's package `specforge` comes first on the path."""
    ours, spec = Path(__file__).with_name("specforge"), find_spec("specforge")
    found = [] if spec is None else list(spec.submodule_search_locations or [])
    if found and Path(found[0]).resolve() != ours.resolve():
        text = f"this package of another project hides {ours}; rename it, or leave its folder out of PYTHONPATH"
        print(f"specforge: {found[0]}: {text}", file=sys.stderr)
        return 2
    from specforge.cli.main import main

    return main()
