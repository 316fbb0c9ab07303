"""Drafters without training, shown in every evaluation table next to the trained draft.

To add one, add a line to :func:`baselines`. Their drafts depend on the text alone, so one replay serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specforge.decoding.drafters import Drafter, NGramDrafter, NoDrafter
from specforge.decoding.suffix import SuffixAutomaton, SuffixDrafter
from specforge.errors import UserError


def baselines(
    corpus: Sequence[Sequence[int]] = (), names: Sequence[str] | None = None
) -> dict[str, Callable[[], Drafter]]:
    """Factories of the baseline drafters, by the name of their row.

    Args:
        corpus: earlier answers that suffix decoding may draft from.
        names: baselines to run (default: all); ``none`` is always included, as the reference for speed-ups.

    Raises:
        UserError: a name is unknown.
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
