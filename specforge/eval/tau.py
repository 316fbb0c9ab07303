"""Acceptance length τ: committed tokens per verification pass of the target, bonus token included.

τ is pooled: all tokens over all rounds. Rounds of one prompt are alike, so intervals are clustered by prompt.
The first token of an answer comes from the prefill and is not counted; a last round that the end of the
answer cuts short counts with what it committed.

Offline τ replays the rounds over an answer that exists already, from the probability w[s, k] that the k-th
token drafted from start s is accepted when everything before it was: 0 or 1 for greedy decoding, and
min(1, q(x)/p(x)) for a sampled answer x (given that x was emitted, that is how likely it was an accepted
draft). Teacher forcing is exact, because up to the first rejection the draft's tokens *are* the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Rounds(NamedTuple):
    """Committed ``tokens`` and verification ``rounds`` of one prompt; rounds may be an expectation."""

    tokens: float
    rounds: float


class Tau(NamedTuple):
    """A pooled ratio with its 95 % interval (NaN where one prompt gives none)."""

    value: float
    low: float
    high: float


def jump(accept: np.ndarray) -> tuple[Rounds, np.ndarray, np.ndarray]:
    """Replay greedy rounds: from start s, a leading accepts, then start s + a + 1.

    Args:
        accept: ``[starts, γ]`` bool; entries past the end of the answer are False.

    Returns:
        Tokens and rounds, and per position how often it was drafted and accepted, ``[γ]`` each.
    """
    starts, gamma = accept.shape
    drafted, accepted = np.zeros(gamma, np.int64), np.zeros(gamma, np.int64)
    leading = np.where(accept.all(1), gamma, (~accept).argmax(1)) if gamma else np.zeros(starts, np.int64)
    start = rounds = 0
    while start < starts:
        a = int(leading[start])
        drafted[: min(a + 1, gamma, starts - start)] += 1
        accepted[:a] += 1
        start += a + 1
        rounds += 1
    return Rounds(starts, rounds), drafted, accepted


def expected_rounds(accept: np.ndarray) -> Rounds:
    """Exact expectation of the rounds, by dynamic programming over starts.

    R(s) = 1 + Σ_a P(a | s) R(s + a + 1), with P(a | s) = (Π_{k<a} w[s, k]) (1 - w[s, a]).

    Args:
        accept: ``[starts, γ]`` probabilities w; entries past the end of the answer are 0.
    """
    starts, gamma = accept.shape
    rounds = np.zeros(starts + gamma + 2)
    survive = np.concatenate([np.ones((starts, 1)), np.cumprod(accept, axis=1)], axis=1)
    stop = survive.copy()
    stop[:, :-1] -= survive[:, 1:]
    for start in range(starts - 1, -1, -1):
        rounds[start] = 1 + stop[start] @ rounds[start + 1 : start + gamma + 2]
    return Rounds(starts, float(rounds[0]))


def pooled_tau(prompts: Iterable[Rounds]) -> Tau:
    """τ = ΣN / ΣR with a t interval from the delta method, clustered by prompt.

    SE = sqrt(Σ(N_i - τ R_i)² / (n (n - 1))) / mean(R).
    """
    return tau_of_sums(sum((products(p) for p in prompts if p.rounds > 0), np.zeros(6)))


def products(prompt: Rounds) -> np.ndarray:
    """``[1, N, R, N², N R, R²]`` of one prompt; their sums over prompts give τ and its interval."""
    tokens, rounds = prompt
    return np.array([1, tokens, rounds, tokens * tokens, tokens * rounds, rounds * rounds])


def tau_of_sums(sums: Iterable[float]) -> Tau:
    """τ of :func:`pooled_tau` from summed :func:`products`; NaN without prompts."""
    from scipy.special import stdtrit  # scipy.stats.t.ppf, without the import time of scipy.stats

    n, tokens, rounds, tokens2, product, rounds2 = map(float, sums)
    tau = tokens / rounds if n else float("nan")
    half = float("nan")
    if n > 1:
        residual = max(0.0, tokens2 - 2 * tau * product + tau * tau * rounds2)
        half = float(stdtrit(n - 1, 0.975)) * (residual / (n * (n - 1))) ** 0.5 / (rounds / n)
    return Tau(tau, tau - half, tau + half)


def chains(hits: np.ndarray, labels: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Regroup students by the round that would draft them.

    Args:
        hits: ``[M, T]`` bool or probability: the student of label m at position k is right.
        labels: ``[M]`` flat token of each label, ascending.
        spans: the answers, as flat ``(first token, stop)`` runs.

    Returns:
        For each span ``[starts, T]``: start s follows the s-th token of the answer and its k-th draft is token
        s + 1 + k; zero past the end.
    """
    depth = np.arange(hits.shape[1])
    # The last row is that of tokens without a label.
    padded = np.concatenate([hits, np.zeros((1, len(depth)), dtype=hits.dtype)])
    row = np.full(1 + max((*labels, *(stop for _, stop in spans)), default=0), -1)
    row[list(labels)] = np.arange(len(labels))
    out = []
    for first, stop in spans:
        tokens = first + 1 + np.arange(max(0, stop - first - 1))[:, None] + depth
        out.append(padded[np.where(tokens < stop, row[np.minimum(tokens, stop)], -1), depth])
    return out
