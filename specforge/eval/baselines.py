"""What every table shows beside the trained draft: drafters that need no training.

A new one is a line in :func:`baselines`. Their drafts depend on the text alone, so one replay serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specforge.decoding.drafters import Drafter, NGramDrafter, NoDrafter
from specforge.decoding.suffix import SuffixAutomaton, SuffixDrafter


def baselines(corpus: Sequence[Sequence[int]] = ()) -> dict[str, Callable[[], Drafter]]:
    """Makers of the drafters, by the name of their row.

    Args:
        corpus: earlier answers that suffix decoding may draft from.
    """
    earlier = SuffixAutomaton(corpus) if corpus else None
    return {"none": NoDrafter, "ngram": NGramDrafter, "suffix": lambda: SuffixDrafter(earlier)}
