"""What the plans of all families share: index tensors made on the host from document lengths and supervised spans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """A copy of the plan in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: _moved(value, move) for name, value in vars(self).items()})


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Plan):
        return value._map(move)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_moved(part, move) for part in value)
    return value


def borders(lengths: Sequence[int], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of N ``tokens``, the first token of its document and the token after its last.

    Every padding token is a document of its own, so its position is 0, which any table of positions has.
    """
    sizes = np.asarray([*lengths, *[1] * (tokens - sum(lengths))], dtype=np.int64)
    ends = np.cumsum(sizes)
    return np.repeat(ends - sizes, sizes), np.repeat(ends, sizes)
