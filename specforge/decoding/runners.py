"""Runs the target in transformers on sequences that grow by several tokens, some of which are then rolled back.

- :class:`LockstepRunner`: several sequences with a key/value cache. Rejected tokens stay in the cache and are masked;
  the mask goes by the positions of tokens, not by their slots in the cache.
- :class:`CachedRunner`: one sequence with a key/value cache; rejected tokens are cropped. No mask; this one is timed.
- :class:`WholeTextRunner`: one sequence without a cache; every pass reads the whole text. For targets with states that
  cannot be rolled back (recurrent layers, convolutions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from specforge.contracts import CapturePolicy
from specforge.decoding.drafters import Features
from specforge.inference.target_engine.hf import FeatureTap, can_roll_back, takes_positions
from specforge.inference.target_layers import backbone

Outputs = list[tuple[Tensor, Features]]


class Runner(Protocol):
    """Runs a causal LM over growing sequences."""

    def forward(self, tokens: Sequence[Sequence[int]], last_only: bool = False) -> Outputs:
        """Append tokens to every row.

        Args:
            tokens: token ids of each row, at least one.
            last_only: compute the logits of each row's last token only.

        Returns:
            Per row, logits ``[n or 1, V]`` on the CPU and features ``[n, width]`` on the model's device.
        """

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first ``counts[i]`` of the tokens that the last call appended to row i; roll back the others."""

    def select(self, rows: Sequence[int]) -> None:
        """Continue with these rows only."""

    def close(self) -> None:
        """Remove the hooks from the model."""


def make_runner(model: Any, capture: CapturePolicy | None, rows: int) -> Runner:
    """A runner for ``rows`` sequences that returns logits and, unless ``capture`` is None, features."""
    if rows > 1:
        return LockstepRunner(model, capture, rows)
    return CachedRunner(model, capture) if can_roll_back(model) else WholeTextRunner(model, capture)


def runs_in_lockstep(model: Any) -> bool:
    """Whether several sequences can be run together without affecting each other.

    The cache must support rollback, positions must be an input and independent of the lengths of other sequences, and
    the masks must be made by transformers, where :func:`masks_by_position` can replace them.
    """
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(x.get("rope_type") for x in rope.values() if isinstance(x, dict))}
    return (
        can_roll_back(model)
        and not kinds & {"dynamic", "longrope"}
        and takes_positions(model)
        and model.config._attn_implementation in ("eager", "sdpa")
        and _masks_are_made(model)
    )


def _masks_are_made(model: Any) -> bool:
    """Whether the model has transformers make its masks instead of making its own."""
    used = False

    def recorded(inner: Callable[..., Any]) -> Callable[..., Any]:
        def mask(**options: Any) -> Any:
            nonlocal used
            used = True
            return inner(**options)

        return mask

    with _masks(recorded), torch.inference_mode():
        backbone(model)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return used


class _Runner:
    def __init__(self, model: Any, capture: CapturePolicy | None) -> None:
        self.model = model
        self._tap = None if capture is None else FeatureTap(model, capture)

    def _run(self, ids: Tensor, last_only: bool, **options: Any) -> tuple[Tensor, Features]:
        """Logits on the CPU and features of a batch ``[B, n]``."""
        output = self.model(input_ids=ids.to(self.model.device), logits_to_keep=1 if last_only else 0, **options)
        return output.logits.cpu(), {} if self._tap is None else self._tap.features()

    def select(self, rows: Sequence[int]) -> None:
        """There is only one row."""

    def close(self) -> None:
        """Remove the hooks from the model."""
        if self._tap is not None:
            self._tap.close()


class CachedRunner(_Runner):
    """One sequence with a key/value cache."""

    def __init__(self, model: Any, capture: CapturePolicy | None = None) -> None:
        from transformers import DynamicCache

        super().__init__(model, capture)
        self._cache, self._appended = DynamicCache(), 0

    def forward(self, tokens: Sequence[Sequence[int]], last_only: bool = False) -> Outputs:
        """Append tokens to every row."""
        self._appended = len(tokens[0])
        logits, features = self._run(
            torch.tensor([list(tokens[0])]), last_only, past_key_values=self._cache, use_cache=True
        )
        return [(logits[0], {name: x[0] for name, x in features.items()})]

    def keep(self, counts: Sequence[int]) -> None:
        """Roll back the tokens that are not kept."""
        if counts[0] < self._appended:
            self._cache.crop(counts[0] - self._appended)


