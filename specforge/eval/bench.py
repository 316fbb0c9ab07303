"""What a server achieves: speed, acceptance length and agreement with a baseline, by load, length and temperature.

Acceptance length is SpecForge's τ, (tokens - 1) / rounds, not the engine's own figure: vLLM divides accepted tokens,
those past the end of an answer included, by its rounds; SGLang counts the prefill's token. Rounds come from the
counters of each request. Where a server has none, vLLM's counter for all requests gives τ of a whole level, without an
interval and without τ per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from specforge.contracts import content_id
from specforge.errors import UserError
from specforge.eval.served import Answer, Question, Server
from specforge.eval.tau import Rounds, Tau, pooled_tau, speedup
from specforge.options import NonNegativeFloat, PositiveInt

_WARM_UP_TOKENS = 8
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Args:
        concurrency: numbers of requests in flight.
        temperature: sampling temperatures; 0 is greedy decoding, whose answers are compared with the baseline's.
        lengths: prompt lengths in tokens (default: the prompts as they are). Shorter prompts are preceded by the
            prompts before them, longer ones keep their end.
        max_new_tokens: maximum number of tokens of an answer.
    """

    concurrency: list[PositiveInt] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    temperature: list[NonNegativeFloat] = field(default_factory=lambda: [0.0, 1.0])
    lengths: list[PositiveInt] | None = None
    max_new_tokens: PositiveInt = 128


class Case(NamedTuple):
    """One measurement: a prompt set, its prompts' length (None: as they are), a temperature and a load."""

    prompts: str
    length: int | None
    temperature: float
    concurrency: int


@dataclass(frozen=True)
class Spread:
    """Median and percentiles over requests, in milliseconds; NaN without requests."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of times in seconds, interpolated between neighbours."""
        return cls(*(float(x) * 1e3 for x in np.percentile(seconds, _PERCENTILES))) if seconds else cls(*[np.nan] * 3)


@dataclass(frozen=True)
class Speed:
    """Speed of one server under one load.

    Attributes:
        requests: number of answers.
        tokens: number of tokens in them.
        seconds: from the first request to the last token.
        tokens_per_second: output tokens per second over all requests.
        first_token: time from a request to its first token.
        per_token: time per further token of an answer.
    """

    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_token: Spread
    per_token: Spread

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Speed:
        """Of all answers under one load."""
        tokens = sum(len(a.tokens) for a in answers)
        seconds = max(a.started + a.seconds for a in answers) - min(a.started for a in answers)
        per_token = [(a.seconds - a.first) / (len(a.tokens) - 1) for a in answers if len(a.tokens) > 1]
        return cls(
            len(answers),
            tokens,
            seconds,
            tokens / max(seconds, 1e-9),
            Spread.of([a.first for a in answers]),
            Spread.of(per_token),
        )


@dataclass(frozen=True)
class Acceptance:
    """What the server's draft achieves.

    Attributes:
        rounds: verification passes.
        tau: acceptance length.
        tau_ci95: its 95 % interval, clustered by prompt; None for one prompt, or without counters per request.
        per_prompt: tokens (the first of each answer excluded) and rounds of each prompt; None likewise.
    """

    rounds: int
    tau: float
    tau_ci95: list[float] | None = None
    per_prompt: list[Rounds] | None = None

    @classmethod
    def of(cls, prompts: Sequence[int], answers: Sequence[Answer], counted: int | None) -> Acceptance | None:
        """Of the answers to numbered prompts; None if the server drafts nothing, or does not count.

        Args:
            prompts: the prompt of each answer.
            answers: all answers.
            counted: rounds of all answers, in case the server does not count those of a request.
        """
        # An answer of one token has no round, and SGLang then reports none.
        rounds = [0 if a.rounds is None and len(a.tokens) == 1 else a.rounds for a in answers]
        counts = [len(a.tokens) - 1 for a in answers]
        if None in rounds:
            return cls(counted, sum(counts) / counted) if counted else None
        pairs = _by_prompt(prompts, counts, rounds)
        per_prompt = [Rounds(int(tokens), int(n)) for tokens, n in pairs]
        total, tau = sum(p.rounds for p in per_prompt), pooled_tau(per_prompt)
        return cls(int(total), tau.value, _bounds(tau), per_prompt) if total else None


@dataclass(frozen=True)
class Comparison:
    """A server against a baseline that answered the same requests.

    Attributes:
        baseline: its speed.
        speedup: ratio of tokens per second of a request, from when it is sent to its last token, pooled over prompts.
        speedup_ci95: its 95 % interval, clustered by prompt; None for one prompt.
        identical: number of greedy answers that are identical; None when sampling.
    """

    baseline: Speed
    speedup: float
    speedup_ci95: list[float] | None
    identical: int | None

    @classmethod
    def of(
        cls, prompts: Sequence[int], answers: Sequence[Answer], others: Sequence[Answer], greedy: bool
    ) -> Comparison:
        """Of the answers of a server and a baseline to numbered prompts."""
        fast, plain = (
            _by_prompt(prompts, [len(a.tokens) for a in part], [a.seconds for a in part]) for part in (answers, others)
        )
        gain = speedup(fast, plain)
        same = sum(a.tokens == b.tokens for a, b in zip(answers, others, strict=True))
        return cls(Speed.of(others), gain.value, _bounds(gain), same if greedy else None)


