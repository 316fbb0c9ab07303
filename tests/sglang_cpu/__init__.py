"""What SGLang needs to run on a CPU in tests."""

from __future__ import annotations

import os


def environment() -> dict[str, str]:
    """Variables for SGLang's processes: one thread, nothing compiled, none of this environment's modules."""
    mine = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "1"}
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **mine}
