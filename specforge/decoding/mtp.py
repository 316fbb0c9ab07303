"""Drafting with a network that reads the target's last hidden state instead of captured layers."""

from __future__ import annotations

from collections.abc import Sequence

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES
from specforge.decoding.drafters import ChainDrafter, Features


class LastStateChainDrafter(ChainDrafter):
    """A chain drafter whose network fuses nothing but the last hidden state."""

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Keep tokens and last hidden states for the next proposal."""
        super().observe(tokens, {AUX_HIDDEN_STATES: features[LAST_HIDDEN_STATES]})
