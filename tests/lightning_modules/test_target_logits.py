"""Targets whose logits are more than a matrix times a state (bias, cap, factor): losses against the definitions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES
from specforge.decoding.verify import Sampling
from specforge.eval.cache import Reference as Answer
from specforge.eval.offline import draft_rounds
from specforge.inference.target_head import OutputHead, TargetHead
from tests.lightning_modules import test_dflash2, test_domino, test_dspark
from tests.lightning_modules.block_reference import BlockReference, dflash_document
from tests.lightning_modules.eagle3_reference import Reference
from tests.lightning_modules.mtp_reference import MTPReference
from tests.lightning_modules.test_dflash import make_module as make_dflash
from tests.lightning_modules.test_dflash import slow
from tests.lightning_modules.test_eagle3 import STEPS, H, V, make_documents, pack, run, same
from tests.lightning_modules.test_eagle3 import make_module as make_eagle3
from tests.lightning_modules.test_mtp import STEPS as MTP_STEPS
from tests.lightning_modules.test_mtp import make_module as make_mtp
from tests.tiny import write_target


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


class SlowHead:
    """The head token by token: capped logits of the target's states, or a draft's scores with some of its rows."""

    def __init__(self, head: OutputHead) -> None:
        self.head = head

    def __matmul__(self, state: Tensor) -> Tensor:
        cap = self.head.softcap
        scores = torch.stack([row @ state + b for row, b in zip(self.head.weight, self.head.bias, strict=True)])
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def __getitem__(self, ids: Any) -> SlowHead:
        return SlowHead(OutputHead(self.head.weight[ids], self.head.bias[ids]))


def heads(softcap: float | None) -> tuple[TargetHead, Any]:
    """A head, and the same for the slow definitions."""
    g = torch.Generator().manual_seed(1)
    embedding, matrix = (torch.randn(V, H, generator=g, dtype=torch.float64) for _ in range(2))
    output = OutputHead(matrix, 2 * torch.randn(V, generator=g, dtype=torch.float64), softcap)
    return TargetHead(embedding, output, torch.float64), SimpleNamespace(embedding=embedding, lm_head=SlowHead(output))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("loss", "draft_vocab"), [("kl", 20), ("lk_lambda", 20), ("kl", V)])
def test_eagle3_learns_the_targets_distribution(small_target, softcap, loss, draft_vocab):
    module, (head, plain) = make_eagle3(small_target, draft_vocab=draft_vocab, loss=loss), heads(softcap)
    documents = make_documents((9, 12, 3, 7))
    weights = {
        n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in module.draft.state_dict().items()
    }
    reference = Reference(weights, module.draft.config, plain.embedding, plain.lm_head)
    parts = [
        reference.document(
            d.input_ids,
            d.loss_mask,
            d.features[AUX_HIDDEN_STATES],
            d.features[LAST_HIDDEN_STATES],
            steps=STEPS,
            decay=0.8,
            loss=loss,
            label="target",
            topk=10,
            feature_weight=0.0,
        )
        for d in documents
    ]
    total = torch.stack([part[0] for part in parts]).sum()
    total.backward()
    gradients = {n: weights[n].grad for n, _ in module.draft.named_parameters()}
    same(run(module, head, [pack(documents)]), (total, gradients, torch.tensor([p[2] for p in parts]).sum(0)))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_mtp_drafts_with_the_targets_bias(small_target, softcap):
    module, (head, plain) = make_mtp(small_target, loss="kl", label="target"), heads(softcap)
    module.draft.config.norm_output = True
    documents = make_documents((9, 12, 3, 7))
    weights = {
        n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in module.draft.state_dict().items()
    }
    reference = MTPReference(weights, module.draft.config, plain.embedding, plain.lm_head)
    parts = [
        reference.document(
            d.input_ids,
            d.loss_mask,
            d.features[LAST_HIDDEN_STATES],
            steps=MTP_STEPS,
            beta=0.6,
            loss="kl",
            label="target",
        )
        for d in documents
    ]
    total = torch.stack([part[0] for part in parts]).sum()
    total.backward()
    gradients = {n: weights[n].grad for n, _ in module.draft.named_parameters()}
    same(run(module, head, [pack(documents)]), (total, gradients, torch.tensor([p[2] for p in parts]).sum(0)))


BLOCKS = {
    "dflash": (make_dflash, BlockReference, dflash_document, {"label": "target"}),
    "dspark": (test_dspark.make, test_dspark.DSparkReference, test_dspark.document, {}),
    "dflash2": (test_dflash2.make, test_dflash2.DFlash2Reference, test_dflash2.document, {"label": "target"}),
    "domino": (test_domino.make, test_domino.DominoReference, test_domino.document, {"label": "target"}),
}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("draft_vocab", [20, V])
@pytest.mark.parametrize("algorithm", BLOCKS)
def test_block_drafters_use_the_bias_and_learn_what_is_capped(small_target, algorithm, draft_vocab, softcap):
    make, reference, document, options = BLOCKS[algorithm]
    module, (head, plain) = make(small_target, draft_vocab, **options), heads(softcap)
    documents = make_documents((9, 12, 3, 7))
    expected, _ = slow(module, reference, plain, documents, document, **options)
    same(run(module, head, [pack(documents)]), expected)


@pytest.mark.parametrize("algorithm", ["eagle3", "mtp", *BLOCKS])
def test_a_drafter_and_its_replay_make_the_same_tokens(small_target, algorithm):
    """What evaluation replays offline is what the drafter drafts, with the bias in both."""
    make = {"eagle3": make_eagle3, "mtp": make_mtp}.get(algorithm) or BLOCKS[algorithm][0]
    module, (head, _) = make(small_target, draft_vocab=20).eval(), heads(3.0)
    (document,) = make_documents((16,), share=1.0)
    answer = Answer(document.input_ids[:4].tolist(), document.input_ids[4:].tolist(), document.features)
    drafter, rounds, position = module.drafter(head, torch.float64), 0, 1
    drafter.reset()
    drafter.observe([*answer.prompt, answer.answer[0]], {n: x[:4] for n, x in document.features.items()})
    while position < len(answer.answer):
        drafted = drafter.propose(min(2, len(answer.answer) - position), Sampling()).tokens
        right = next((i for i, t in enumerate(drafted) if t != answer.answer[position + i]), len(drafted))
        step = min(right + 1, len(answer.answer) - position)
        place = slice(3 + position, 3 + position + step)
        drafter.observe(answer.answer[position : position + step], {n: x[place] for n, x in document.features.items()})
        position, rounds = position + step, rounds + 1
    assert draft_rounds(module, head, answer, 2, Sampling()).rounds == rounds
