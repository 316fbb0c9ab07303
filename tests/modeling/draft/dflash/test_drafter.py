"""Block drafters decode losslessly, as teacher forcing says they do, and with the target's distribution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache

import pytest
import torch

from lightning_modules import algorithms
from lightning_modules.block_family import BlockFamilyModule
from specforge.contracts import AUX_HIDDEN_STATES
from specforge.decoding.decoder import decode
from specforge.decoding.verify import Sampling
from specforge.errors import UserError
from specforge.eval.cache import Reference
from specforge.eval.offline import draft_rounds
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles
from tests.decoding.test_decoding import plain
from tests.lightning_modules.test_mtp_deepseek import memorise

SIZE = {"num_hidden_layers": 2, "block_size": 5}
SLIDING = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 6}
CASES = {
    "dflash": ("dflash", {}),
    "dflash of a part of the vocabulary": ("dflash", {"draft_vocab_size": 100}),
    "dflash with sliding layers": ("dflash", {**SLIDING, "qk_norm": False}),
    "dflash with sliding layers in both directions": ("dflash", {**SLIDING, "is_causal": False}),
    "dspark": ("dspark", {"markov_rank": 8}),
    "dspark, rnn, a part of the vocabulary": (
        "dspark",
        {"markov_rank": 8, "markov_head_type": "rnn", "draft_vocab_size": 100},
    ),
    "domino": ("domino", {"dflash_config": {"gru_hidden_dim": 12, "emb_dim": 8}}),
    "domino, labels in place, a part of the vocabulary": (
        "domino",
        {
            "dflash_config": {"gru_hidden_dim": 12, "emb_dim": 8, "shift_label": False, "pure_draft_prefix_len": 2},
            "draft_vocab_size": 100,
        },
    ),
    "dflash2": ("dflash2", {"dflash_config": {"selector_rank": 8, "selector_top_k": 6}}),
    "dflash2 with sliding layers, a part of the vocabulary": (
        "dflash2",
        {**SLIDING, "dflash_config": {"selector_rank": 8, "conv_kernel_size": 3}, "draft_vocab_size": 100},
    ),
}
SAMPLED = [  # one for each way to draw tokens; the others' layers and vocabularies change nothing in it
    "dflash of a part of the vocabulary",
    "dspark, rnn, a part of the vocabulary",
    "domino, labels in place, a part of the vocabulary",
    "dflash2",
]


@pytest.fixture(scope="module")
def engine(target) -> HFTargetEngine:
    return HFTargetEngine(TargetFiles.find(str(target)), "float32")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in (3, 11, 6, 20, 1, 9)]


@pytest.fixture(scope="module")
def answers(engine, prompts) -> list[list[int]]:
    return [plain(engine, p, 24, ()) for p in prompts]


@pytest.fixture(scope="module")
def trained(target, engine, prompts, answers) -> Callable[[str], BlockFamilyModule]:
    """Drafts that have learnt some of the answers by heart, so that rounds accept some tokens and not others."""

    @cache
    def train(case: str) -> BlockFamilyModule:
        name, config = CASES[case]
        torch.manual_seed(0)
        module = algorithms()[name](str(target), layer_ids=[1, 3, 4], draft_config={**SIZE, **config})
        if len(module.draft.d2t) < 264:
            module.draft.set_vocabulary(torch.tensor(sorted({t for a in answers for t in a} | set(range(100))))[:100])
        memorise(module, engine, [[*p, *a] for p, a in zip(prompts[:4], answers[:4], strict=True)], steps=30)
        return module.eval()

    return train


@pytest.fixture(params=list(CASES))
def module(request, trained):
    return trained(request.param)


@pytest.mark.parametrize("gamma", [1, 4])
def test_greedy_output_is_the_targets_own_in_the_rounds_that_teacher_forcing_says(
    engine, module, prompts, answers, gamma
):
    head = module.target_head(torch.device("cpu"))
    ends = (answers[1][7], answers[3][2])  # ends inside an answer, wherever they fall in a round
    expected = [[*itertools.takewhile(lambda t: t not in ends, a), *[t for t in a if t in ends][:1]] for a in answers]
    options = {"gamma": gamma, "max_new_tokens": 24, "end_ids": ends}
    make = lambda: module.drafter(head, torch.float32)  # noqa: E731
    together = decode(engine.model, make, prompts, **options)
    alone = [decode(engine.model, make, [p], **options)[0] for p in prompts[1::2]]
    assert [d.tokens for d in together] == expected
    assert [(d.tokens, d.rounds) for d in alone] == [(d.tokens, d.rounds) for d in together[1::2]]
    features = engine.capture([[*p, *a] for p, a in zip(prompts, expected, strict=True)], module.spec.capture)
    offline = [
        draft_rounds(module, head, Reference(p, a, f), gamma, Sampling())
        for p, a, f in zip(prompts, expected, features, strict=True)
    ]
    assert [(r.tokens, r.rounds) for r in offline] == [(d.counted, d.rounds) for d in together]
    accepted, counted = sum(sum(d.accepted) for d in together), sum(d.counted for d in together)
    assert 0.1 * counted < accepted < counted  # some drafts are right, some are wrong


def test_validation_says_the_same_rounds(engine, module, prompts, answers):
    from specforge.eval.tau import jump

    head = module.target_head(torch.device("cpu"))
    features = engine.capture([[*prompts[0], *answers[0]]], module.spec.capture)[0]
    reference = Reference(prompts[0], answers[0], features)
    with torch.no_grad():
        (chain,) = module.validation_chains(reference.batch(), head, 3).chains
    assert jump(chain)[0] == draft_rounds(module, head, reference, 3, Sampling())


@pytest.mark.parametrize("module", SAMPLED, indirect=True)
def test_sampled_output_has_the_targets_distribution(engine, module, prompts):
    """Chi-square of the first three tokens of 500 answers, top 3 of each, against the exact product."""
    sampling, rounds, prompt = Sampling(0.8, top_k=3), 500, prompts[1]
    head = module.target_head(torch.device("cpu"))
    make = lambda: module.drafter(head, torch.float32)  # noqa: E731
    counts: dict[tuple[int, ...], int] = {}
    for decoded in decode(
        engine.model, make, [prompt] * rounds, gamma=2, max_new_tokens=4, end_ids=(), sampling=sampling
    ):
        key = tuple(decoded.tokens[:3])
        counts[key] = counts.get(key, 0) + 1
    expected: dict[tuple[int, ...], float] = {(): float(rounds)}
    for _ in range(3):
        longer = {}
        for text, share in expected.items():
            with torch.no_grad():
                p = sampling.probs(engine.model(torch.tensor([[*prompt, *text]])).logits[0, -1:])[0]
            longer |= {(*text, int(t)): share * float(p[t]) for t in p.nonzero().flatten()}
        expected = longer
    assert set(counts) <= set(expected)
    common = {text: share for text, share in expected.items() if share >= 5}
    rest = rounds - sum(common.values())
    chi = sum((counts.get(text, 0) - share) ** 2 / share for text, share in common.items())
    others = rounds - sum(counts.get(text, 0) for text in common)
    freedom = len(common) - 1 + (rest >= 5)
    chi += (others - rest) ** 2 / rest if rest >= 5 else 0.0
    # Wilson-Hilferty: chi-square is this many normal deviations out; 5 is one in 3.5 million.
    assert ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom)) < 5


def test_drafts_depend_on_what_was_committed_alone(engine, module, prompts):
    """A drafter that saw the text in pieces drafts what one drafts that saw it at once."""
    head = module.target_head(torch.device("cpu"))
    ids = prompts[3]
    aux = engine.capture([ids], module.spec.capture)[0][AUX_HIDDEN_STATES]
    drafts = []
    for cuts in ([0, 15], [0, 4, 5, 9, 15]):
        drafter = module.drafter(head, torch.float32)
        for _ in range(2):  # the second time after a reset
            drafter.reset()
            said = 0
            for start, stop in itertools.pairwise(cuts):
                drafter.observe(ids[said : stop + 1], {AUX_HIDDEN_STATES: aux[start:stop]})
                said = stop + 1
                drafts.append(drafter.propose(3, Sampling()).tokens) if stop == 15 else drafter.propose(3, Sampling())
    assert len(set(drafts)) == 1


def test_more_tokens_than_a_block_drafts_are_refused(module, engine, prompts, answers):
    features = engine.capture([[*prompts[0], *answers[0]]], module.spec.capture)[0]
    with pytest.raises(UserError, match="drafts at most"):
        draft_rounds(
            module, module.target_head(torch.device("cpu")), Reference(prompts[0], answers[0], features), 9, Sampling()
        )