@dataclass(frozen=True)
class Level:
    """Results of one case."""

    case: Case
    speed: Speed
    acceptance: Acceptance | None = None
    comparison: Comparison | None = None  # None without a baseline

    def to_json(self) -> dict[str, Any]:
        """As in ``bench.json``."""
        found = asdict(self) | {"case": self.case._asdict()}
        if self.acceptance and self.acceptance.per_prompt:
            found["acceptance"]["per_prompt"] = [
                {**p._asdict(), "tau": p.tokens / p.rounds if p.rounds else None} for p in self.acceptance.per_prompt
            ]
        return found


def _by_prompt(prompts: Sequence[int], first: Sequence[float], second: Sequence[Any]) -> np.ndarray:
    """``[n, 2]`` sums of two values over the answers to each prompt, in the order of the prompts."""
    sums = np.zeros((max(prompts) + 1, 2))
    np.add.at(sums, list(prompts), np.stack([first, second], axis=1))
    return sums


def _bounds(value: Tau) -> list[float] | None:
    return [value.low, value.high] if value.low == value.low else None


def at_length(prompts: Sequence[Sequence[int]], length: int, count: int | None = None) -> list[list[int]]:
    """Prompts of ``length`` tokens that end as the given ones do, or as the first ``count`` of them.

    Raises:
        UserError: all prompts together are shorter.
    """
    total = sum(map(len, prompts))
    if total < length:
        raise UserError(f"--lengths {length}: all prompts together have {total} tokens; name a file with more")
    made = []
    for i in range(len(prompts))[:count]:
        ids: list[int] = []
        for before in range(len(prompts)):
            if len(ids) < length:
                ids = [*prompts[i - before], *ids]
        made.append(ids[-length:])
    return made


@dataclass(eq=False)
class Bench:
    """Measures a server, and a baseline in turn with it."""

    server: Server
    baseline: Server | None
    end_ids: Sequence[int]  # tokens that end an answer
    options: BenchOptions
    salt: str  # differs from run to run, so that no answer profits from prefixes that an earlier run left in a cache
    num_prompts: int | None = None  # only the first ones of each set; all may be used to reach a length

    def cases(self, sets: Mapping[str, Sequence[Sequence[int]]]) -> list[Case]:
        """All measurements, in their order."""
        lengths: Sequence[int | None] = self.options.lengths or [None]
        loads = product(sets, lengths, self.options.temperature, self.options.concurrency)
        return [Case(*case) for case in loads]

    def run(
        self,
        sets: Mapping[str, Sequence[Sequence[int]]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[Level]:
        """Measure every case on every prompt set; ``progress`` is called with the number of finished cases and of all.

        Every prompt is sent at least once. At a high load the prompts are repeated, so that there are at least twice as
        many requests as are in flight.

        Raises:
            UserError: a server refuses a prompt or breaks off, or the prompts are too short for a length, or too long
                for a server.
        """
        cases = self.cases(sets)
        texts = {
            (name, length): sets[name][: self.num_prompts]
            if length is None
            else at_length(sets[name], length, self.num_prompts)
            for name, length, *_ in cases
        }
        self._check_lengths(max(len(prompt) for prompts in texts.values() for prompt in prompts))
        for done, case in enumerate(cases):
            progress(done, len(cases))
            yield self._measure(case, texts[case.prompts, case.length])
        progress(len(cases), len(cases))

    def _check_lengths(self, longest: int) -> None:
        tokens = longest + self.options.max_new_tokens
        for server in filter(None, (self.server, self.baseline)):
            if server.max_length is not None and tokens > server.max_length:
                raise UserError(
                    f"{server}: reads and writes at most {server.max_length} tokens; the longest prompt and "
                    f"--max_new_tokens are {longest} + {self.options.max_new_tokens}"
                )

    def _measure(self, case: Case, prompts: Sequence[Sequence[int]]) -> Level:
        passes = max(1, -(-2 * case.concurrency // len(prompts)))
        numbers = [i for _ in range(passes) for i in range(len(prompts))]
        questions = [
            Question(
                prompts[i],
                self.options.max_new_tokens,
                self.end_ids,
                case.temperature,
                content_id(self.salt, *case, number // len(prompts)),
            )
            for number, i in enumerate(numbers)
        ]
        others = self._load(self.baseline, questions, case)[0] if self.baseline else []
        answers, counted = self._load(self.server, questions, case)
        acceptance = Acceptance.of(numbers, answers, counted)
        comparison = Comparison.of(numbers, answers, others, not case.temperature) if others else None
        return Level(case, Speed.of(answers), acceptance, comparison)

    def _load(self, server: Server, questions: Sequence[Question], case: Case) -> tuple[list[Answer], int | None]:
        """All answers of a server, and how many rounds they took as far as the server counts those of all requests."""
        warm_up = questions[: case.concurrency]
        tokens = min(_WARM_UP_TOKENS, self.options.max_new_tokens)
        server.load(
            [Question(q.prompt, tokens, q.end_ids, q.temperature, "warm-up") for q in warm_up], case.concurrency
        )
        before = server.rounds()
        answers = server.load(questions, case.concurrency)
        after = server.rounds() if before is not None else None
        return answers, None if before is None or after is None else after - before
