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
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from specforge.errors import UserError
from specforge.fusion import compile_options

_TILE = 128


class Visibility(NamedTuple):
    """The keys that each row sees; all ``[R]`` int64. The rows of a group follow one another."""

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
        """The tiles of the scores in which some key may be visible, for N tokens and S steps.

        They follow from the first and last key of a tile's rows; trying every pair of row and key, as PyTorch's
        ``create_block_mask`` does, takes longer than the attention.
        """
        rows, device = len(self.low), self.low.device
        size = torch.full((), tokens, device=device)
        some, every = self._tiles(tokens, steps)

        def mask(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return self.allows(row, key, size)

        return BlockMask.from_kv_blocks(
            *_ordered(some & ~every), *_ordered(every), _TILE, mask, (rows, tokens + steps * rows)
        )

    def _tiles(self, tokens: int, steps: int) -> tuple[Tensor, Tensor]:
        """Whether some, and whether all keys of a tile are visible to its rows; ``[row tiles, key tiles]`` bool."""
        rows, device = len(self.low), self.low.device
        each = torch.arange(rows, device=device)
        changes = self.group[1:] != self.group[:-1]
        first = torch.cat([each[:1], each[1:] * changes]).cummax(0).values  # row of the group
        last = torch.cat([each[:-1] + (rows - each[:-1]) * ~changes, each[-1:]]).flip(0).cummin(0).values.flip(0)
        nothing = self.high <= self.low
        low, high = self.low.masked_fill(nothing, tokens), self.high.masked_fill(nothing, 0)
        begin = torch.arange(0, tokens + steps * rows, _TILE, device=device)
        stop = begin + _TILE
        least, most = _least(low).unsqueeze(1), -_least(-high).unsqueeze(1)
        some = (least < stop) & (most > begin) & (begin < tokens)
        every = (-_least(-low).unsqueeze(1) <= begin) & (_least(high).unsqueeze(1) >= stop) & (stop <= tokens)
        least, most = _least(first).unsqueeze(1), -_least(-last).unsqueeze(1) + 1
        for offset in range(tokens, tokens + steps * rows, rows):
            some |= (least + offset < stop) & (most + offset > begin)
        return some, every


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


def _least(x: Tensor) -> Tensor:
    """The least value of ``x [R]`` in each tile of rows."""
    padded = torch.cat([x, x[-1:].expand(-len(x) % _TILE)])
    return padded.view(-1, _TILE).amin(1)


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Number of key tiles for each row tile, and their indices first in each row, as ``BlockMask`` takes them."""
    order = tiles.int().argsort(dim=1, descending=True, stable=True)
    return tiles.sum(1, dtype=torch.int32)[None, None], order.int().contiguous()[None, None]


@cache
def _compiled(function: Any, device: str) -> Any:
    # Without compilation it builds all scores, which is slow but enough for tests on a CPU.
    return function if device == "cpu" else torch.compile(function, dynamic=True, options=compile_options())
