"""Evaluation of a draft: lossless speculative decoding of held-out prompts, compared with drafters without training.

1. The target answers every prompt by plain decoding, once; the answers are cached (EvalCache).
2. Every method decodes every prompt in ``dtype``. τ is pooled, with an interval clustered by prompt. Greedy output must
   equal the reference token for token.
3. Offline τ is computed by replaying the same rounds over the reference answers.
4. Some prompts are decoded one at a time in ``speed_dtype`` and timed, the methods in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeVar

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
from specforge.eval.tau import Rounds, Tau, pooled_tau, speedup
from specforge.inference.target_engine import Engine, engine_class, engine_config, engine_summary, on_device
from specforge.inference.target_engine.hf import HFTargetEngine, can_roll_back
from specforge.inference.target_files import TargetFiles, torch_dtype
from specforge.inference.target_head import TargetHead
from specforge.options import Dtype, NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveShare, Seed

# Two logits whose relative difference is below this are a tie in fp32: which one is larger depends on the shape of the
# matrix product that computed them.
_TIE = 1e-6
_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class EvaluateOptions:
    """How a draft is evaluated.

    Args:
        gamma: tokens drafted per round.
        max_new_tokens: maximum number of tokens of an answer.
        temperature: sampling temperature; 0 for greedy decoding.
        top_p: nucleus sampling: sample from the smallest set of tokens with this total probability.
        top_k: sample from the K most likely tokens; 0 for all.
        draft_sampling: when the target samples, draft from the draft's distribution, or always its most likely token.
        seed: random seed for sampling.
        dtype: compute dtype of the correctness check and of tau.
        speed_dtype: compute dtype of the timed runs.
        speed_prompts: number of prompts that are timed, one at a time; 0 skips timing.
        batch_size: number of prompts decoded together, except in the timed runs.
        device: cpu, cuda, cuda:N or auto.
        engine: what runs the target; only hf (transformers, on one device), because drafts are decoded against its
            model in this process; `specforge bench` measures servers.
        baselines: baselines to run as well: none, ngram, suffix (default: all).
    """

    gamma: PositiveInt = 4
    max_new_tokens: PositiveInt = 128
    temperature: NonNegativeFloat = 0.0
    top_p: PositiveShare = 1.0
    top_k: NonNegativeInt = 0
    draft_sampling: Literal["probabilistic", "deterministic"] = "probabilistic"
    seed: Seed = 0
    dtype: Dtype = "float32"
    speed_dtype: Dtype = "bfloat16"
    speed_prompts: NonNegativeInt = 8
    batch_size: PositiveInt = 32
    device: str = "auto"
    engine: Engine = HFTargetEngine
    baselines: list[str] | None = None

    @property
    def sampling(self) -> Sampling:
        """How the target chooses tokens."""
        return Sampling(self.temperature, self.top_p, self.top_k)


@dataclass
class MethodResult:
    """One row of the table, and of ``evaluation.json``.

    Attributes:
        method: name of the baseline, or the algorithm.
        prompts: number of prompts decoded.
        tokens: tokens committed, the first of each answer excluded.
        rounds: verification passes of the target.
        tau: measured acceptance length.
        tau_ci95: its 95 % interval, clipped at 1; None for a single prompt.
        offline_tau: acceptance length of the same method replayed over the reference answers.
        acceptance_per_position: P(position k accepted | all before it accepted).
        tokens_per_second: speed of single prompts; None if nothing is timed, like all fields about speed.
        speedup: speed relative to plain decoding.
        speedup_ci95: its 95 % interval over prompts; None for a single prompt.
        lossless: whether every answer equals the target's, ties excepted; None when sampling.
        identical: answers identical to the target's.
        ties: answers that first differ where two logits tie.
        speed_identical: timed answers identical to those of plain decoding.
    """

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
    speedup_ci95: list[float] | None
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


class _Speed(NamedTuple):
    tokens_per_second: float
    speedup: Tau
    identical: int


def check_engine(engine: Engine) -> None:
    """Reject an engine that drafts cannot be decoded against.

    Raises:
        UserError: it is not transformers, or spreads the target over several devices.
    """
    if not issubclass(engine_class(engine), HFTargetEngine):
        raise UserError(
            f"evaluate: decodes drafts against the target's model in this process, so only --engine hf works, not "
            f"{engine_summary(engine)}; `specforge bench` measures servers"
        )
    if engine_config(engine)["init_args"].get("device_map") is not None:
        raise UserError("evaluate: needs the target on one device; leave --engine.device_map out")


@dataclass(eq=False)
class Evaluation:
    """Evaluates one draft against one target."""

    target: TargetFiles  # the frozen target
    module: Any  # the draft's module, in eval mode
    end_ids: Sequence[int]  # tokens that end an answer
    tokenizer_fingerprint: str  # part of the cache key
    cache: EvalCache  # stores reference answers
    options: EvaluateOptions  # how to evaluate; the device must be one that PyTorch knows
    log: Callable[[str], None] = lambda text: None  # called with a line of text when a step begins
    # Called with the number of decoded prompts and their total, over all methods.
    progress: Callable[[int, int], None] = lambda done, total: None
    corpus: Sequence[Sequence[int]] = ()  # earlier answers that suffix decoding may draft from

    def __post_init__(self) -> None:
        self._done = self._total = 0
        self._engines: dict[str, HFTargetEngine] = {}
        self._heads: dict[str, TargetHead] = {}

    def run(self, prompts: Sequence[Sequence[int]]) -> list[MethodResult]:
        """Evaluate on prompts; returns the rows of the baselines, then that of the draft.

        Raises:
            UserError: there are no prompts, or one is too long for the target.
        """
        if not prompts:
            raise UserError("evaluate: there are no prompts")
        self._check_lengths(prompts)
        methods, timed = self._methods(), self._timed(prompts)
        decoded = len(methods) - self.options.sampling.greedy  # the references are plain greedy decoding
        self._done, self._total = 0, len(prompts) * (1 + decoded) + len(timed) * len(methods)
        references = self._references(prompts)
        self._advance(len(prompts) - self._done)  # those that were cached
        speeds = self._time(methods, timed)
        return [self._row(method, references, speeds.get(method.name)) for method in methods]

    def _advance(self, prompts: int) -> None:
        self._done += prompts
        self.progress(self._done, self._total)

    def _check_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        limit, change = self.target.max_positions, self.target.positions_change_at
        room = self.options.max_new_tokens + self.options.gamma
        for prompt in prompts:
            longest = len(prompt) + room
            if limit is not None and longest > limit:
                raise UserError(
                    f"evaluate: a prompt has {longest} tokens with its answer, but {self.target.name} has {limit} "
                    "positions; use shorter prompts or a smaller --max_new_tokens"
                )
            if change is not None and len(prompt) <= change < longest:
                raise UserError(
                    f"evaluate: a prompt has {longest} tokens with its answer, but {self.target.name} re-encodes all "
                    f"positions beyond {change} tokens, so cached states no longer match; use shorter prompts or a "
                    "smaller --max_new_tokens"
                )

    def _methods(self) -> list[_Method]:
        gamma, sampling, module = self.options.gamma, self.options.sampling, self.module
        deterministic = self.options.draft_sampling == "deterministic"

        def baseline(name: str, make: Callable[[], Drafter]) -> _Method:
            return _Method(name, lambda dtype: make, lambda r: text_rounds(make, r, gamma))

        def offline(reference: Reference) -> Rounds:
            head = self._head(self.options.dtype)
            return draft_rounds(module, head, reference, gamma, sampling, deterministic)

        def trained(dtype: str) -> Callable[[], Drafter]:
            def make() -> Drafter:
                drafter = module.drafter(self._head(dtype), torch_dtype(dtype))
                drafter.deterministic = deterministic
                return drafter  # type: ignore[no-any-return]

            return make

        found = baselines(self.corpus, self.options.baselines)
        return [*(baseline(name, make) for name, make in found.items()), _Method(module.algorithm, trained, offline)]

    def _engine(self, dtype: str) -> HFTargetEngine:
        if dtype not in self._engines:
            engine: Any = on_device(self.options.engine, self.options.device)(self.target, dtype)
            engine.check(self.module.spec.capture)
            self._engines[dtype] = engine
            if not can_roll_back(engine.model):
                self.log(
                    f"{self.target.name} has states that cannot be rolled back: every round reads the whole text, so "
                    "the speed does not predict that of a server"
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
        engine = engine_summary(options.engine)  # with its options, if any is set
        key = EvalKey(
            self.target.fingerprint,
            self.tokenizer_fingerprint,
            self.module.spec.capture,
            options.dtype,
            torch.device(options.device).type,
            (torch.__version__, transformers.__version__, *([] if engine == "hf" else [engine])),
            tuple(self.end_ids),
            options.max_new_tokens,
            options.sampling,
            options.seed,
        )
        return self.cache.get(key, prompts, lambda: self._produce(prompts, self.module.spec.capture))

    def _produce(self, prompts: Sequence[Sequence[int]], capture: CapturePolicy) -> list[Reference]:
        self.log(f"the target answers {len(prompts)} prompts by plain decoding")
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
        """Run batches of prompts of similar length, each with its own seed; results are in the order of the prompts."""
        found: dict[int, _T] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self.options.batch_size):
            part = order[start : start + self.options.batch_size]
            results = run([prompts[i] for i in part], self.options.seed + start)
            found |= dict(zip(part, results, strict=True))
            self._advance(len(part))
        return [found[i] for i in range(len(prompts))]

    def _row(self, method: _Method, references: Sequence[Reference], speed: _Speed | None) -> MethodResult:
        plain = method.name == "none"
        if plain and self.options.sampling.greedy:  # the references are plain greedy decoding
            decoded = [Decoded(tokens=r.answer, rounds=len(r.answer) - 1) for r in references]
        else:
            self.log(f"{method.name}: decoding {len(references)} prompts in {self.options.dtype}")
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
            tau_ci95=_bounds(tau),
            offline_tau=pooled_tau([method.offline(r) for r in references]).value,
            acceptance_per_position=[float(a / max(1, d)) for a, d in zip(accepted, drafted, strict=True)],
            tokens_per_second=speed.tokens_per_second if speed else None,
            speedup=speed.speedup.value if speed else None,
            speedup_ci95=_bounds(speed.speedup) if speed else None,
            lossless=None if identical is None or ties is None else identical + ties == len(references),
            identical=identical,
            ties=ties,
            speed_identical=speed.identical if speed else None,
        )

    def _decode(
        self,
        dtype: str,
        factory: Callable[[], Drafter],
        prompts: Sequence[Sequence[int]],
        seed: int,
        max_new_tokens: int | None = None,
    ) -> list[Decoded]:
        options = self.options
        return decode(
            self._engine(dtype).model,
            factory,
            prompts,
            gamma=options.gamma,
            max_new_tokens=max_new_tokens or options.max_new_tokens,
            end_ids=self.end_ids,
            sampling=options.sampling,
            seed=seed,
        )

    def _decode_all(self, method: _Method, references: Sequence[Reference]) -> list[Decoded]:
        dtype, factory = self.options.dtype, method.make(self.options.dtype)
        return self._by_length(
            [r.prompt for r in references], lambda part, seed: self._decode(dtype, factory, part, seed)
        )

    def _compare(self, decoded: Sequence[Decoded], references: Sequence[Reference]) -> tuple[int, int]:
        """Numbers of answers that are identical to the target's, and that first differ from them at a tie."""
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
        """Whether ``other`` and the reference's token at ``position`` both have the target's highest logit."""
        engine = self._engine(self.options.dtype)
        ids = torch.tensor([[*reference.prompt, *reference.answer[:position]]], device=engine.device)
        logits: Tensor = engine.model(input_ids=ids, logits_to_keep=1).logits[0, -1].double()
        best = logits.max()
        chosen = logits[[other, reference.answer[position]]]
        return bool((best - chosen <= _TIE * best.abs().clamp(min=1.0)).all())

    def _timed(self, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The prompts to time, spread evenly over all prompts."""
        count = min(self.options.speed_prompts, len(prompts))
        return [prompts[i] for i in np.linspace(0, len(prompts) - 1, count, dtype=int)]

    def _time(self, methods: Sequence[_Method], prompts: Sequence[Sequence[int]]) -> dict[str, _Speed]:
        """Speed of each method on single prompts, the methods in turn."""
        if not prompts:
            return {}
        dtype, seed = self.options.speed_dtype, self.options.seed
        self.log(f"timing {len(prompts)} prompt{'s' * (len(prompts) != 1)}, one at a time, in {dtype}")
        factories = {m.name: m.make(dtype) for m in methods}
        names, runs = list(factories), []
        for name in names:
            self._decode(dtype, factories[name], prompts[:1], seed, _WARM_UP_TOKENS)
        for number, prompt in enumerate(prompts, 1):
            order = [names[(number + shift) % len(names)] for shift in range(len(names))]
            runs.append({name: self._decode(dtype, factories[name], [prompt], seed)[0] for name in order})
            self._advance(len(names))
        counts = {name: np.array([(run[name].counted, run[name].seconds) for run in runs]) for name in names}
        found = {}
        for name in names:
            tokens, seconds = counts[name].sum(0)
            same = sum(run[name].tokens == run["none"].tokens for run in runs)
            found[name] = _Speed(tokens / max(seconds, 1e-9), speedup(counts[name], counts["none"]), same)
        return found


def _bounds(tau: Tau) -> list[float] | None:
    return [tau.low, tau.high] if tau.low == tau.low else None  # NaN: a single prompt has no interval


def as_json(results: Sequence[MethodResult], run: dict[str, Any]) -> dict[str, Any]:
    """The content of ``evaluation.json``."""
    return {"run": run, "methods": [asdict(result) for result in results]}
