"""Acceptance length τ: tokens committed per verification pass of the target, bonus token included.

τ is pooled: the sum of all tokens over the sum of all rounds. Rounds of the same prompt are correlated, so intervals
are clustered by prompt. The first token of an answer comes from the prefill and is not counted; a last round that the
end of the answer cuts short counts with the tokens it committed. Every round commits at least one token, so τ >= 1 and
intervals are clipped there.

Offline τ replays the rounds over an existing answer. It needs w[s, k], the probability that the k-th token drafted
from start s is accepted given that all tokens before it were: 0 or 1 for greedy decoding, and min(1, q(x)/p(x)) for a
sampled answer x (given that x was emitted, the probability that it was an accepted draft). Teacher forcing is exact,
because up to the first rejection the drafted tokens are the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Rounds(NamedTuple):
    """Committed ``tokens`` and verification ``rounds`` of one prompt; the rounds may be an expected value."""

    tokens: float
    rounds: float


class Tau(NamedTuple):
    """A pooled ratio with its 95 % interval (NaN with fewer than two prompts)."""

    value: float
    low: float
    high: float


def jump(accept: np.ndarray) -> tuple[Rounds, np.ndarray, np.ndarray]:
    """Replay greedy rounds: from start s, accept the a leading hits, then go to start s + a + 1.

    Args:
        accept: ``[starts, γ]`` bool; entries past the end of the answer are False.

    Returns:
        Tokens and rounds; how often each position was drafted, and accepted, ``[γ]`` each.
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
    """Exact expected number of rounds, by dynamic programming over starts.

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
    """τ = ΣN / ΣR with a t interval by the delta method, clustered by prompt.

    SE = sqrt(Σ(N_i - τ R_i)² / (n (n - 1))) / mean(R).
    """
    return tau_of_sums(sum((products(p) for p in prompts if p.rounds > 0), np.zeros(6)))


def products(prompt: Rounds) -> np.ndarray:
    """``[1, N, R, N², N R, R²]`` of one prompt; the sums over prompts determine τ and its interval."""
    tokens, rounds = prompt
    return np.array([1, tokens, rounds, tokens * tokens, tokens * rounds, rounds * rounds])


def tau_of_sums(sums: Iterable[float]) -> Tau:
    """The result of :func:`pooled_tau` from summed :func:`products`; NaN without prompts."""
    from scipy.special import stdtrit  # scipy.stats.t.ppf, without the import time of scipy.stats

    n, tokens, rounds, tokens2, product, rounds2 = map(float, sums)
    tau = tokens / rounds if n else float("nan")
    half = float("nan")
    if n > 1:
        residual = max(0.0, tokens2 - 2 * tau * product + tau * tau * rounds2)
        half = float(stdtrit(n - 1, 0.975)) * (residual / (n * (n - 1))) ** 0.5 / (rounds / n)
    low = tau - half
    return Tau(tau, 1.0 if low < 1 else low, tau + half)


def speedup(fast: np.ndarray, plain: np.ndarray) -> Tau:
    """Ratio of two decoding speeds with a t interval by the delta method on its logarithm, clustered by prompt.

    With N tokens in T seconds per prompt, log(speed-up) = log ΣN - log ΣT - log ΣN' + log ΣT'.

    Args:
        fast: ``[n, 2]`` tokens and seconds of each prompt.
        plain: likewise for plain decoding of the same prompts.
    """
    from scipy.special import stdtrit

    n, counts = len(fast), np.concatenate([fast, plain], axis=1).astype(float)
    means = counts.mean(0).clip(1e-9)
    signs = np.array([1, -1, -1, 1])
    value = float(np.prod(means**signs))
    if n < 2:
        return Tau(value, float("nan"), float("nan"))
    spread = float(stdtrit(n - 1, 0.975)) * (counts / means @ signs).std(ddof=1) / n**0.5
    return Tau(value, value * float(np.exp(-spread)), value * float(np.exp(spread)))


def chains(hits: np.ndarray, labels: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Regroup predictions by the round that would draft them.

    Example: an answer of tokens 10 to 13 has the starts 10, 11 and 12. With T = 2, the first start drafts tokens 11 and
    12, the second 12 and 13, the third 13 only. If tokens 11, 12 and 13 are the labels of rows 0, 1 and 2 of ``hits``,
    the result is ``[[hits[0, 0], hits[1, 1]], [hits[1, 0], hits[2, 1]], [hits[2, 0], 0]]``.

    Args:
        hits: ``[M, T]`` bool or probability that the prediction of label m at draft position k is right.
        labels: ``[M]`` index of each label's token in the batch, ascending.
        spans: the answers, as ``(first token, stop)`` in the batch.

    Returns:
        One array ``[starts, T]`` per span: start s follows the s-th token of the answer, and its k-th draft is token
        s + 1 + k. Entries past the end are zero.
    """
    depth = np.arange(hits.shape[1])
    padded = np.concatenate([hits, np.zeros((1, len(depth)), dtype=hits.dtype)])  # the last row: tokens without a label
    row = np.full(1 + max((*labels, *(stop for _, stop in spans)), default=0), -1)
    row[list(labels)] = np.arange(len(labels))
    out = []
    for first, stop in spans:
        tokens = first + 1 + np.arange(max(0, stop - first - 1))[:, None] + depth
        out.append(padded[np.where(tokens < stop, row[np.minimum(tokens, stop)], -1), depth])
    return out
