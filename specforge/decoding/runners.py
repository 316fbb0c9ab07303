"""The target in transformers as decoding runs it: sequences that grow by several tokens, some of which are taken back.

- :class:`LockstepRunner`: many sequences, keys and values cached. What is taken back stays in the cache and is not
  looked at; what a token sees is decided by the positions of tokens, not by their places in the cache.
- :class:`CachedRunner`: one sequence, keys and values cached; what is taken back is cut off. No mask: this is timed.
- :class:`WholeTextRunner`: one sequence, without a cache: every pass reads the whole text. For targets with states that
  cannot be taken back (recurrent layers, convolutions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from specforge.contracts import CapturePolicy
from specforge.decoding.drafters import Features
from specforge.inference.target_engine.hf import FeatureTap, can_take_back, takes_positions
from specforge.inference.target_layers import backbone

Outputs = list[tuple[Tensor, Features]]


class Runner(Protocol):
    """Runs a causal LM over growing sequences."""

    def forward(self, tokens: Sequence[Sequence[int]], last_only: bool = False) -> Outputs:
        """Append tokens to every row.

        Args:
            tokens: token ids of each row, at least one.
            last_only: compute logits of each row's last token only.

        Returns:
            For each row, logits ``[n or 1, V]`` on the CPU and its features ``[n, width]`` on the model's device.
        """

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first ``counts[i]`` of the tokens that the last call appended to row i."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only."""

    def close(self) -> None:
        """Remove the hooks from the model."""


def make_runner(model: Any, capture: CapturePolicy | None, rows: int) -> Runner:
    """A runner of ``rows`` sequences that returns the features of ``capture`` with the logits; None for none."""
    if rows > 1:
        return LockstepRunner(model, capture, rows)
    return CachedRunner(model, capture) if can_take_back(model) else WholeTextRunner(model, capture)


def runs_in_lockstep(model: Any) -> bool:
    """Whether several sequences can be run together, each as if it were alone.

    Tokens can be taken back, positions are told the model and do not depend on the other sequences' lengths, and masks
    are made where :func:`positions_decide` can make them.
    """
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(x.get("rope_type") for x in rope.values() if isinstance(x, dict))}
    return (
        can_take_back(model)
        and not kinds & {"dynamic", "longrope"}
        and takes_positions(model)
        and model.config._attn_implementation in ("eager", "sdpa")
        and _masks_are_made(model)
    )


def _masks_are_made(model: Any) -> bool:
    """Whether the model asks transformers for its masks, rather than making its own."""
    asked = False

    def noticed(inner: Callable[..., Any]) -> Callable[..., Any]:
        def mask(**options: Any) -> Any:
            nonlocal asked
            asked = True
            return inner(**options)

        return mask

    with _masks(noticed), torch.inference_mode():
        backbone(model)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return asked


class _Runner:
    def __init__(self, model: Any, capture: CapturePolicy | None) -> None:
        self.model = model
        self._tap = None if capture is None else FeatureTap(model, capture)

    def _run(self, ids: Tensor, last_only: bool, **options: Any) -> tuple[Tensor, Features]:
        """Logits on the CPU and features of a batch ``[B, n]``."""
        output = self.model(input_ids=ids.to(self.model.device), logits_to_keep=1 if last_only else 0, **options)
        return output.logits.cpu(), {} if self._tap is None else self._tap.features()

    def close(self) -> None:
        """Remove the hooks from the model."""
        if self._tap is not None:
            self._tap.close()


class CachedRunner(_Runner):
    """See :class:`Runner`."""

    def __init__(self, model: Any, capture: CapturePolicy | None = None) -> None:
        from transformers import DynamicCache

        super().__init__(model, capture)
        self._cache, self._appended = DynamicCache(), 0

    def forward(self, tokens: Sequence[Sequence[int]], last_only: bool = False) -> Outputs:
        """See :class:`Runner`."""
        self._appended = len(tokens[0])
        logits, features = self._run(
            torch.tensor([list(tokens[0])]), last_only, past_key_values=self._cache, use_cache=True
        )
        return [(logits[0], {name: x[0] for name, x in features.items()})]

    def keep(self, counts: Sequence[int]) -> None:
        """See :class:`Runner`."""
        if counts[0] < self._appended:
            self._cache.crop(counts[0] - self._appended)

    def select(self, rows: Sequence[int]) -> None:
        """There is one."""


