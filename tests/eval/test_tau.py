"""τ: exact offline rounds, pooled ratio, intervals clustered by prompt."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from specforge.eval.tau import Rounds, chains, expected_rounds, jump, pooled_tau, speedup


def simulate(accept: np.ndarray) -> int:
    """Rounds, token by token: draft until one is wrong, then take the target's own."""
    start = rounds = 0
    while start < len(accept):
        k = 0
        while k < accept.shape[1] and accept[start, k]:
            k += 1
        start += k + 1
        rounds += 1
    return rounds


def table(rng: np.random.Generator, starts: int, gamma: int) -> np.ndarray:
    accept = rng.random((starts, gamma)) < 0.6
    for start in range(starts):
        accept[start, max(0, starts - start) :] = False
    return accept


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_jump_is_the_simulation(gamma):
    rng = np.random.default_rng(0)
    for starts in (0, 1, 2, 7, 40):
        accept = table(rng, starts, gamma)
        rounds, drafted, accepted = jump(accept)
        assert rounds == Rounds(starts, simulate(accept))
        assert (accepted <= drafted).all()
        assert accepted.sum() + rounds.rounds >= starts  # every token was accepted or is a bonus


def test_expected_rounds_is_the_mean_over_all_outcomes():
    rng = np.random.default_rng(1)
    starts, gamma = 4, 2
    w = rng.random((starts, gamma))
    for start in range(starts):
        w[start, starts - start :] = 0.0
    total = 0.0
    for bits in itertools.product([0, 1], repeat=starts * gamma):
        accept = np.array(bits, dtype=bool).reshape(starts, gamma)
        total += np.where(accept, w, 1 - w).prod() * simulate(accept)
    assert expected_rounds(w).rounds == pytest.approx(total)


def test_expected_rounds_of_certainties_is_jump():
    accept = table(np.random.default_rng(2), 30, 4)
    assert expected_rounds(accept.astype(float)).rounds == pytest.approx(jump(accept)[0].rounds)


def test_tau_is_pooled_and_counts_the_bonus_token():
    tau = pooled_tau([Rounds(10, 5), Rounds(1, 1), Rounds(0, 0)])
    assert tau.value == 11 / 6
    assert pooled_tau([Rounds(20, 4)]).value == 5.0  # all 4 drafts accepted in every round, and one more


def test_the_interval_is_that_of_resampling_prompts():
    rng = np.random.default_rng(3)
    rounds = rng.integers(5, 60, 80)
    prompts = [Rounds(float(n), float(r)) for n, r in zip(rounds * rng.uniform(1.2, 2.6, 80), rounds, strict=True)]
    tau = pooled_tau(prompts)
    counts = np.array(prompts)
    draws = counts[rng.integers(0, 80, (4000, 80))].sum(1)
    low, high = np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975])
    assert tau.high - tau.low == pytest.approx(high - low, rel=0.1)


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (5, 2.5706), (30, 2.0423), (1000, 1.9623)])
def test_the_interval_uses_students_quantile(freedom, value):
    prompts = [Rounds(20.0 + i % 3, 10.0) for i in range(freedom + 1)]
    tau, tokens = pooled_tau(prompts), np.array(prompts)[:, 0]
    error = tokens.std(ddof=1) / len(prompts) ** 0.5 / 10
    assert (tau.high - tau.value) / error == pytest.approx(value, abs=1e-3)


def test_the_interval_is_clipped_at_one():
    tau = pooled_tau([Rounds(10, 10), Rounds(30, 10)])
    assert (tau.value, tau.low) == (2.0, 1.0)
    assert np.isnan(pooled_tau([Rounds(10, 10)]).low)


def test_the_interval_of_a_speedup_is_that_of_resampling_prompts():
    rng = np.random.default_rng(4)
    tokens = rng.integers(20, 100, 60)
    plain = np.stack([tokens, tokens * rng.uniform(0.9, 1.1, 60)], axis=1)
    fast = np.stack([tokens, tokens * rng.uniform(0.3, 0.9, 60)], axis=1)
    found = speedup(fast, plain)
    rows = rng.integers(0, 60, (4000, 60))
    (n, t), (n0, t0) = (x[rows].sum(1).T for x in (fast, plain))
    low, high = np.quantile(n / t / (n0 / t0), [0.025, 0.975])
    assert found.value == pytest.approx(fast[:, 0].sum() / fast[:, 1].sum() / (plain[:, 0].sum() / plain[:, 1].sum()))
    assert found.low == pytest.approx(low, rel=0.03)
    assert found.high == pytest.approx(high, rel=0.03)
    assert np.isnan(speedup(fast[:1], plain[:1]).low)


def test_chains_regroup_students_by_round():
    hits = np.arange(12).reshape(6, 2)  # labels 3..8, two positions
    (found,) = chains(hits, [3, 4, 5, 6, 7, 8], [(2, 6)])
    assert found.tolist() == [[0, 3], [2, 5], [4, 0]]
