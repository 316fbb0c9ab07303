"""What a draft really earns: lossless speculative decoding on held-out prompts, beside drafters without training.

1. The target's own answers are generated once, plainly, and kept (EvalCache).
2. Every method decodes every prompt in ``dtype``; τ is pooled, its interval clustered by prompt. Greedy output
   must be the reference, token for token.
3. Offline τ of the same rounds is replayed over the reference answers.
4. Some prompts are decoded one at a time in ``speed_dtype``, the methods in turn, and timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from specforge.contracts import CapturePolicy
from specforge.decoding.decoder import Decoded, decode
from specforge.decoding.drafters import Drafter
from specforge.decoding.verify import Sampling
from specforge.errors import UserError
from specforge.eval.baselines import baselines
from specforge.eval.cache import EvalCache, EvalKey, Reference
from specforge.eval.offline import draft_rounds, text_rounds
from specforge.eval.tau import Rounds, Tau, pooled_tau
from specforge.inference.target_engine.hf import HFTargetEngine, can_take_back
from specforge.inference.target_files import TargetFiles, torch_dtype
from specforge.inference.target_head import TargetHead

# Two logits closer than this, relative to their size, are a tie in fp32: which is larger depends on the shape
# of the matrix product that computed them.
_TIE = 1e-6


@dataclass(frozen=True)
class EvaluateOptions:
    """How a draft is evaluated.

    Args:
        gamma: tokens drafted a round.
        max_new_tokens: most tokens of an answer.
        sampling: how the target chooses tokens.
        seed: of samples and coins.
        dtype: compute dtype of the comparison with the target's own output.
        speed_dtype: compute dtype of the timed runs.
        speed_prompts: prompts that are timed; 0 times nothing.
        batch_size: prompts decoded in lockstep, except where they are timed.
        device: where the target runs.
        draft_sampling: where the target samples, draft from the draft's own distribution (``probabilistic``), or its
            likeliest token (``deterministic``).
        corpus: earlier answers that suffix decoding may draft from.
        baselines: which of them are shown beside the draft; all by default.
    """

    gamma: int = 4
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    dtype: str = "float32"
    speed_dtype: str = "bfloat16"
    speed_prompts: int = 8
    batch_size: int = 32
    device: str = "cpu"
    draft_sampling: Literal["probabilistic", "deterministic"] = "probabilistic"
    corpus: Sequence[Sequence[int]] = ()
    baselines: Sequence[str] | None = None


@dataclass
class MethodResult:
    """One row of the table; the fields of ``evaluation.json``."""

    method: str
    prompts: int
    tokens: int
    rounds: int
    tau: float
    tau_ci95: list[float] | None
    offline_tau: float
    acceptance_per_position: list[float]
    tokens_per_second: float | None
    speedup: float | None
    lossless: bool | None
    identical: int | None
    ties: int | None
    speed_identical: int | None


_T = TypeVar("_T")


@dataclass(frozen=True)
class _Method:
    name: str
    make: Callable[[str], Callable[[], Drafter]]  # dtype -> factory
    offline: Callable[[Reference], Rounds]


class Evaluation:
    """Evaluates one draft against one target.

    Args:
        target: the frozen target.
        module: the draft's module, in eval mode.
        end_ids: tokens that end an answer.
        tokenizer_fingerprint: part of the cache's key.
        cache: keeps reference answers.
        options: how.
        progress: called with a line of text when a step begins.
    """

    def __init__(
        self,
        target: TargetFiles,
        module: Any,
        end_ids: Sequence[int],
        tokenizer_fingerprint: str,
        cache: EvalCache,
        options: EvaluateOptions,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.target, self.module, self.end_ids = target, module, list(end_ids)
        self.tokenizer_fingerprint, self.cache = tokenizer_fingerprint, cache
        self.options, self.progress = options, progress
        self._engines: dict[str, HFTargetEngine] = {}
        self._heads: dict[str, TargetHead] = {}

    def run(self, prompts: Sequence[Sequence[int]]) -> list[MethodResult]:
        """Evaluate on prompts; the baselines' rows, then the algorithm's.

        Raises:
            UserError: there are no prompts, or one is too long for the target.
        """
        if not prompts:
            raise UserError("evaluate: there are no prompts")
        self._check_lengths(prompts)
        references = self._references(prompts)
        methods = self._methods()
        speeds = self._time(methods, prompts)
        return [self._row(method, references, speeds.get(method.name)) for method in methods]

    def _check_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        limit, change = self.target.max_positions, self.target.positions_change_at
        room = self.options.max_new_tokens + self.options.gamma
        for prompt in prompts:
            longest = len(prompt) + room
            if limit is not None and longest > limit:
                raise UserError(f"evaluate: {longest} tokens with the answer, but {self.target.name} ends at {limit}")
            if change is not None and len(prompt) <= change < longest:
                raise UserError(
                    f"evaluate: {longest} tokens with the answer, but beyond {change} {self.target.name} has other "
                    "positions for all of a text, so that no answer across that length is its own; use shorter prompts "
                    "or a smaller --max_new_tokens"
                )

    def _methods(self) -> list[_Method]:
        gamma, sampling, module = self.options.gamma, self.options.sampling, self.module
        deterministic = self.options.draft_sampling == "deterministic"

        def text(name: str, make: Callable[[], Drafter]) -> _Method:
            return _Method(name, lambda dtype: make, lambda r: text_rounds(make, r, gamma))

        def drafted(reference: Reference) -> Rounds:
            head = self._head(self.options.dtype)
            return draft_rounds(module, head, reference, gamma, sampling, deterministic)

        def trained(dtype: str) -> Callable[[], Drafter]:
            def make() -> Drafter:
                drafter = module.drafter(self._head(dtype), torch_dtype(dtype))
                drafter.deterministic = deterministic
                return drafter  # type: ignore[no-any-return]

            return make

        found = [text(name, make) for name, make in baselines(self.options.corpus, self.options.baselines).items()]
        return [*found, _Method(module.algorithm, trained, drafted)]

    def _engine(self, dtype: str) -> HFTargetEngine:
        if dtype not in self._engines:
            engine = HFTargetEngine(self.target, dtype, self.options.device)
            engine.check(self.module.spec.capture)
            self._engines[dtype] = engine
            if not can_take_back(engine.model):
                self.progress(
                    f"{self.target.name} has states that cannot be taken back: each round reads the whole text, so "
                    "that tokens/s say nothing of a server"
                )
        return self._engines[dtype]

    def _head(self, dtype: str) -> TargetHead:
        if dtype not in self._heads:
            head = TargetHead.load(self.target, torch_dtype(dtype))
            self._heads[dtype] = head.to(torch.device(self.options.device))
        return self._heads[dtype]

    def _references(self, prompts: Sequence[Sequence[int]]) -> list[Reference]:
        import transformers

        options = self.options
        key = EvalKey(
            self.target.fingerprint,
            self.tokenizer_fingerprint,
            self.module.spec.capture,
            options.dtype,
            torch.device(options.device).type,
            (torch.__version__, transformers.__version__),
            tuple(self.end_ids),
            options.max_new_tokens,
            options.sampling,
            options.seed,
        )
        return self.cache.get(key, prompts, lambda: self._produce(prompts, self.module.spec.capture))

    def _produce(self, prompts: Sequence[Sequence[int]], capture: CapturePolicy) -> list[Reference]:
        self.progress(f"the target answers {len(prompts)} prompts plainly")
        options = self.options
        engine = self._engine(options.dtype)

        def answer(part: list[Sequence[int]], seed: int) -> list[Reference]:
            answers = engine.generate(
                part,
                max_new_tokens=options.max_new_tokens,
                end_ids=self.end_ids,
                temperature=options.sampling.temperature,
                top_p=options.sampling.top_p,
                top_k=options.sampling.top_k,
                seed=seed,
            )
            features = engine.capture([[*p, *a] for p, a in zip(part, answers, strict=True)], capture)
            return [Reference(list(p), a, x) for p, a, x in zip(part, answers, features, strict=True)]

        return self._by_length(prompts, answer)

    def _by_length(
        self, prompts: Sequence[Sequence[int]], run: Callable[[list[Sequence[int]], int], list[_T]]
    ) -> list[_T]:
        """Run prompts of similar length together, each batch with a seed of its own; results in the given order."""
        found: dict[int, _T] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self.options.batch_size):
            part = order[start : start + self.options.batch_size]
            results = run([prompts[i] for i in part], self.options.seed + start)
            found |= dict(zip(part, results, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _row(
        self, method: _Method, references: Sequence[Reference], speed: tuple[float, float, int] | None
    ) -> MethodResult:
        plain = method.name == "none"
        if plain and self.options.sampling.greedy:
            # The reference *is* plain greedy decoding.
            decoded = [Decoded(tokens=r.answer, rounds=len(r.answer) - 1) for r in references]
        else:
            self.progress(f"{method.name}: decoding {len(references)} prompts in {self.options.dtype}")
            decoded = self._decode_all(method, references)
        rounds = [Rounds(d.counted, d.rounds) for d in decoded]
        tau = Tau(1.0, 1.0, 1.0) if plain else pooled_tau(rounds)
        drafted, accepted = (
            [] if plain else np.array(counts).sum(0)
            for counts in ([d.drafted for d in decoded], [d.accepted for d in decoded])
        )
        identical = ties = None
        if self.options.sampling.greedy:
            identical, ties = self._compare(decoded, references)
        return MethodResult(
            method=method.name,
            prompts=len(references),
            tokens=int(sum(r.tokens for r in rounds)),
            rounds=int(sum(r.rounds for r in rounds)),
            tau=tau.value,
            tau_ci95=[tau.low, tau.high] if tau.low == tau.low else None,  # NaN: one prompt has none
            offline_tau=pooled_tau([method.offline(r) for r in references]).value,
            acceptance_per_position=[float(a / max(1, d)) for a, d in zip(accepted, drafted, strict=True)],
            tokens_per_second=speed[0] if speed else None,
            speedup=speed[1] if speed else None,
            lossless=None if identical is None or ties is None else identical + ties == len(references),
            identical=identical,
            ties=ties,
            speed_identical=speed[2] if speed else None,
        )

    def _decode_all(self, method: _Method, references: Sequence[Reference]) -> list[Decoded]:
        options = self.options
        engine, factory = self._engine(options.dtype), method.make(options.dtype)

        def answer(part: list[Sequence[int]], seed: int) -> list[Decoded]:
            return decode(
                engine.model,
                factory,
                part,
                gamma=options.gamma,
                max_new_tokens=options.max_new_tokens,
                end_ids=self.end_ids,
                sampling=options.sampling,
                seed=seed,
            )

        return self._by_length([r.prompt for r in references], answer)

    def _compare(self, decoded: Sequence[Decoded], references: Sequence[Reference]) -> tuple[int, int]:
        """How many answers are the target's token for token, and how many part from it at a tie."""
        identical = ties = 0
        for answer, reference in zip(decoded, references, strict=True):
            if answer.tokens == reference.answer:
                identical += 1
                continue
            both = zip(answer.tokens, reference.answer, strict=False)
            first = next((i for i, (a, b) in enumerate(both) if a != b), None)
            if first is not None:
                ties += self._is_tie(reference, first, answer.tokens[first])
        return identical, ties

    @torch.inference_mode()
    def _is_tie(self, reference: Reference, position: int, other: int) -> bool:
        """Whether the target may as well choose ``other`` as the reference's token: both are its likeliest."""
        engine = self._engine(self.options.dtype)
        ids = torch.tensor([[*reference.prompt, *reference.answer[:position]]], device=engine.device)
        logits: Tensor = engine.model(input_ids=ids, logits_to_keep=1).logits[0, -1].double()
        best = logits.max()
        chosen = logits[[other, reference.answer[position]]]
        return bool((best - chosen <= _TIE * best.abs().clamp(min=1.0)).all())

    def _time(
        self, methods: Sequence[_Method], prompts: Sequence[Sequence[int]]
    ) -> dict[str, tuple[float, float, int]]:
        """Tokens/s, speed-up and outputs identical to plain decoding, of single prompts, the methods in turn."""
        options = self.options
        if not options.speed_prompts:
            return {}
        chosen = [
            prompts[i] for i in np.linspace(0, len(prompts) - 1, min(options.speed_prompts, len(prompts)), dtype=int)
        ]
        self.progress(f"timing {len(chosen)} prompts one at a time in {options.speed_dtype}")
        engine = self._engine(options.speed_dtype)
        factories = {m.name: m.make(options.speed_dtype) for m in methods}
        tokens, seconds = dict.fromkeys(factories, 0), dict.fromkeys(factories, 0.0)
        same = dict.fromkeys(factories, 0)
        names = list(factories)
        for number, prompt in enumerate([chosen[0], *chosen]):
            outputs = {}
            for shift in range(len(names)):
                name = names[(number + shift) % len(names)]
                result = decode(
                    engine.model,
                    factories[name],
                    [prompt],
                    gamma=options.gamma,
                    max_new_tokens=options.max_new_tokens if number else 8,
                    end_ids=self.end_ids,
                    sampling=options.sampling,
                    seed=options.seed,
                )[0]
                outputs[name] = result.tokens
                if number:  # the first pass only warms up
                    tokens[name] += result.counted
                    seconds[name] += result.seconds
            for name in names:
                same[name] += number > 0 and outputs[name] == outputs["none"]
        rate = {name: tokens[name] / max(seconds[name], 1e-9) for name in names}
        return {name: (rate[name], rate[name] / rate["none"], same[name]) for name in names}


def as_json(results: Sequence[MethodResult], run: dict[str, Any]) -> dict[str, Any]:
    """The content of ``evaluation.json``."""
    return {"run": run, "methods": [asdict(result) for result in results]}
