"""The reference decoder: the target in transformers with a key/value cache, any drafter, one prompt or many.

Several prompts are decoded in lockstep: every round is one pass of the target over the drafts of all
prompts that are not finished. Rejected tokens stay in the cache and are masked; alone, they are cut off,
so that a single prompt costs no mask (that is the form that is timed).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specforge.contracts import CapturePolicy
from specforge.decoding.drafters import Drafter, Features
from specforge.decoding.verify import Sampling, verify
from specforge.inference.target_engine.hf import FeatureTap


class TargetRunner:
    """A transformers causal LM that processes growing sequences and can take tokens back.

    Args:
        model: the target, in eval mode.
        capture: features to return with the logits; None for none.
        rows: sequences in the batch.
    """

    def __init__(self, model: Any, capture: CapturePolicy | None = None, rows: int = 1) -> None:
        from transformers import DynamicCache

        self.model = model
        self._cache = DynamicCache()
        self._tap = None if capture is None else FeatureTap(model, capture)
        self._lockstep = rows > 1
        self._kept = torch.zeros(rows, 0, dtype=torch.int64)
        self._appended = [0] * rows

    def forward(
        self, tokens: Sequence[Sequence[int]], last_only: bool = False
    ) -> list[tuple[Tensor, Features]]:
        """Append tokens to every row.

        Args:
            tokens: token ids of each row, at least one.
            last_only: compute logits of each row's last token only.

        Returns:
            For each row, logits ``[n or 1, V]`` on the CPU and its features ``[n, width]`` on the model's device.
        """
        self._appended = [len(row) for row in tokens]
        width = max(self._appended)
        # Padding is on the left, so that the last token of every row is the last column.
        pads = [width - n for n in self._appended]
        ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(pads, tokens, strict=True)])
        options: dict[str, Any] = {}
        if self._lockstep:
            new = torch.tensor([[0] * pad + [1] * n for pad, n in zip(pads, self._appended, strict=True)])
            seen = self._kept.sum(1, keepdim=True)
            options["position_ids"] = (seen + new.cumsum(1) - 1).clamp(min=0).to(self.model.device)
            self._kept = torch.cat([self._kept, new], dim=1)
            options["attention_mask"] = self._kept.to(self.model.device)
        output = self.model(
            input_ids=ids.to(self.model.device), past_key_values=self._cache, use_cache=True,
            logits_to_keep=1 if last_only else 0, **options,
        )  # fmt: skip
        logits = output.logits.cpu()
        features = {} if self._tap is None else self._tap.features()
        return [
            (logits[i] if last_only else logits[i, pad:], {name: x[i, pad:] for name, x in features.items()})
            for i, pad in enumerate(pads)
        ]

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first ``counts[i]`` of the tokens that the last call appended to row i."""
        if not self._lockstep:
            if counts[0] < self._appended[0]:
                self._cache.crop(counts[0] - self._appended[0])
            return
        for i, (count, n) in enumerate(zip(counts, self._appended, strict=True)):
            if count < n:
                self._kept[i, self._kept.shape[1] - n + count :] = 0

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only."""
        index = torch.tensor(rows)
        self._cache.batch_select_indices(index.to(self.model.device))
        self._kept = self._kept[index]

    def close(self) -> None:
        """Remove the hooks from the model."""
        if self._tap is not None:
            self._tap.close()


@dataclass
class Decoded:
    """One decoded answer.

    Attributes:
        tokens: the answer; an end token, if there is one, is the last.
        rounds: verification passes of the target, the prefill not counted.
        drafted: how often a token was drafted at each position, given that everything before it was accepted.
        accepted: how often it was accepted.
        seconds: wall time of everything after the prefill, the draft's own prefill included, shared by all
            prompts that were decoded together.
    """

    tokens: list[int] = field(default_factory=list)
    rounds: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def counted(self) -> int:
        """Tokens that count for τ: all but the first, which the prefill gives."""
        return len(self.tokens) - 1


class _Sequence:
    """A prompt on its way: its drafter, its coins, its answer so far."""

    def __init__(self, prompt: Sequence[int], drafter: Drafter, gamma: int, seed: int) -> None:
        self.prompt, self.drafter = prompt, drafter
        self.generator = torch.Generator().manual_seed(seed)
        self.result = Decoded(drafted=[0] * gamma, accepted=[0] * gamma)
        drafter.reset()

    def start(self, logits: Tensor, features: Features, sampling: Sampling) -> None:
        if sampling.greedy:
            first = int(logits[-1].argmax())
        else:
            first = int(torch.multinomial(sampling.probs(logits[-1:])[0], 1, generator=self.generator))
        self.result.tokens.append(first)
        self.drafter.observe([*self.prompt, first], features)

    def commit(
        self, proposal: Any, logits: Tensor, features: Features, sampling: Sampling, ends: frozenset[int]
    ) -> int:
        """Verify a proposal; returns how many of the tokens that the target processed stay."""
        result = self.result
        verdict = verify(proposal, logits, sampling, self.generator)
        committed = [*proposal.tokens[: verdict.accepted], verdict.next]
        kept = {name: x[: verdict.accepted + 1] for name, x in features.items()}
        self.drafter.observe(committed, kept)
        ended = next((i + 1 for i, token in enumerate(committed) if token in ends), len(committed))
        result.rounds += 1
        result.tokens += committed[:ended]
        accepted = min(verdict.accepted, ended)
        for position in range(len(proposal.tokens)):
            result.drafted[position] += position <= accepted
            result.accepted[position] += position < accepted
        return verdict.accepted + 1


@torch.inference_mode()
def decode(
    model: Any,
    drafter: Callable[[], Drafter],
    prompts: Sequence[Sequence[int]],
    *,
    gamma: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[Decoded]:
    """Decode answers speculatively; they are the target's own.

    Args:
        model: the target, a transformers causal LM in eval mode.
        drafter: makes the drafter of one prompt.
        prompts: token ids of each prompt; more than one are decoded in lockstep.
        gamma: most tokens to draft in a round.
        max_new_tokens: most tokens of an answer.
        end_ids: tokens that end one.
        sampling: greedy if not given.
        seed: of the coins and samples; prompt i uses ``seed + i``.
    """
    sampling, ends = sampling or Sampling(), frozenset(end_ids)
    active = [_Sequence(p, drafter(), gamma, seed + i) for i, p in enumerate(prompts)]
    everything = list(active)
    runner = TargetRunner(model, active[0].drafter.capture, len(active))
    try:
        prefill = runner.forward([s.prompt for s in active], last_only=True)
        start = time.perf_counter()
        for sequence, (logits, features) in zip(active, prefill, strict=True):
            sequence.start(logits, features, sampling)
        while True:
            open_rows = [
                i for i, s in enumerate(active)
                if len(s.result.tokens) < max_new_tokens and s.result.tokens[-1] not in ends
            ]  # fmt: skip
            if len(open_rows) < len(active):
                if not open_rows:
                    break
                runner.select(open_rows)
                active = [active[i] for i in open_rows]
            _round(runner, active, gamma, max_new_tokens, sampling, ends)
        for sequence in everything:
            sequence.result.seconds = time.perf_counter() - start
    finally:
        runner.close()
    return [sequence.result for sequence in everything]


def _round(
    runner: TargetRunner, active: Sequence[_Sequence], gamma: int, max_new_tokens: int, sampling: Sampling,
    ends: frozenset[int],
) -> None:  # fmt: skip
    proposals = []
    for sequence in active:
        room = max_new_tokens - len(sequence.result.tokens)
        proposals.append(sequence.drafter.propose(min(gamma, room - 1), sampling, sequence.generator))
    outputs = runner.forward(
        [[s.result.tokens[-1], *p.tokens] for s, p in zip(active, proposals, strict=True)]
    )
    kept = [
        sequence.commit(proposal, logits, features, sampling, ends)
        for sequence, proposal, (logits, features) in zip(active, proposals, outputs, strict=True)
    ]
    runner.keep(kept)
