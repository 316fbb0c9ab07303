"""FlexAttention as a drop-in for the draft layers' attention on accelerators: one fused kernel, no loop over documents.

Every attention of a draft layer is of one form: a row sees a run of its document's tokens, and among the rows' own
keys those of its group that are not ordered after it (:class:`Sight`). PyTorch compiles that rule into the kernel and
skips the tiles in which nothing is seen.

Shape legend: N tokens of the packed batch, R query rows, S steps with own keys, h query heads, k key/value heads,
d / v size of a query and key head / of a value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from specforge.errors import UserError


class Sight(NamedTuple):
    """What each row sees; all ``[R]`` int64.

    Attributes:
        low: first token seen.
        high: one past the last token seen; none is where it is not above ``low``.
        group: rows of the same group see each other's own keys,
        order: but not those of a higher order than theirs.
    """

    low: Tensor
    high: Tensor
    group: Tensor
    order: Tensor

    def sees(self, row: Tensor, key: Tensor, tokens: Tensor) -> Tensor:
        """Whether rows see keys: ``tokens`` of the batch, and behind them the rows' own, S times."""
        own = (key - tokens) % len(self.group)
        before = (self.low[row] <= key) & (key < self.high[row])
        beside = (self.group[own] == self.group[row]) & (self.order[own] <= self.order[row])
        return torch.where(key < tokens, before, beside)

    def block_mask(self, tokens: int, steps: int) -> BlockMask:
        """Which tiles of the scores hold something that is seen, for N tokens and S steps."""
        size = torch.full((), tokens, device=self.low.device)

        def mask(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return self.sees(row, key, size)

        rows, device = len(self.low), self.low.device
        made: BlockMask = _compiled(create_block_mask, device.type)(
            mask, None, None, rows, tokens + steps * rows, device
        )
        return made


def attend(query: Tensor, key: Tensor, value: Tensor, own: Sequence[tuple[Tensor, Tensor]], sight: Sight) -> Tensor:
    """Attention of the rows to the batch's tokens and to their own keys, under one softmax.

    Args:
        query: ``[R, h, d]``, positions already applied.
        key: ``[N, k, d]``; ``k`` divides ``h`` (grouped-query attention).
        value: ``[N, k, v]``.
        own: S keys ``[R, k, d]`` and values ``[R, k, v]``.
        sight: what each row sees.

    Returns:
        ``[R, h, v]``.

    Raises:
        UserError: a gradient is wanted on a CPU, for which PyTorch has no such kernel.
    """
    if query.device.type == "cpu" and query.requires_grad:
        raise UserError(
            "attn_implementation flex_attention trains on accelerators only: leave it out of model.draft_config"
        )
    mask = sight.block_mask(len(key), len(own))
    key, value = torch.cat([key, *(k for k, _ in own)]), torch.cat([value, *(v for _, v in own)])
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out: Tensor = _compiled(flex_attention, query.device.type)(q, k, v, block_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


@cache
def _compiled(function: Any, device: str) -> Any:
    # Not compiled, it builds all scores: right, and slow, which is enough to check it by on a CPU.
    return function if device == "cpu" else torch.compile(function, dynamic=True)
