"""Time to choose a draft vocabulary of 32,000 out of 151,936 tokens.

python -m benchmarks.vocabulary
"""

from __future__ import annotations

import statistics
import time

import torch

from specforge.contracts import TokenCounts
from specforge.data.vocabulary import draft_vocabulary


def main() -> None:
    """Print the median of 20 repetitions."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    counts = TokenCounts(*(torch.randint(0, 10**6, (151_936,), generator=g) for _ in range(2)))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        draft_vocabulary(counts, 32_000)
        seconds.append(time.perf_counter() - start)
    print(f"{statistics.median(seconds) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
