"""What the plans of all families share: index tensors made on the host from document lengths and supervised spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

# Numbers of rows are rounded up to a multiple of this. Matrix libraries prepare a kernel for every new shape, which
# takes several times longer than the product itself on a CPU in bf16; rounded sizes recur.
ROUND = 32


class Plan:
    """Base of the dataclasses that hold the index tensors of one packed batch.

    The dataclasses are not frozen, because Lightning's half precision converts a batch field by field.
    """

    def to(self, device: torch.device) -> Self:
        """The same plan with its tensors on ``device``."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
            elif isinstance(value, Plan):
                moved[name] = value.to(device)
        return type(self)(**{**vars(self), **moved})


def borders(lengths: Sequence[int], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of N ``tokens``, the first token of its document and the token after its last.

    Every padding token is a document of its own, so its position is 0, which any table of positions has.
    """
    sizes = np.asarray([*lengths, *[1] * (tokens - sum(lengths))], dtype=np.int64)
    ends = np.cumsum(sizes)
    return np.repeat(ends - sizes, sizes), np.repeat(ends, sizes)