class WholeTextRunner(_Runner):
    """One sequence without a cache."""

    def __init__(self, model: Any, capture: CapturePolicy | None = None) -> None:
        super().__init__(model, capture)
        self._text: list[int] = []
        self._before = 0

    def forward(self, tokens: Sequence[Sequence[int]], last_only: bool = False) -> Outputs:
        """Append tokens to every row."""
        self._before = len(self._text)
        self._text += tokens[0]
        logits, features = self._run(torch.tensor([self._text]), last_only, use_cache=False)
        new = logits[0] if last_only else logits[0, self._before :]
        return [(new, {name: x[0, self._before :] for name, x in features.items()})]

    def keep(self, counts: Sequence[int]) -> None:
        """Roll back the tokens that are not kept."""
        del self._text[self._before + counts[0] :]


class LockstepRunner(_Runner):
    """Several sequences with a key/value cache.

    Args:
        model: a target for which :func:`runs_in_lockstep` holds.
        capture: features to return with the logits; None for none.
        rows: number of sequences.
    """

    def __init__(self, model: Any, capture: CapturePolicy | None, rows: int) -> None:
        from transformers import DynamicCache

        super().__init__(model, capture)
        self._cache = DynamicCache()
        # For every slot of the cache: whether its token is kept, and the position of the token in its sequence.
        self._kept = torch.zeros(rows, 0, dtype=torch.bool)
        self._positions = torch.zeros(rows, 0, dtype=torch.int64)
        self._appended = [0] * rows

    def forward(self, tokens: Sequence[Sequence[int]], last_only: bool = False) -> Outputs:
        """Append tokens to every row."""
        self._appended = [len(row) for row in tokens]
        width = max(self._appended)
        # Padding is on the left, so that the last column holds the last token of every row.
        pads = [width - n for n in self._appended]
        ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(pads, tokens, strict=True)])
        new = torch.arange(width) >= torch.tensor(pads).unsqueeze(1)
        positions = (self._kept.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)
        self._kept = torch.cat([self._kept, new], dim=1)
        self._positions = torch.cat([self._positions, positions], dim=1)
        device = self.model.device
        kept = self._kept.to(device)
        with masks_by_position(self._positions.to(device), kept):
            logits, features = self._run(
                ids,
                last_only,
                past_key_values=self._cache,
                use_cache=True,
                attention_mask=kept.long(),
                position_ids=positions.to(device),
            )
        return [
            (logits[i] if last_only else logits[i, pad:], {name: x[i, pad:] for name, x in features.items()})
            for i, pad in enumerate(pads)
        ]

    def keep(self, counts: Sequence[int]) -> None:
        """Roll back the tokens that are not kept."""
        for i, (count, n) in enumerate(zip(counts, self._appended, strict=True)):
            if count < n:
                self._kept[i, self._kept.shape[1] - n + count :] = False

    def select(self, rows: Sequence[int]) -> None:
        """Continue with these rows only."""
        index = torch.tensor(rows)
        self._cache.batch_select_indices(index.to(self.model.device))
        self._kept, self._positions = self._kept[index], self._positions[index]


@contextmanager
def masks_by_position(positions: Tensor, kept: Tensor) -> Iterator[None]:
    """Let transformers make its masks from the positions of tokens instead of their slots in the cache.

    A model defines which tokens are visible (all earlier ones, a window, a chunk) as a function of two slots. With
    rolled-back tokens in between, slots are not positions, and a window would count the rolled-back tokens too.

    Args:
        positions: ``[B, K]`` position of the token in each slot of the cache, including those of this pass.
        kept: ``[B, K]`` bool, whether the token is kept.
    """
    # Chunks are counted from the first kept token, which the model finds by its slot: see `chunked_overlay`.
    shift = (kept.cumsum(1) == 0).sum(1)

    def by_position(inner: Callable[..., Any]) -> Callable[..., Any]:
        def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
            at = [positions[batch, slot] + shift[batch] for slot in (query, key)]
            # Padding attends to itself, because a softmax over nothing is NaN.
            return (inner(batch, head, *at) & kept[batch, key]) | (query == key)

        return visible

    def masked(inner: Callable[..., Any]) -> Callable[..., Any]:
        def mask(**options: Any) -> Any:
            changes = {"mask_function": by_position(options["mask_function"]), "attention_mask": None}
            return inner(**{**options, **changes, "allow_is_causal_skip": False})

        return mask

    with _masks(masked):
        yield


@contextmanager
def _masks(change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Wrap the functions by which transformers makes masks for eager and sdpa attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as makers

    before = {name: makers[name] for name in ("eager", "sdpa")}
    makers.update({name: change(make) for name, make in before.items()})
    try:
        yield
    finally:
        makers.update(before)
