"""Suffix decoding drafts what counting by hand says, offline τ is decoded τ, and its output is the target's own."""

from __future__ import annotations

import pytest
import torch

from specforge.decoding.decoder import decode
from specforge.decoding.suffix import SuffixAutomaton, SuffixDrafter
from specforge.decoding.verify import Sampling
from specforge.eval.baselines import baselines
from specforge.eval.cache import Reference
from specforge.eval.offline import text_rounds
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles

END = None  # what follows the end of a corpus' text


def random_text(seed: int, length: int, letters: int) -> list[int]:
    """Few letters and copied pieces, so that long matches occur."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(0, letters, (length // 2,), generator=g).tolist()
    while len(text) < length:
        start = int(torch.randint(0, len(text) - 4, (1,), generator=g))
        text += text[start : start + int(torch.randint(2, 12, (1,), generator=g))]
        text.append(int(torch.randint(0, letters, (1,), generator=g)))
    return text[:length]


def occurrences(pattern: list[int], texts: list[list]) -> list[tuple[int, object]]:
    """What followed each occurrence of a pattern, and at which place of all texts in a row."""
    found, place = [], 0
    for text in texts:
        for i in range(len(text) - len(pattern)):
            if text[i : i + len(pattern)] == pattern:
                found.append((place + i, text[i + len(pattern)]))
        place += len(text)
    return found


def follow(pattern: list[int], texts: list[list], count: int, threshold: float) -> tuple[list[int], float]:
    tokens, probability, score = [], 1.0, 0.0
    while len(tokens) < count:
        found = occurrences([*pattern, *tokens], texts)
        if not found:
            break
        followers = [token for _, token in found]
        latest = {token: place for place, token in found}
        token = max(latest, key=lambda t: (followers.count(t), latest[t]))
        probability *= followers.count(token) / len(followers)
        if token is END or probability < threshold:
            break
        tokens.append(token)
        score += probability
    return tokens, score


def by_hand(text, corpus, count, factor, threshold, longest) -> list[int]:
    """Every match of text and corpus, longest first; the first draft of the largest score."""
    best, best_score = [], 0.0
    for texts in ([text], [[*t, END] for t in corpus]):
        for p in range(min(longest, len(text)), 0, -1):
            tokens, score = follow(text[-p:], texts, min(count, int(factor * p)), threshold)
            if score > best_score:
                best, best_score = tokens, score
    return best


@pytest.mark.parametrize("with_corpus", [False, True])
@pytest.mark.parametrize(
    ("letters", "options"),
    [
        (2, {"factor": 1.0, "threshold": 0.1, "longest": 64}),
        (3, {"factor": 2.0, "threshold": 0.3, "longest": 5}),
        (9, {"factor": 1.0, "threshold": 0.0, "longest": 3}),
        (1, {"factor": 0.5, "threshold": 0.1, "longest": 8}),
    ],
)
def test_drafts_are_those_of_counting_by_hand(letters, options, with_corpus):
    text = random_text(1, 90, letters)
    corpus = [random_text(s, 40, letters) for s in (2, 3)] if with_corpus else []
    drafter = SuffixDrafter(SuffixAutomaton(corpus) if corpus else None, **options)
    drafted = 0
    for end in range(1, len(text)):
        drafter.observe([text[end - 1]], {})
        expected = by_hand(text[:end], corpus, 5, **options)
        assert list(drafter.propose(5, Sampling()).tokens) == expected, end
        drafted += len(expected)
    assert drafted > 80


def test_every_substring_is_counted():
    whole = random_text(4, 60, 3)
    automaton = SuffixAutomaton()
    for n, token in enumerate(whole, 1):
        automaton.append(token)
        text = whole[:n]
        for start in range(n):
            state = 0
            for stop in range(start + 1, n + 1):
                state = automaton.next[state][text[stop - 1]]
                places = [i for i in range(n) if text[i : i + stop - start] == text[start:stop]]
                assert automaton.count[state] == len(places)
                assert automaton.end[state] == max(places) + stop - start
    assert len(automaton.next) <= 2 * len(whole)


def test_a_new_sequence_forgets_the_text_but_not_the_corpus():
    drafter = SuffixDrafter(SuffixAutomaton([[1, 2, 3]]))
    drafter.observe([7, 8, 7], {})
    assert drafter.propose(4, Sampling()).tokens == (8, 7)
    drafter.reset()
    drafter.observe([7], {})
    assert drafter.propose(4, Sampling()).tokens == ()
    drafter.observe([1], {})
    assert drafter.propose(4, Sampling()).tokens == (2, 3)
    drafter.observe([2, 3], {})  # where the corpus' text ends
    assert drafter.propose(4, Sampling()).tokens == ()
    assert drafter.propose(0, Sampling()).tokens == ()


@pytest.fixture(scope="module")
def engine(target) -> HFTargetEngine:
    return HFTargetEngine(TargetFiles.find(str(target)), "float32")


PROMPTS = [random_text(seed, 12 + seed, 40) for seed in range(5)]


@pytest.mark.parametrize("name", ["none", "ngram", "suffix"])
@pytest.mark.parametrize("corpus", [[], [random_text(9, 50, 40)]], ids=["alone", "corpus"])
def test_greedy_output_is_the_targets_own_and_offline_rounds_are_the_decoded_ones(engine, name, corpus):
    plain = engine.generate(PROMPTS, max_new_tokens=40, end_ids=[256])
    make = baselines([*corpus, plain[0]] if corpus else [])[name]
    options = {"gamma": 4, "max_new_tokens": 40, "end_ids": (256,)}
    together = decode(engine.model, make, PROMPTS, **options)
    alone = [decode(engine.model, make, [p], **options)[0] for p in PROMPTS[1::2]]
    assert [d.tokens for d in together] == plain
    assert [(d.tokens, d.rounds) for d in alone] == [(d.tokens, d.rounds) for d in together[1::2]]
    offline = [text_rounds(make, Reference(p, a, {}), 4) for p, a in zip(PROMPTS, plain, strict=True)]
    assert [(d.counted, d.rounds) for d in together] == offline
    if name == "suffix" and corpus:
        assert together[0].rounds < 20  # its own answer is in the corpus


def test_sampled_rounds_are_replayed_exactly(engine):
    """Of a deterministic draft a token is accepted exactly where the sampled answer has it."""
    make = baselines()["suffix"]
    sampling = Sampling(0.1)
    decoded = decode(engine.model, make, PROMPTS, gamma=4, max_new_tokens=60, end_ids=(), sampling=sampling, seed=3)
    assert sum(sum(d.accepted) for d in decoded) > 10
    for prompt, d in zip(PROMPTS, decoded, strict=True):
        assert text_rounds(make, Reference(prompt, d.tokens, {}), 4) == (d.counted, d.rounds)
