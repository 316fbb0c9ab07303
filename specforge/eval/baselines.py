"""What every table shows beside the trained draft: drafters that need no training.

A new one is a line in :func:`baselines`. Their drafts depend on the text alone, so one replay serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specforge.decoding.drafters import Drafter, NGramDrafter, NoDrafter
from specforge.decoding.suffix import SuffixAutomaton, SuffixDrafter
from specforge.errors import UserError


def baselines(
    corpus: Sequence[Sequence[int]] = (), names: Sequence[str] | None = None
) -> dict[str, Callable[[], Drafter]]:
    """Makers of the drafters, by the name of their row.

    Args:
        corpus: earlier answers that suffix decoding may draft from.
        names: rows that are wanted; all by default. ``none`` is always there, for the speed-ups.

    Raises:
        UserError: there is no such row.
    """
    earlier = SuffixAutomaton(corpus) if corpus else None
    known: dict[str, Callable[[], Drafter]] = {
        "none": NoDrafter,
        "ngram": NGramDrafter,
        "suffix": lambda: SuffixDrafter(earlier),
    }
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise UserError(f"baseline {unknown[0]}: use {', '.join(known)}")
    return {name: make for name, make in known.items() if names is None or name in ("none", *names)}
