"""The interface of target engines: run the frozen target over token ids and return selected hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy
from specforge.errors import UserError


class TargetEngine(Protocol):
    """Computes features of the target."""

    dtype: str  # name of the compute dtype

    def check(self, policy: CapturePolicy) -> None:
        """Test the policy on two tokens.

        Raises:
            UserError: a layer does not exist, or a feature has the wrong width or dtype.
        """

    def capture(self, input_ids: Sequence[Sequence[int]], policy: CapturePolicy) -> list[dict[str, Tensor]]:
        """Features of each sequence, on the CPU, without padding.

        Args:
            input_ids: token ids, preferably of similar lengths.
            policy: the features to return.

        Returns:
            Per sequence ``aux_hidden_states [L, k H]`` and, if asked for, ``last_hidden_states [L, H]``.
        """


def feature_widths(policy: CapturePolicy, hidden_size: int) -> dict[str, int]:
    """Name and width of each feature in a policy."""
    widths = {AUX_HIDDEN_STATES: len(policy.layer_ids) * hidden_size} if policy.layer_ids else {}
    return widths | ({LAST_HIDDEN_STATES: hidden_size} if policy.last_hidden_states else {})


def check_layers(policy: CapturePolicy, num_layers: int, target: str) -> None:
    """Check that the target has the captured layers.

    Raises:
        UserError: a layer does not exist, or is listed twice.
    """
    for layer in policy.layer_ids:
        if not 0 <= layer < num_layers:
            raise UserError(f"layer {layer}: {target} has {num_layers} layers, 0 to {num_layers - 1}")
    if len(set(policy.layer_ids)) != len(policy.layer_ids):
        raise UserError(f"layers {list(policy.layer_ids)}: a layer is listed twice")
