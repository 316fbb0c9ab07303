"""Whether a server runs a draft as it was trained, and which fault explains it if not.

The server answers prompts greedily. The draft is then replayed along each of these answers in SpecForge, on features
that transformers computes, so rounds are comparable even where the two would write different text. If they differ, the
replay is repeated with one suspected fault after another; a fault that reproduces the server's rounds is the likely
cause.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy
from specforge.errors import UserError
from specforge.eval.cache import Reference
from specforge.eval.offline import replay
from specforge.eval.served import Answer, Question, Server
from specforge.inference.target_engine.hf import HFTargetEngine
from specforge.inference.target_files import torch_dtype
from specforge.inference.target_head import TargetHead

_TRIED_ON = 16  # prompts that faults are tried on


@dataclass(frozen=True)
class Fault:
    """A way in which a server may run another draft than the one that was trained.

    Attributes:
        name: in words.
        layers: captured layers that the draft gets instead of its own.
        unnormed: it gets the last layer's output in place of the final norm's.
        late: by how many tokens its features are late; negative: early.
        ids: ``[D]`` target id of every draft id.
        changes: object, attribute and value, for attributes of the network.
    """

    name: str
    layers: tuple[int, ...] | None = None
    unnormed: bool = False
    late: int = 0
    ids: Tensor | None = None
    changes: tuple[tuple[Any, str, Any], ...] = ()


class Trial(NamedTuple):
    """The replay with a fault: rounds over all prompts that it was tried on, and prompts that agree with the server."""

    fault: str
    rounds: int
    agree: int


@dataclass(frozen=True)
class PromptParity:
    """One prompt, in the server and in the module.

    Attributes:
        tokens: length of the server's answer.
        server_rounds: rounds that the server counted.
        rounds: rounds of the replay.
        parts_at: index in the answer of the first token of the first round that differs; None if none does, or if the
            server does not list its rounds.
        server_step: tokens that this round commits in the server.
        step: tokens that it commits in the replay.
        unlikely_at: index of the first token that is not the target's most likely one; None if all are.
        gap: how far that token's logit is below the highest.
    """

    tokens: int
    server_rounds: int
    rounds: int
    parts_at: int | None = None
    server_step: int | None = None
    step: int | None = None
    unlikely_at: int | None = None
    gap: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether the rounds agree, one by one where the server lists them."""
        return self.parts_at is None and self.server_rounds == self.rounds


@dataclass(frozen=True)
class ParityResult:
    """What was found: every prompt, and the trials if any rounds differ, the first one without a fault."""

    prompts: list[PromptParity]
    trials: list[Trial]
    tried_on: int  # prompts of each trial

    @property
    def agrees(self) -> bool:
        """Whether rounds and tokens agree on all prompts."""
        return all(p.agrees and p.unlikely_at is None for p in self.prompts)

    @property
    def causes(self) -> list[Trial]:
        """The faults that come closest to the server's rounds, if any comes closer than the module as it is."""
        most = max((trial.agree for trial in self.trials), default=0)
        as_is = self.trials[0].agree if self.trials else 0
        return [trial for trial in self.trials[1:] if trial.agree == most > as_is]

    def to_json(self) -> dict[str, Any]:
        """As in the file of ``--json``."""
        return {
            "prompts": [{**asdict(p), "agrees": p.agrees} for p in self.prompts],
            "trials": [trial._asdict() for trial in self.trials],
            "tried_on": self.tried_on,
            "causes": [trial.fault for trial in self.causes],
        }