class WholeTextRunner(_Runner):
    """See :class:`Runner`."""

    def __init__(self, model: Any, capture: CapturePolicy | None = None) -> None:
        super().__init__(model, capture)
        self._text: list[int] = []
        self._before = 0

    def forward(self, tokens: Sequence[Sequence[int]], last_only: bool = False) -> Outputs:
        """See :class:`Runner`."""
        self._before = len(self._text)
        self._text += tokens[0]
        logits, features = self._run(torch.tensor([self._text]), last_only, use_cache=False)
        new = logits[0] if last_only else logits[0, self._before :]
        return [(new, {name: x[0, self._before :] for name, x in features.items()})]

    def keep(self, counts: Sequence[int]) -> None:
        """See :class:`Runner`."""
        del self._text[self._before + counts[0] :]

    def select(self, rows: Sequence[int]) -> None:
        """There is one."""


class LockstepRunner(_Runner):
    """See :class:`Runner`.

    Args:
        model: the target, one of which :func:`runs_in_lockstep` is true.
        capture: features to return with the logits; None for none.
        rows: sequences in the batch.
    """

    def __init__(self, model: Any, capture: CapturePolicy | None, rows: int) -> None:
        from transformers import DynamicCache

        super().__init__(model, capture)
        self._cache = DynamicCache()
        # Of every place in the cache: whether its token counts, and the token's position in its sequence.
        self._kept = torch.zeros(rows, 0, dtype=torch.bool)
        self._positions = torch.zeros(rows, 0, dtype=torch.int64)
        self._appended = [0] * rows

    def forward(self, tokens: Sequence[Sequence[int]], last_only: bool = False) -> Outputs:
        """See :class:`Runner`."""
        self._appended = [len(row) for row in tokens]
        width = max(self._appended)
        # Padding is on the left, so that the last token of every row is the last column.
        pads = [width - n for n in self._appended]
        ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(pads, tokens, strict=True)])
        new = torch.arange(width) >= torch.tensor(pads).unsqueeze(1)
        positions = (self._kept.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)
        self._kept = torch.cat([self._kept, new], dim=1)
        self._positions = torch.cat([self._positions, positions], dim=1)
        place = self.model.device
        kept = self._kept.to(place)
        with positions_decide(self._positions.to(place), kept):
            logits, features = self._run(
                ids,
                last_only,
                past_key_values=self._cache,
                use_cache=True,
                attention_mask=kept.long(),
                position_ids=positions.to(place),
            )
        return [
            (logits[i] if last_only else logits[i, pad:], {name: x[i, pad:] for name, x in features.items()})
            for i, pad in enumerate(pads)
        ]

    def keep(self, counts: Sequence[int]) -> None:
        """See :class:`Runner`."""
        for i, (count, n) in enumerate(zip(counts, self._appended, strict=True)):
            if count < n:
                self._kept[i, self._kept.shape[1] - n + count :] = False

    def select(self, rows: Sequence[int]) -> None:
        """See :class:`Runner`."""
        index = torch.tensor(rows)
        self._cache.batch_select_indices(index.to(self.model.device))
        self._kept, self._positions = self._kept[index], self._positions[index]


@contextmanager
def positions_decide(positions: Tensor, kept: Tensor) -> Iterator[None]:
    """Let the masks that transformers makes go by the positions of tokens rather than by their places in the cache.

    A model says what a token may see (all before it, a window, a chunk) as a function of two places. Where tokens that
    were taken back lie between others, places are not positions, and a window would count the holes.

    Args:
        positions: ``[B, K]`` position of the token in each place of the cache, those of this pass included.
        kept: ``[B, K]`` bool, whether the token counts.
    """
    # Chunks are counted from the first token that counts, which the model finds by its place: see `chunked_overlay`.
    shift = (kept.cumsum(1) == 0).sum(1)

    def by_position(inner: Callable[..., Any]) -> Callable[..., Any]:
        def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
            at = [positions[batch, place] + shift[batch] for place in (query, key)]
            # Padding sees itself, for a softmax over nothing is not a number.
            return (inner(batch, head, *at) & kept[batch, key]) | (query == key)

        return sees

    def masked(inner: Callable[..., Any]) -> Callable[..., Any]:
        def mask(**options: Any) -> Any:
            changes = {"mask_function": by_position(options["mask_function"]), "attention_mask": None}
            return inner(**{**options, **changes, "allow_is_causal_skip": False})

        return mask

    with _masks(masked):
        yield


@contextmanager
def _masks(change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Change how transformers makes masks for its eager and sdpa attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as makers

    before = {name: makers[name] for name in ("eager", "sdpa")}
    makers.update({name: change(make) for name, make in before.items()})
    try:
        yield
    finally:
        makers.update(before)
