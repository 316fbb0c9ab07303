"""Suffix decoding: continue the last tokens as they continued earlier (SuffixDecoding, arXiv 2411.04975).

The drafter is not trained. It counts every substring of the text so far, prompt included, and optionally of a corpus of
earlier answers. A suffix of p tokens that has occurred before is continued with the most frequent follower, token by
token, for at most ``factor · p`` tokens and while the estimated probability D of the draft (the product of the
followers' shares) stays above a threshold. Among all p, and among text and corpus, the draft with the largest expected
number of accepted tokens ΣD is proposed. The paper drafts a tree of continuations, this implementation a chain.

The counts are kept in a suffix automaton (Blumer et al. 1985), the minimal automaton of all substrings. A state is a
set of substrings that end at the same positions, so one number counts them all, and the suffixes of the text form one
chain of links.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from specforge.decoding.drafters import Features, NoDrafter
from specforge.decoding.verify import Proposal, Sampling

# Separates the texts of a corpus. It is not a token id, so no match crosses it and it is never drafted.
_END = -1


class SuffixAutomaton:
    """Occurrences of every substring of a growing text.

    State 0 is the empty string. A state stands for those suffixes of its longest substring, which has ``length``
    tokens, that are longer than the longest substring of its link.

    Attributes:
        next: per state, the states reached by appending one token.
        link: per state, the state of the longest suffix that also occurs elsewhere; -1 for state 0.
        length: per state, the length of its longest substring.
        count: per state, how often its substrings occur.
        end: per state, the length of the text at the last occurrence.
        last: state of the whole text.
    """

    def __init__(self, texts: Iterable[Sequence[int]] = ()) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.count, self.end = [-1], [0], [0], [0]
        self.last = 0
        for text in texts:
            for token in (*text, _END):
                self.append(token)

    def append(self, token: int) -> None:
        """Append a token to the text."""
        state, new = self.last, self._state({}, self.length[self.last] + 1)
        while state >= 0 and token not in self.next[state]:
            self.next[state][token] = new
            state = self.link[state]
        self.link[new] = 0 if state < 0 else self._suffix(state, token)
        self.last = new
        while new > 0:
            self.count[new] += 1
            self.end[new] = self.length[self.last]
            new = self.link[new]

    def _suffix(self, state: int, token: int) -> int:
        """The state whose longest substring is that of ``state`` plus ``token``; split off if it is not the longest."""
        old = self.next[state][token]
        if self.length[old] == self.length[state] + 1:
            return old
        split = self._state(dict(self.next[old]), self.length[state] + 1)
        self.link[split], self.count[split], self.end[split] = self.link[old], self.count[old], self.end[old]
        self.link[old] = split
        while state >= 0 and self.next[state].get(token) == old:
            self.next[state][token] = split
            state = self.link[state]
        return split

    def _state(self, following: dict[int, int], length: int) -> int:
        self.next.append(following)
        self.link.append(-1)
        self.length.append(length)
        self.count.append(0)
        self.end.append(0)
        return len(self.next) - 1

    def step(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Match another text against this one, token by token.

        Args:
            state: state of the longest suffix of the other text that occurs in this one.
            length: length of that suffix.
            token: next token of the other text.

        Returns:
            State and length of the longest matching suffix after ``token``.
        """
        while state > 0 and token not in self.next[state]:
            state = self.link[state]
            length = self.length[state]
        if token not in self.next[state]:
            return 0, 0
        return self.next[state][token], length + 1


class _Candidate(NamedTuple):
    """Drafted tokens, and the sum of their estimated acceptance probabilities."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0


@dataclass(eq=False)
class SuffixDrafter(NoDrafter):
    """Continues the text as its last tokens continued earlier."""

    corpus: SuffixAutomaton | None = None  # earlier answers to match as well; it is shared and not modified
    factor: float = 4.0  # α, maximum number of drafted tokens per token of the match; the paper tries 1 to 4
    threshold: float = 0.1  # a draft ends before its estimated probability falls below this value
    longest: int = 64  # maximum length of a match in tokens

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self._text = SuffixAutomaton()
        self._match = (0, 0)

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """Count the substrings that end in the new tokens."""
        for token in tokens:
            self._text.append(token)
            if self.corpus is not None:
                self._match = self.corpus.step(*self._match, token)

    def propose(self, count: int, sampling: Sampling, generator: torch.Generator | None = None) -> Proposal:
        """The draft with the highest score; of equal scores, the one with the longest match in the text itself."""
        best = _Candidate()
        for automaton, state, length in self._matches():
            draft = self._follow(automaton, state, min(count, int(self.factor * length)))
            if draft.score > best.score:
                best = draft
        return Proposal(best.tokens)

    def _matches(self) -> Iterator[tuple[SuffixAutomaton, int, int]]:
        """Automaton, state and length of every suffix that has occurred before; the longest one per state."""
        suffix = self._text.link[self._text.last]
        starts = [(self._text, suffix, self._text.length[suffix] if suffix > 0 else 0)]
        if self.corpus is not None:
            starts.append((self.corpus, *self._match))
        for automaton, state, length in starts:
            while state > 0:
                shorter = automaton.length[automaton.link[state]]
                if shorter < self.longest:
                    yield automaton, state, min(length, self.longest)
                state, length = automaton.link[state], shorter

    def _follow(self, automaton: SuffixAutomaton, state: int, count: int) -> _Candidate:
        """Draft the most frequent follower at each step; of equally frequent followers, the latest."""
        tokens: list[int] = []
        probability, score = 1.0, 0.0
        while len(tokens) < count and automaton.next[state]:
            followers = automaton.next[state]
            total = sum(automaton.count[child] for child in followers.values())
            token, state = max(followers.items(), key=lambda x: (automaton.count[x[1]], automaton.end[x[1]]))
            probability *= automaton.count[state] / total
            if token == _END or probability < self.threshold:
                break
            tokens.append(token)
            score += probability
        return _Candidate(tuple(tokens), score)