@dataclass(eq=False)
class Parity:
    """Compares a server with a draft module, in eval mode on the device."""

    server: Server
    module: Any
    end_ids: Sequence[int]  # tokens that end an answer
    max_new_tokens: int
    dtype: str  # compute dtype of the replay
    device: str  # one that PyTorch knows
    gamma: int | None = None  # tokens drafted per round; None: as the server says
    log: Callable[[str], None] = lambda text: None  # called with a line of text when a step begins

    def run(self, prompts: Sequence[Sequence[int]]) -> ParityResult:
        """Ask the server, replay, and try faults if the rounds differ.

        Raises:
            UserError: the server drafts nothing, does not count rounds per request, or refuses a prompt.
        """
        self.log(f"{self.server} answers {len(prompts)} prompts")
        answers = [self.server.ask(Question(p, self.max_new_tokens, self.end_ids)) for p in prompts]
        self.gamma = self.gamma or self._gamma(answers)
        self.log(f"{self.module.algorithm}: replaying the answers in {self.dtype}, gamma {self.gamma}")
        replayer = Replayer(self.module, self.dtype, self.device, self.gamma)
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            (steps,) = replayer.steps(prompt, answer.tokens, [Fault("as trained")])
            found.append(PromptParity(**_compared(answer, steps), **replayer.unlikely(prompt, answer.tokens)))
        if all(p.agrees for p in found):
            return ParityResult(found, [], 0)
        order = sorted(range(len(found)), key=lambda i: found[i].agrees)[:_TRIED_ON]
        tried = [(prompts[i], answers[i]) for i in order]
        return ParityResult(found, list(self._trials(replayer, tried)), len(tried))

    def _gamma(self, answers: Sequence[Answer]) -> int:
        if any(a.rounds is None and len(a.tokens) > 1 for a in answers):
            raise UserError(
                f"{self.server}: reports no rounds for a request; start it with a draft, and vLLM also with "
                "--per-request-spec-decode-metrics detailed"
            )
        if getattr(self.server, "is_tree", False):
            raise UserError(f"{self.server}: drafts trees; restart it with --speculative-eagle-topk 1")
        gamma = next((a.gamma for a in answers if a.gamma), None)
        if gamma is None:
            raise UserError(f"{self.server}: does not say how many tokens it drafts; name them with --gamma")
        return gamma

    def _trials(self, replayer: Replayer, tried: Sequence[tuple[Sequence[int], Answer]]) -> Iterator[Trial]:
        faults = [Fault("as trained"), *suspects(self.module)]
        self.log(f"the rounds differ: trying {len(faults) + 2} faults on {len(tried)} prompts")
        yield from _tried(replayer, faults, tried)
        for dtype in ("float32", "bfloat16", "float16"):
            if dtype != self.dtype:
                other = Replayer(self.module, dtype, self.device, replayer.gamma)
                yield from _tried(other, [Fault(f"computed in {dtype}")], tried)
        counts = [len(answer.tokens) - 1 for _, answer in tried]
        nothing = sum(n == answer.rounds for n, (_, answer) in zip(counts, tried, strict=True))
        yield Trial("no drafted token is right: missing or random weights", sum(counts), nothing)


def _tried(
    replayer: Replayer, faults: Sequence[Fault], tried: Sequence[tuple[Sequence[int], Answer]]
) -> Iterator[Trial]:
    rounds, agree = [0] * len(faults), [0] * len(faults)
    for prompt, answer in tried:
        for i, steps in enumerate(replayer.steps(prompt, answer.tokens, faults)):
            rounds[i] += len(steps)
            agree[i] += PromptParity(**_compared(answer, steps)).agrees
    yield from map(Trial, (fault.name for fault in faults), rounds, agree)


class _Emulating(HFTargetEngine):
    """Rounds as a server that computes in the same dtype, whatever that costs on this CPU."""

    emulates = True


