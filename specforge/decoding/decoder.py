"""The reference decoder: the target in transformers, any drafter, one prompt or several.

Several prompts are decoded in lockstep: each round is one pass of the target over the drafts of all unfinished prompts
(:mod:`specforge.decoding.runners`). Targets that do not support lockstep decode one prompt after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge.decoding.drafters import Drafter, Features
from specforge.decoding.runners import Runner, make_runner, runs_in_lockstep
from specforge.decoding.verify import Proposal, Sampling, verify


@dataclass
class Decoded:
    """One decoded answer."""

    tokens: list[int] = field(default_factory=list)  # the answer, ending in the end token if there is one
    rounds: int = 0  # verification passes of the target, prefill excluded
    # per position, how often a token was drafted there and all drafts before it were accepted
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)  # per position, how often that token was accepted
    # wall time after the prefill, including the draft's own prefill; prompts decoded together share it
    seconds: float = 0.0

    @property
    def counted(self) -> int:
        """Tokens that count for τ: all but the first, which comes from the prefill."""
        return len(self.tokens) - 1


class _Options(NamedTuple):
    gamma: int
    max_new_tokens: int
    ends: frozenset[int]
    sampling: Sampling


class _Sequence:
    """A prompt that is being decoded: its drafter, its random generator, and its answer so far."""

    def __init__(self, prompt: Sequence[int], drafter: Drafter, options: _Options, seed: int) -> None:
        self.prompt, self.drafter, self.options = prompt, drafter, options
        self.generator = torch.Generator().manual_seed(seed)
        self.result = Decoded(drafted=[0] * options.gamma, accepted=[0] * options.gamma)
        drafter.reset()

    @property
    def finished(self) -> bool:
        tokens = self.result.tokens
        return len(tokens) >= self.options.max_new_tokens or tokens[-1] in self.options.ends

    def start(self, logits: Tensor, features: Features) -> None:
        sampling = self.options.sampling
        if sampling.greedy:
            first = int(logits[-1].argmax())
        else:
            first = int(torch.multinomial(sampling.probs(logits[-1:])[0], 1, generator=self.generator))
        self.result.tokens.append(first)
        self.drafter.observe([*self.prompt, first], features)

    def propose(self) -> Proposal:
        gamma, room = self.options.gamma, self.options.max_new_tokens - len(self.result.tokens)
        return self.drafter.propose(min(gamma, room - 1), self.options.sampling, self.generator)

    def commit(self, proposal: Proposal, logits: Tensor, features: Features) -> int:
        """Verify a proposal; returns how many of the tokens that the target processed are kept."""
        result, ends = self.result, self.options.ends
        verdict = verify(proposal, logits, self.options.sampling, self.generator)
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
    """Decode answers speculatively; they are those of the target (greedy), or have its distribution (sampled).

    Args:
        model: the target, a transformers causal LM in eval mode.
        drafter: creates the drafter of one prompt.
        prompts: token ids of each prompt; several prompts are decoded in lockstep if the target supports it.
        gamma: maximum number of tokens drafted per round.
        max_new_tokens: maximum length of an answer in tokens.
        end_ids: tokens that end an answer.
        sampling: how the target chooses tokens (default: greedy).
        seed: random seed for sampling and verification; prompt i uses ``seed + i``.
    """
    if len(prompts) > 1 and not runs_in_lockstep(model):
        decode_one = partial(
            decode, model, drafter, gamma=gamma, max_new_tokens=max_new_tokens, end_ids=end_ids, sampling=sampling
        )
        return [decode_one([prompt], seed=seed + i)[0] for i, prompt in enumerate(prompts)]
    options = _Options(gamma, max_new_tokens, frozenset(end_ids), sampling or Sampling())
    active = [_Sequence(p, drafter(), options, seed + i) for i, p in enumerate(prompts)]
    sequences = list(active)
    runner = make_runner(model, active[0].drafter.capture, len(active))
    try:
        prefill = runner.forward([s.prompt for s in active], last_only=True)
        start = time.perf_counter()
        for sequence, (logits, features) in zip(active, prefill, strict=True):
            sequence.start(logits, features)
        while True:
            unfinished = [i for i, s in enumerate(active) if not s.finished]
            if len(unfinished) < len(active):
                if not unfinished:
                    break
                runner.select(unfinished)
                active = [active[i] for i in unfinished]
            _round(runner, active)
        for sequence in sequences:
            sequence.result.seconds = time.perf_counter() - start
    finally:
        runner.close()
    return [sequence.result for sequence in sequences]


def _round(runner: Runner, active: Sequence[_Sequence]) -> None:
    proposals = [sequence.propose() for sequence in active]
    outputs = runner.forward([[s.result.tokens[-1], *p.tokens] for s, p in zip(active, proposals, strict=True)])
    kept = [
        sequence.commit(proposal, logits, features)
        for sequence, proposal, (logits, features) in zip(active, proposals, outputs, strict=True)
    ]
    runner.keep(kept)
