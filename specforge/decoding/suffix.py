"""Suffix decoding: continue the way that what was just written went on before (SuffixDecoding, arXiv 2411.04975).

No training: the drafter counts every substring of the text so far, prompt included, and optionally of a corpus of
earlier answers. A suffix of p tokens that occurred before is continued token by token with the most frequent
follower, for at most ``factor · p`` tokens and while the draft's estimated probability D (the product of the
followers' shares) stays above a threshold. Of all p, and of text and corpus, the draft of the largest
expected number of accepted tokens ΣD is proposed; the paper's tree of continuations is a chain here.

The counts are in a suffix automaton (Blumer et al. 1985), the minimal automaton of all substrings: a state is a
set of substrings that end at the same places, so one number counts them all, and the suffixes of the text are
one chain of links.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from specforge.contracts import CapturePolicy
from specforge.decoding.drafters import Features
from specforge.decoding.verify import Proposal, Sampling

# Between the texts of a corpus; not a token, so nothing matches across it and it is never drafted.
_END = -1


class SuffixAutomaton:
    """Occurrences of every substring of a growing text.

    State 0 is the empty string. A state's substrings are the suffixes of its longest one, ``length`` tokens, that
    are longer than the longest of its link.

    Attributes:
        next: by state, the state of its substrings with one more token.
        link: by state, that of the longest suffix which occurs at other places too; -1 for state 0.
        length: by state, its longest substring.
        count: by state, how often its substrings occur.
        end: by state, how much of the text there was when they last did.
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
        """Lengthen the text."""
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
        """The state of exactly the longest substring of ``state`` and ``token``, split off if it is one of several."""
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
        """Follow another text: the longest suffix of it that occurs in this one.

        Args:
            state: of the longest suffix before ``token``.
            length: of that suffix.
            token: the text's next token.

        Returns:
            State and length of the longest suffix after it.
        """
        while state > 0 and token not in self.next[state]:
            state = self.link[state]
            length = self.length[state]
        if token not in self.next[state]:
            return 0, 0
        return self.next[state][token], length + 1


class Draft(NamedTuple):
    """Drafted tokens, and the sum of their estimated probabilities to be accepted."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0


class SuffixDrafter:
    """Continues the text from how its last tokens went on before.

    Args:
        corpus: earlier answers to learn from as well (see :class:`SuffixAutomaton`); it is shared, not changed.
        factor: α, most tokens to draft for each token of the match; the paper tries 1 to 4.
        threshold: a draft ends before its estimated probability is below this.
        longest: tokens of the longest match.
    """

    capture: CapturePolicy | None = None
    deterministic = True

    def __init__(
        self, corpus: SuffixAutomaton | None = None, factor: float = 4.0, threshold: float = 0.1, longest: int = 64
    ) -> None:
        self.corpus, self.factor, self.threshold, self.longest = corpus, factor, threshold, longest
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
        """The draft of the highest score; of equal ones, that of the longest match in the text itself."""
        best = Draft()
        for automaton, state, length in self._matches():
            draft = self._follow(automaton, state, min(count, int(self.factor * length)))
            if draft.score > best.score:
                best = draft
        return Proposal(best.tokens)

    def _matches(self) -> Iterator[tuple[SuffixAutomaton, int, int]]:
        """Every suffix that occurred before: its automaton, state and length; of a state, only the longest."""
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

    def _follow(self, automaton: SuffixAutomaton, state: int, count: int) -> Draft:
        """The most frequent followers; of equally frequent ones, the latest."""
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
        return Draft(tuple(tokens), score)