class Replayer:
    """Replays a draft along given answers.

    Args:
        module: the draft.
        dtype: compute dtype of the target and the draft.
        device: one that PyTorch knows.
        gamma: tokens drafted per round.
    """

    def __init__(self, module: Any, dtype: str, device: str, gamma: int) -> None:
        self.module, self.gamma, self.dtype = module, gamma, torch_dtype(dtype)
        self.engine = _Emulating(module.target, dtype, device)
        self.head = TargetHead.load(module.target, self.dtype).to(self.engine.device)
        self.reads = module.drafter(self.head, self.dtype).capture

    def steps(self, prompt: Sequence[int], answer: Sequence[int], faults: Sequence[Fault]) -> list[list[int]]:
        """Tokens that each round commits, under each fault; the target runs once."""
        own = self.reads.layer_ids if self.reads else ()
        last = self.module.target.num_layers - 1
        layers = sorted({i for f in faults for i in ((last,) if f.unnormed else f.layers or own)})
        features: dict[str, Tensor] = {}
        if self.reads is not None:
            (features,) = self.engine.capture([[*prompt, *answer]], CapturePolicy(tuple(layers)))
        outputs = dict(zip(layers, features[AUX_HIDDEN_STATES].chunk(len(layers), -1), strict=True)) if layers else {}
        found = []
        for fault in faults:
            given = {LAST_HIDDEN_STATES: outputs[last]} if fault.unnormed else dict(features)
            if own:
                given[AUX_HIDDEN_STATES] = torch.cat([outputs[i] for i in fault.layers or own], dim=-1)
            rows = (torch.arange(len(prompt) + len(answer)) - fault.late).clamp(0, len(prompt) + len(answer) - 1)
            given = {name: x[rows].to(self.engine.device) for name, x in given.items()}
            with _changed(fault.changes):
                drafter = self.module.drafter(self.head, self.dtype)
                if fault.ids is not None:
                    drafter.target_ids = fault.ids
                found.append(replay(drafter, Reference([*prompt], [*answer], given), self.gamma))
        return found

    @torch.inference_mode()
    def unlikely(self, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]:
        """``unlikely_at`` and ``gap`` of an answer, as in :class:`PromptParity`; empty if every token is likeliest."""
        ids = torch.tensor([[*prompt, *answer]], device=self.engine.device)
        logits = self.engine.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        gaps = logits.amax(-1) - logits.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
        position = int((gaps > 0).int().argmax())
        return {"unlikely_at": position, "gap": float(gaps[position])} if gaps[position] > 0 else {}


def _compared(answer: Answer, steps: Sequence[int]) -> dict[str, Any]:
    """Fields of :class:`PromptParity` about rounds."""
    counts = {"tokens": len(answer.tokens), "server_rounds": answer.rounds or 0, "rounds": len(steps)}
    position = 1
    for theirs, ours in zip(answer.steps or (), steps, strict=False):
        if theirs != ours:
            return {**counts, "parts_at": position, "server_step": theirs, "step": ours}
        position += ours
    return counts


