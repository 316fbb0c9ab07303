"""Drafting from the last hidden state (Medusa, Hydra, MTP) is lossless, and earns what replaying its rounds says."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_modules.base import DraftModule
from lightning_modules.medusa import HydraModule, MedusaModule
from lightning_modules.mtp import MTPModule
from specforge.contracts import LAST_HIDDEN_STATES, TrainBatch
from specforge.decoding.decoder import decode
from specforge.decoding.drafters import Drafter
from specforge.decoding.verify import Sampling
from specforge.eval.cache import Reference
from specforge.eval.offline import draft_rounds
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles
from tests.decoding.test_decoding import plain

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine(target) -> HFTargetEngine:
    return HFTargetEngine(TargetFiles.find(str(target)), "float32")


@pytest.fixture(scope="module", params=[MedusaModule, HydraModule, MTPModule])
def module(request, target) -> DraftModule:
    """Drafts near the target, so that they are accepted and rejected alike."""
    torch.manual_seed(0)
    start = {"init_from": "target"} if request.param is MTPModule else {}
    module = request.param(str(target), draft_config={"draft_vocab_size": 200}, **start).eval()
    module.draft.set_vocabulary(torch.randperm(264)[:200].sort().values)
    if request.param is MTPModule:
        return module
    module.draft.start_from_target(module.target)
    with torch.no_grad():
        for head in module.draft.heads:
            head.blocks[0].weight.normal_(std=0.1)
    return module


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in (3, 11, 6, 20, 2, 9)]


def make_drafter(module: DraftModule) -> Callable[[], Drafter]:
    head = module.target_head(CPU)
    return lambda: module.drafter(head, torch.float32)


@pytest.mark.parametrize("gamma", [1, 4])
def test_greedy_output_is_the_targets_own_and_offline_tau_is_decoded_tau(engine, module, prompts, gamma):
    expected = [plain(engine, p, 24, ()) for p in prompts]
    ends = (expected[1][7], expected[3][2])
    expected = [plain(engine, p, 24, ends) for p in prompts]
    options = {"gamma": gamma, "max_new_tokens": 24, "end_ids": ends}
    together = decode(engine.model, make_drafter(module), prompts, **options)
    alone = [decode(engine.model, make_drafter(module), [p], **options)[0] for p in prompts[1::2]]
    assert [d.tokens for d in together] == expected
    assert [(d.tokens, d.rounds) for d in alone] == [(d.tokens, d.rounds) for d in together[1::2]]
    assert sum(sum(d.accepted) for d in together) > 0
    for decoded, prompt, answer in zip(together, prompts, expected, strict=True):
        (features,) = engine.capture([[*prompt, *answer]], module.spec.capture)
        rounds = draft_rounds(module, module.target_head(CPU), Reference(prompt, answer, features), gamma, Sampling())
        assert (rounds.tokens, rounds.rounds) == (decoded.counted, decoded.rounds)


def test_drafting_computes_what_training_computes(engine, module, prompts):
    """From every prefix, each drafted token is the choice of the head that training gave that label."""
    head, ids = module.target_head(CPU), prompts[3]
    (features,) = engine.capture([ids], module.spec.capture)
    everything = torch.ones(len(ids), dtype=torch.bool)
    for prefix in range(2, len(ids) - 5):
        drafter = module.drafter(head, torch.float32)
        # Tokens up to `prefix` are committed; the target has processed all but the last of them.
        drafter.observe(ids[: prefix + 1], {LAST_HIDDEN_STATES: features[LAST_HIDDEN_STATES][:prefix]})
        drafted = list(drafter.propose(4, Sampling()).tokens)
        text = torch.tensor([*ids[: prefix + 1], *drafted])
        padded = {LAST_HIDDEN_STATES: features[LAST_HIDDEN_STATES][: len(text)]}
        batch = TrainBatch(text, everything[: len(text)], padded, (len(text),), ((0, len(text)),))
        rows = {
            int(label): row
            for tile in module.draft_logits(batch, head, 4)
            for label, row in zip(tile.labels, tile.logits, strict=True)
        }
        chosen = [int(module.draft.target_ids[rows[prefix + 1 + k][k].argmax()]) for k in range(4)]
        assert drafted == chosen


@pytest.mark.parametrize("module", [MedusaModule, HydraModule], indirect=True)
def test_no_more_tokens_than_heads_are_drafted(engine, module, prompts):
    (decoded,) = decode(engine.model, make_drafter(module), [prompts[0]], gamma=7, max_new_tokens=20, end_ids=())
    assert decoded.tokens == plain(engine, prompts[0], 20, ())
    assert sum(decoded.drafted[4:]) == 0


@pytest.mark.parametrize(
    ("sampling", "deterministic"), [(Sampling(1.0, top_k=8), False), (Sampling(0.7, top_p=0.5), True)]
)
def test_sampled_output_has_the_targets_distribution(engine, module, prompts, sampling, deterministic):
    """Chi-square of the third answer token against the target's exact distribution, over 2,000 decodings.

    The first answer token comes from the prefill; the second and the third are those that a draft has a hand in.
    """
    prompt, runs = prompts[2], 2_000
    head = module.target_head(CPU)

    def drafter() -> Drafter:
        made = module.drafter(head, torch.float32)
        made.deterministic = deterministic
        return made

    counts = torch.zeros(264)
    for start in range(0, runs, 500):
        decoded = decode(
            engine.model, drafter, [prompt] * 500, gamma=2, max_new_tokens=4, end_ids=(), sampling=sampling, seed=start
        )
        counts += torch.bincount(torch.tensor([d.tokens[2] for d in decoded]), minlength=264)
    expected = third_token(engine, prompt, sampling) * runs
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi, freedom = float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    # Wilson-Hilferty: chi-square is this many normal deviations out; 5 is one in 3.5 million.
    deviations = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert freedom >= 3
    assert deviations < 5


@torch.no_grad()
def third_token(engine: HFTargetEngine, prompt: list[int], sampling: Sampling) -> Tensor:
    """Exact distribution ``[V]`` of the third token after a prompt, by enumeration of the first two."""

    def follow(texts: list[list[int]]) -> Tensor:
        parts = torch.tensor(texts).split(1024)
        return torch.cat([sampling.probs(engine.model(part).logits[:, -1]) for part in parts])

    texts, weights = [list(prompt)], torch.ones(1)
    for _ in range(2):
        joint = weights.unsqueeze(1) * follow(texts)
        row, token = joint.nonzero(as_tuple=True)
        texts = [[*texts[i], t] for i, t in zip(row.tolist(), token.tolist(), strict=True)]
        weights = joint[row, token]
    return weights @ follow(texts)
