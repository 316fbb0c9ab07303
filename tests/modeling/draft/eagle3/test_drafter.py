"""The drafters of the EAGLE family on the tiny target: lossless, as good as evaluation says offline, and resumable."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from lightning_modules.eagle3 import Eagle3Module
from lightning_modules.eagle_family import EagleFamilyModule
from lightning_modules.peagle import PEagleModule
from specforge.contracts import AUX_HIDDEN_STATES
from specforge.decoding.decoder import decode
from specforge.decoding.verify import Sampling
from specforge.eval.cache import Reference
from specforge.eval.offline import draft_rounds
from specforge.eval.tau import Rounds
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles
from tests.modeling.draft.eagle3.test_export import LATENT

SMALL = {"draft_vocab_size": 200}
OPTIONAL = {"norm_before_residual": True, "attention_bias": True}
MAKERS: dict[str, Callable[[str], EagleFamilyModule]] = {
    "eagle3.1": lambda t: Eagle3Module(t, {**SMALL, "fc_norm": True, "norm_output": True}, init_from="target"),
    "norm_before_fc": lambda t: Eagle3Module(t, {**SMALL, "norm_before_fc": True}, init_from="target"),
    "latent": lambda t: Eagle3Module(t, {**SMALL, **LATENT, "norm_output": True}),
    "biases": lambda t: Eagle3Module(t, {**SMALL, **OPTIONAL, "partial_rotary_factor": 0.5}),
    "peagle, biases": lambda t: PEagleModule(t, {**SMALL, **OPTIONAL, "num_hidden_layers": 2}),
    "peagle": lambda t: PEagleModule(t, SMALL, init_from="target"),
    "peagle, own embedding": lambda t: PEagleModule(
        t, {**SMALL, "num_hidden_layers": 2, "embed_requires_grad": True}, init_from="target"
    ),
}
GAMMA = 4


@pytest.fixture(scope="module")
def engine(target) -> HFTargetEngine:
    return HFTargetEngine(TargetFiles.find(str(target)), "float32")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in (3, 11, 6, 20, 2, 9)]


@pytest.fixture(scope="module", params=MAKERS)
def module(request, target) -> EagleFamilyModule:
    torch.manual_seed(0)
    module = MAKERS[request.param](str(target)).eval()
    module.draft.set_vocabulary(torch.randperm(264)[:200].sort().values)
    if module.start is not None:
        module.start(module.target)
    else:  # a random layer between the target's own ends
        module.draft.lm_head.weight.data = module.target.lm_head()[module.draft.target_ids]
        module.draft.fc.weight.data[:, -32:] += torch.eye(32)
    for p in module.draft.parameters():  # away from where the upper layers do nothing
        p.data += 0.02 * torch.randn_like(p)
    return module


@pytest.fixture(scope="module")
def references(engine, module, prompts) -> list[Reference]:
    answers = engine.generate(prompts, max_new_tokens=30, end_ids=[256], temperature=0.0)
    texts = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    features = engine.capture(texts, module.spec.capture)
    return [Reference(list(p), a, f) for p, a, f in zip(prompts, answers, features, strict=True)]


def drafter(module: EagleFamilyModule):
    head = module.target_head(torch.device("cpu"))
    return lambda: module.drafter(head, torch.float32)


@pytest.mark.parametrize("gamma", [1, GAMMA])
def test_greedy_output_is_the_targets_own_and_offline_tau_is_the_decoded_one(
    engine, module, prompts, references, gamma
):
    options = {"gamma": gamma, "max_new_tokens": 30, "end_ids": [256]}
    together = decode(engine.model, drafter(module), prompts, **options)
    alone = [decode(engine.model, drafter(module), [p], **options)[0] for p in prompts[1::2]]
    assert [d.tokens for d in together] == [r.answer for r in references]
    assert [d.tokens for d in alone] == [r.answer for r in references[1::2]]
    head = module.target_head(torch.device("cpu"))
    offline = [draft_rounds(module, head, r, gamma, Sampling()) for r in references]
    assert [Rounds(d.counted, d.rounds) for d in together] == offline
    assert [Rounds(d.counted, d.rounds) for d in alone] == offline[1::2]
    assert sum(d.rounds for d in together) < sum(d.counted for d in together)  # something was accepted


def test_drafting_in_pieces_is_drafting_at_once(module, references):
    """The cache holds what a fresh drafter computes, whatever was drafted and rejected before."""
    reference = references[3]
    text, prompt = [*reference.prompt, *reference.answer], len(reference.prompt)
    features = reference.features[AUX_HIDDEN_STATES]
    grown = drafter(module)()
    grown.observe(text[: prompt + 1], {AUX_HIDDEN_STATES: features[:prompt]})
    for size in range(prompt + 1, len(text)):
        fresh = drafter(module)()
        fresh.observe(text[:size], {AUX_HIDDEN_STATES: features[: size - 1]})
        assert grown.propose(3, Sampling()).tokens == fresh.propose(3, Sampling()).tokens
        grown.observe([text[size]], {AUX_HIDDEN_STATES: features[size - 1 : size]})


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "module", ["eagle3.1", "peagle", "peagle, own embedding"], indirect=True
)  # others: layers only
def test_sampled_output_has_the_targets_distribution(engine, module, deterministic):
    """Chi-square of the three tokens after a prompt, of 600 answers, against the target's exact probabilities."""
    sampling, prompt, count = Sampling(1.0, top_k=3), [7, 70, 9], 600
    made = drafter(module)

    def make():
        one = made()
        one.deterministic = deterministic
        return one

    found: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for start in range(0, count, 300):
        decoded = decode(
            engine.model, make, [prompt] * 300, gamma=2, max_new_tokens=4, end_ids=[], sampling=sampling, seed=start
        )
        found.update(tuple(d.tokens[:3]) for d in decoded)
        accepted += sum(sum(d.accepted) for d in decoded)
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, p in expected.items():
            with torch.no_grad():
                logits = engine.model(torch.tensor([[*prompt, *text]])).logits[0, -1:]
            probs = sampling.probs(logits)[0]
            longer |= {(*text, int(t)): p * float(probs[t]) for t in probs.nonzero().flatten()}
        expected = longer
    assert found.keys() <= expected.keys()
    common = [text for text, p in expected.items() if p * count >= 5]
    rest = count - sum(found[t] for t in common), count * (1 - sum(expected[t] for t in common))
    cells = [(found[t], expected[t] * count) for t in common] + ([rest] if rest[1] > 1 else [])
    chi, freedom = sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1
    deviations = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviations < 5
    assert accepted > 0


def test_a_sampled_proposal_reports_what_it_was_drawn_from(module, references):
    """Each token comes from the reported distribution, which is the draft's own after the sampler."""
    reference = references[1]
    text, sampling = [*reference.prompt, reference.answer[0]], Sampling(0.8, top_k=4)
    one = drafter(module)()
    one.observe(text, {AUX_HIDDEN_STATES: reference.features[AUX_HIDDEN_STATES][: len(text) - 1]})
    proposal = one.propose(3, sampling, torch.Generator().manual_seed(0))
    assert proposal.probs is not None
    assert proposal.probs.shape == (3, 264)
    torch.testing.assert_close(proposal.probs.sum(1), torch.ones(3))
    assert not proposal.probs[:, ~module.draft.t2d].any()
    assert all(proposal.probs[k, t] > 0 for k, t in enumerate(proposal.tokens))
    assert ((proposal.probs > 0).sum(1) <= 4).all()
