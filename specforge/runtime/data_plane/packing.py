"""The plan of batches, made from lengths alone, so that it is the same on every rank and after every resume.

The number of batches per epoch is constant. With a token budget, bins are packed once from rounded lengths; each epoch
assigns the samples of each rounded length at random to the bins' slots of that length, and shuffles the bins. So every
epoch mixes documents differently, no batch exceeds the budget, and the length of an epoch, on which progress bars and
schedules rely, does not change.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

import numpy as np

# Lengths are rounded up to multiples of budget / 256, which wastes at most 0.4 % of the budget per document.
_GRAINS = 256


class BatchPlan:
    """Sample indices of every batch of every epoch.

    Args:
        lengths: tokens of each sample.
        batch_size: samples per batch; or
        max_tokens: maximum number of tokens per batch. Give exactly one of the two.
        shuffle: draw a new order each epoch; otherwise samples stay in order.
        seed: random seed for the orders.

    Raises:
        ValueError: both or neither limit is given, a limit is below 1, or a sample is longer than ``max_tokens``.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if (batch_size is None) == (max_tokens is None):
            raise ValueError("give either batch_size or max_tokens")
        if (batch_size or max_tokens or 0) < 1:
            raise ValueError("batch_size and max_tokens must be at least 1")
        if max_tokens is not None and max(lengths, default=0) > max_tokens:
            raise ValueError(
                f"a sample has {max(lengths)} tokens, more than max_tokens {max_tokens}; raise it, or prepare the data "
                "with a smaller --max_length"
            )
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        grain = 1 if max_tokens is None else max(1, max_tokens // _GRAINS)
        self._sizes = -(-self.lengths // grain)
        self._capacity = 0 if max_tokens is None else max(max_tokens // grain, int(self._sizes.max(initial=0)))
        self._bins = [] if max_tokens is None else self._pack()

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._bins) if self.batch_size is None else -(-len(self.lengths) // self.batch_size)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Sample indices of each batch of one epoch; every sample occurs once."""
        count = len(self.lengths)
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        if self.batch_size is not None:
            return [order[i : i + self.batch_size] for i in range(0, count, self.batch_size)]
        queues: dict[int, list[int]] = {}
        for index in order[::-1].tolist():
            queues.setdefault(int(self._sizes[index]), []).append(index)
        batches = [np.array([queues[size].pop() for size in sizes]) for sizes in self._bins]
        if self.shuffle:
            return [rng.permutation(batches[i]) for i in rng.permutation(len(batches))]
        return [np.sort(batch) for batch in batches]

    def _pack(self) -> list[list[int]]:
        """Greedy bins: add the largest remaining document that still fits."""
        left = Counter(self._sizes.tolist())
        sizes = sorted(left)
        bins: list[list[int]] = []
        while sizes:
            free, chosen = self._capacity, []
            while (at := bisect_right(sizes, free) - 1) >= 0:
                size = sizes[at]
                take = min(left[size], free // size)
                chosen += [size] * take
                free -= take * size
                left[size] -= take
                if not left[size]:
                    sizes.pop(at)
            bins.append(chosen)
        return bins