@contextmanager
def _changed(changes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes for a while."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def suspects(module: Any) -> list[Fault]:
    """The faults that a server could have with this draft; those that would change nothing are left out."""
    draft, depth = module.draft, module.target.num_layers
    reads = module.drafter(module.target_head(draft.d2t.device), torch.float32).capture
    return [
        *(_layer_faults(reads.layer_ids, depth) if reads and reads.layer_ids else ()),
        *((Fault("the final norm of the target left out", unnormed=True),) if reads and not reads.layer_ids else ()),
        *((Fault("features one token late", late=1), Fault("features one token early", late=-1)) if reads else ()),
        *_vocabulary_faults(draft, module.target.vocab_size),
        *_norm_faults(draft),
        *_rope_faults(draft),
        *_weight_faults(draft),
    ]


def _layer_faults(own: tuple[int, ...], depth: int) -> Iterator[Fault]:
    eagle = (1, depth // 2 - 1, depth - 4)  # what engines take where a config names no layers
    others = {
        "layer ids one too low": tuple(i - 1 for i in own),
        "layer ids one too high": tuple(i + 1 for i in own),
        "layers in ascending order": tuple(sorted(own)),
        "layers in descending order": tuple(sorted(own, reverse=True)),
        "the default layers of the engine": eagle if len(own) == len(eagle) else own,
    }
    for name, layers in others.items():
        if layers != own and min(layers) >= 0 and max(layers) < depth:
            yield Fault(f"{name}: {list(layers)}, not {list(own)}", layers=layers)


def _vocabulary_faults(draft: Any, vocab_size: int) -> Iterator[Fault]:
    ids = draft.target_ids
    plain = torch.arange(len(ids), device=ids.device)
    if not torch.equal(ids, plain):
        yield Fault("vocabulary map (d2t) ignored", ids=plain)
        yield Fault("vocabulary map (d2t) read as target ids", ids=ids - plain)
        yield Fault("vocabulary map (d2t) added twice", ids=(2 * ids - plain).clamp(max=vocab_size - 1))


def _norm_faults(draft: Any) -> Iterator[Fault]:
    for name, words in (("fc_norm", "norms of the captured layers"), ("input_norm", "norm of the features")):
        if getattr(draft, name, None) is not None:
            yield Fault(f"{words} ({name}) left out", changes=((draft, name, None),))
    if hasattr(draft, "norm_output"):
        yield Fault(f"norm_output {not draft.norm_output}", changes=((draft, "norm_output", not draft.norm_output),))
    layers = [x for x in draft.modules() if getattr(x, "reads_embedding", False)]
    if layers:
        other = not layers[0].norm_before_residual
        changes = tuple((layer, "norm_before_residual", other) for layer in layers)
        yield Fault(f"norm_before_residual {other}", changes=changes)


def _rope_faults(draft: Any) -> Iterator[Fault]:
    table = getattr(draft, "rotary", None)
    rope = getattr(draft.config, "rope_parameters", None)
    if table is None or not rope:
        return
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    for name, other in (
        ("RoPE without its scaling", plain),
        ("RoPE with the default theta, 10000", {**plain, "rope_theta": 10000.0}),
    ):
        config = copy.copy(draft.config)
        config.rope_parameters = other
        changed = type(table)(config)
        if changed != table:
            yield Fault(name, changes=((draft, "rotary", changed),))


def _weight_faults(draft: Any) -> Iterator[Fault]:
    weights = list(draft.parameters())
    if any(not torch.equal(x, x.bfloat16().to(x.dtype)) for x in weights):
        changes = tuple((x, "data", x.data.bfloat16().to(x.dtype)) for x in weights)
        yield Fault("the draft's weights rounded to bfloat16, as `specforge export` writes them", changes=changes)


def describe(result: ParityResult, server: str, algorithm: str) -> Iterator[str]:
    """The result in lines of text: one if everything agrees."""
    prompts = result.prompts
    theirs, ours = sum(p.server_rounds for p in prompts), sum(p.rounds for p in prompts)
    counted = sum(p.tokens - 1 for p in prompts)
    if result.agrees:
        tau = counted / max(ours, 1)
        yield (
            f"{server} runs the {algorithm} draft as trained: {ours:,} rounds (tau {tau:.4f}) and {counted:,} greedy "
            f"tokens agree on {len(prompts)}/{len(prompts)} prompts"
        )
        return
    same = sum(p.agrees for p in prompts)
    taus = [f"{n:,} (tau {counted / max(n, 1):.4f})" for n in (theirs, ours)]
    yield (
        f"rounds agree on {same}/{len(prompts)} prompts: {server} counts {taus[0]}, "
        f"the draft as trained takes {taus[1]}"
    )
    for number, p in enumerate(prompts):
        if p.parts_at is not None and p.server_step is not None and p.step is not None:
            yield (
                f"rounds part first at token {p.parts_at} of the answer to prompt {number}: the server accepts "
                f"{p.server_step - 1} drafted tokens, the draft as trained has {p.step - 1} right"
            )
            break
    odd = [(number, p) for number, p in enumerate(prompts) if p.unlikely_at is not None]
    if odd:
        number, p = odd[0]
        yield (
            f"the server's answers are not the target's greedy ones on {len(odd)} prompts, first at token "
            f"{p.unlikely_at} of the answer to prompt {number}, whose logit is {p.gap:.3g} below the highest: a "
            "near-tie if that is small, else other weights or settings of the target"
        )
    for trial in result.trials:
        yield f"  {trial.agree}/{result.tried_on} prompts agree, {trial.rounds:,} rounds: {trial.fault}"
    causes = " or ".join(trial.fault for trial in result.causes)
    if not causes:
        yield "likely cause: none of the faults that were tried"
    elif result.causes[0].agree == result.tried_on:
        yield f"likely cause: {causes} (reproduces the server's rounds on all {result.tried_on} prompts)"
    else:
        yield f"likely cause: {causes} (closest to the server, not equal)"
