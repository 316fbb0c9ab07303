"""Verification is lossless: greedy output is the target's own, sampled output has the target's distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lightning_modules.eagle3 import Eagle3Module
from specforge.contracts import AUX_HIDDEN_STATES
from specforge.decoding.decoder import decode
from specforge.decoding.drafters import NGramDrafter, NoDrafter
from specforge.decoding.verify import Proposal, Sampling, verify
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles


@pytest.fixture(scope="module")
def engine(target) -> HFTargetEngine:
    return HFTargetEngine(TargetFiles.find(str(target)), "float32")


@pytest.fixture(scope="module")
def module(target) -> Eagle3Module:
    torch.manual_seed(0)
    return Eagle3Module(str(target), init_from="target", draft_config={"draft_vocab_size": 264}).eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in (3, 11, 6, 20, 2, 9)]


def drafters(module: Eagle3Module) -> dict[str, object]:
    module.draft.start_from_target(module.target)
    head = module.target_head(torch.device("cpu"))
    return {"none": NoDrafter, "ngram": NGramDrafter, "eagle3": lambda: module.drafter(head, torch.float32)}


def plain(engine: HFTargetEngine, prompt: list[int], count: int, ends: tuple[int, ...]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count:
            ids.append(int(engine.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["none", "ngram", "eagle3"])
@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_greedy_output_is_the_targets_own(engine, module, prompts, name, gamma):
    make = drafters(module)[name]
    expected = [plain(engine, p, 24, ()) for p in prompts]
    ends = (expected[1][7], expected[3][2])  # ends inside an answer, wherever they fall in a round
    expected = [plain(engine, p, 24, ends) for p in prompts]
    options = {"gamma": gamma, "max_new_tokens": 24, "end_ids": ends}
    together = decode(engine.model, make, prompts, **options)
    alone = [decode(engine.model, make, [p], **options)[0] for p in prompts[1::2]]
    assert [d.tokens for d in together] == expected
    assert [(d.tokens, d.rounds) for d in alone] == [(d.tokens, d.rounds) for d in together[1::2]]


def test_a_drafter_that_is_always_right_commits_gamma_plus_one_tokens_a_round(engine, prompts):
    answer = plain(engine, prompts[0], 21, ())

    class Oracle(NoDrafter):
        def reset(self):
            self.said = 0

        def observe(self, tokens, features):
            self.said += len(tokens) if self.said else 1

        def propose(self, count, sampling, generator=None):
            return Proposal(tuple(answer[self.said : self.said + count]))

    (decoded,) = decode(engine.model, Oracle, [prompts[0]], gamma=4, max_new_tokens=21, end_ids=())
    assert decoded.tokens == answer
    assert (decoded.counted, decoded.rounds) == (20, 4)
    assert decoded.accepted[:4] == [4, 4, 4, 4]


def random_logits(seed: int, shape: tuple[int, ...], scale: float = 1.5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("draft", ["sampled", "deterministic"])
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.9), Sampling(1.3, top_k=3)])
def test_sampled_output_has_the_targets_distribution(draft, sampling):
    """Chi-square of the first two committed tokens of 8,000 rounds, vocabulary 6, against the exact product."""
    size, rounds = 6, 8_000
    first = sampling.probs(random_logits(1, (1, size)))[0]
    second = sampling.probs(random_logits(2, (size, size)))  # by the first token
    third = random_logits(3, (size, size))
    q_first = sampling.probs(random_logits(4, (1, size)))[0]
    q_second = sampling.probs(random_logits(5, (size, size)))
    g = torch.Generator().manual_seed(6)
    counts = torch.zeros(size, size)
    for _ in range(rounds):
        if draft == "sampled":
            a = int(torch.multinomial(q_first, 1, generator=g))
            b = int(torch.multinomial(q_second[a], 1, generator=g))
            proposal = Proposal((a, b), torch.stack([q_first, q_second[a]]))
        else:
            a = int(q_first.argmax())
            b = int(q_second[a].argmax())
            proposal = Proposal((a, b))
        logits = torch.stack([random_logits(1, (1, size))[0], random_logits(2, (size, size))[a], third[b]])
        verdict = verify(proposal, logits, sampling, g)
        tokens = [*proposal.tokens[: verdict.accepted], verdict.next]
        if len(tokens) == 1:
            tokens.append(int(torch.multinomial(second[tokens[0]], 1, generator=g)))
        counts[tokens[0], tokens[1]] += 1
    expected = first.unsqueeze(1) * second * rounds
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    # Wilson-Hilferty: chi-square is this many normal deviations out; 5 is one in 3.5 million.
    deviations = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviations < 5


def test_acceptance_is_the_overlap_of_the_distributions():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    g = torch.Generator().manual_seed(0)
    accepted = 0
    for _ in range(20_000):
        token = int(torch.multinomial(q, 1, generator=g))
        accepted += verify(Proposal((token,), q[None]), torch.stack([p.log(), p.log()]), Sampling(1.0), g).accepted
    assert accepted / 20_000 == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.02)


def test_ngram_continues_the_latest_occurrence_of_the_longest_suffix():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4, (200,), generator=g).tolist()
    drafter = NGramDrafter(3)
    for end in range(1, 200):
        drafter.observe([tokens[end - 1]], {})
        text = tokens[:end]
        expected: list[int] = []
        for n in (3, 2, 1):
            found = [i for i in range(len(text) - n) if text[i : i + n] == text[-n:]] if end > n else []
            if found:
                expected = text[found[-1] + n : found[-1] + n + 4]
                break
        assert list(drafter.propose(4, Sampling()).tokens) == expected


def test_drafting_computes_what_training_computes(engine, module, prompts):
    """The drafter's chain from every prefix is the training-time unroll's greedy chain."""
    drafters(module)
    head = module.target_head(torch.device("cpu"))
    ids = prompts[3]
    (features,) = engine.capture([ids], module.spec.capture)
    from specforge.contracts import TrainBatch

    batch = TrainBatch(
        torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool), features, (len(ids),), ((0, len(ids)),)
    )
    trained = {
        int(t): row
        for tile in module.draft_logits(batch, head, 3)
        for t, row in zip(tile.labels, tile.logits, strict=True)
    }
    for prefix in range(2, len(ids) - 3):
        drafter = module.drafter(head, torch.float32)
        drafter.reset()
        # Tokens up to `prefix` are committed; the target has processed all but the last of them.
        drafter.observe(ids[: prefix + 1], {AUX_HIDDEN_STATES: features[AUX_HIDDEN_STATES][:prefix]})
        tokens = drafter.propose(1, Sampling()).tokens
        assert tokens[0] == int(trained[prefix + 1][0].argmax())


def test_bad_sampling_options_are_refused():
    from specforge.errors import UserError

    for options in itertools.chain([(-1.0,), (1.0, 0.0), (1.0, 1.0, -1)]):
        with pytest.raises(UserError, match="required: temperature"):
            Sampling(*options)
