"""FlexAttention in place of the merged products, on accelerators: one fused kernel, no loop over documents.

In every attention of a draft, a row sees a run of its document's tokens and, among the rows' own keys, those of its
group that are not ordered after it (:class:`Visibility`). PyTorch compiles that rule into the kernel and skips tiles in
which no key is visible.

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


class Visibility(NamedTuple):
    """The keys that each row sees; all ``[R]`` int64."""

    low: Tensor  # first visible token
    high: Tensor  # one past the last visible token; no token is visible if it is not above low
    group: Tensor  # rows of the same group see each other's own keys,
    order: Tensor  # except those of a higher order than theirs

    def allows(self, row: Tensor, key: Tensor, tokens: Tensor) -> Tensor:
        """Whether rows see keys: the batch's ``tokens`` keys, followed by the rows' own, S times."""
        own = (key - tokens) % len(self.group)
        before = (self.low[row] <= key) & (key < self.high[row])
        beside = (self.group[own] == self.group[row]) & (self.order[own] <= self.order[row])
        return torch.where(key < tokens, before, beside)

    def block_mask(self, tokens: int, steps: int) -> BlockMask:
        """The tiles of the scores in which some key is visible, for N tokens and S steps."""
        size = torch.full((), tokens, device=self.low.device)

        def mask(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return self.allows(row, key, size)

        rows, device = len(self.low), self.low.device
        made: BlockMask = _compiled(create_block_mask, device.type)(
            mask, None, None, rows, tokens + steps * rows, device
        )
        return made


def visible_attention(
    query: Tensor, key: Tensor, value: Tensor, own: Sequence[tuple[Tensor, Tensor]], visibility: Visibility
) -> Tensor:
    """Attention of the rows to the batch's tokens and to their own keys, under one softmax.

    Args:
        query: ``[R, h, d]``, positions already applied.
        key: ``[N, k, d]``; ``k`` divides ``h`` (grouped-query attention).
        value: ``[N, k, v]``.
        own: S keys ``[R, k, d]`` and values ``[R, k, v]``.
        visibility: the keys that each row sees.

    Returns:
        ``[R, h, v]``.

    Raises:
        UserError: a gradient is needed on a CPU, for which PyTorch has no such kernel.
    """
    if query.device.type == "cpu" and query.requires_grad:
        raise UserError(
            "attn_implementation flex_attention trains on accelerators only: leave it out of model.draft_config"
        )
    mask = visibility.block_mask(len(key), len(own))
    key, value = torch.cat([key, *(k for k, _ in own)]), torch.cat([value, *(v for _, v in own)])
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out: Tensor = _compiled(flex_attention, query.device.type)(q, k, v, block_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


@cache
def _compiled(function: Any, device: str) -> Any:
    # Without compilation it builds all scores, which is slow but enough for tests on a CPU.
    return function if device == "cpu" else torch.compile(function, dynamic=True)
