"""Losses and gradients of DSpark against its definition."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.dspark import DSparkModule
from specforge.contracts import mask_spans
from specforge.errors import UserError
from tests.lightning_modules.block_reference import BlockReference
from tests.lightning_modules.checks import (
    assert_bf16_gradients_are_close,
    assert_nothing_leaks_across_documents,
    assert_packing_changes_nothing,
)
from tests.lightning_modules.test_dflash import make_module, slow
from tests.lightning_modules.test_eagle3 import H, V, make_documents, make_head, pack, run, same
from tests.tiny import write_target


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


class DSparkReference(BlockReference):
    def corrections(self, tokens: Tensor, anchor: int, states: list[Tensor]) -> list[Tensor | float]:
        w, kind = self.w, self.config.markov_head_type
        memory: Tensor | float = 0.0
        out = []
        for depth, state in enumerate(states[: len(tokens) - anchor]):
            before = w["markov_head.markov_w1.weight"][int(tokens[anchor + depth])]
            if kind == "gated":
                x = torch.cat([state, before])
                z = w["markov_head.gate_proj.weight"] @ x + w["markov_head.gate_proj.bias"]
                before = torch.sigmoid(z) * before
            elif kind == "rnn":
                if depth == 0:
                    memory = torch.zeros_like(before)
                x = torch.cat([memory, before, state])
                z = w["markov_head.joint_proj.weight"] @ x + w["markov_head.joint_proj.bias"]
                gate, candidate, result = z.split(len(before))
                memory = torch.sigmoid(gate) * memory + (1 - torch.sigmoid(gate)) * torch.tanh(candidate)
                before = torch.tanh(result)
            out.append(w["markov_head.markov_w2.weight"] @ before)
        return [*out, *[0.0] * (len(states) - len(out))]


def document(
    reference: DSparkReference, tokens, mask, aux, last, *, decay=4.0, ce=0.1, l1=0.9, confidence=1.0, label="data"
):
    total, count, hits = aux.new_zeros(()), 0, [0] * reference.drafts
    w = reference.w
    for rows in reference.blocks(tokens, mask, aux, contiguous=True):
        for depth, (at, state, _, logits) in rows.items():
            count += 1
            p = (reference.lm_head @ last[at - 1]).softmax(0)
            right = int(tokens[at]) if label == "data" else int(p.argmax())
            if right not in reference.ids:
                continue
            index = reference.ids.index(right)
            q = torch.zeros(V, dtype=p.dtype).index_add(0, torch.tensor(reference.ids), logits.softmax(0))
            distance = (q - p).abs().sum()
            loss = -ce * logits.log_softmax(0)[index] + l1 * distance
            if "confidence_head.proj.weight" in w:
                x = state
                if reference.config.confidence_head_with_markov:
                    x = torch.cat([x, w["markov_head.markov_w1.weight"][int(tokens[at - 1])]])
                c = torch.sigmoid(w["confidence_head.proj.weight"][0] @ x + w["confidence_head.proj.bias"][0])
                aim = (1 - distance / 2).detach()
                loss = loss - confidence * (aim * c.log() + (1 - aim) * (1 - c).log())
            total = total + math.exp(-depth / decay) * loss
            hits[depth] += int(logits.argmax()) == index
    return total, count, hits


CONFIG = {"markov_rank": 6, "block_size": 4}


def make(target, draft_vocab=V, config=None, **options):
    return make_module(target, draft_vocab, {**CONFIG, **(config or {})}, kind=DSparkModule, **options)


@pytest.mark.parametrize(
    ("options", "draft_vocab", "config", "share"),
    [
        ({}, V, {}, 0.7),
        ({"chunk": 3, "label": "target"}, 20, {}, 0.8),
        ({"decay": 2.0}, V, {"markov_head_type": "gated"}, 0.8),
        ({}, 20, {"markov_head_type": "rnn", "confidence_head_with_markov": False}, 0.8),
        ({"ce": 0.0, "l1": 1.0}, V, {"markov_head_type": "rnn", "num_hidden_layers": 1}, 1.0),
        ({"ce": 1.0, "l1": 0.0}, V, {"enable_confidence_head": False}, 0.8),
        ({"confidence": 0.3, "chunk": 1}, V, {}, 1.0),
    ],
)
def test_loss_gradients_and_hits_are_those_of_the_definition(small_target, options, draft_vocab, config, share):
    module, head = make(small_target, draft_vocab, config, **options), make_head()
    documents = make_documents((9, 11, 3, 6, 1, 2), share=share)
    documents[1].loss_mask[:5] = False
    documents[1].spans = mask_spans(documents[1].loss_mask, (11,))
    plain = {name: x for name, x in options.items() if name != "chunk"}
    expected, count = slow(module, DSparkReference, head, documents, document, **plain)
    batch = pack(documents)
    same(run(module, head, [batch]), expected)
    assert module.training_loss(batch, head).num_supervised == count


@pytest.mark.parametrize("kind", ["vanilla", "rnn"])
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_packing_padding_order_and_chunks_change_nothing(small_target, share, kind):
    documents = make_documents((8, 3, 11, 5), share=share)
    assert_packing_changes_nothing(make(small_target, config={"markov_head_type": kind}), documents)


def test_nothing_leaks_across_documents(small_target):
    assert_nothing_leaks_across_documents(make(small_target))


def test_bf16_gradients_are_close_to_fp32(small_target):
    assert_bf16_gradients_are_close(make(small_target))


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({}, {"markov_head_type": "other"}, "markov_head_type is 'other'"),
        ({}, {"markov_rank": 0}, "markov_rank is 0"),
        ({}, {"block_size": 0}, "block_size is 0"),
        ({"gamma": 5}, {}, "drafts at most 4"),
        ({"l1": 0.0, "ce": 0.0}, {}, "ce and l1 are both 0"),
        ({}, {"architectures": ["DFlashDraftModel"]}, "DFlashDraftModel is not a draft of dspark"),
    ],
)
def test_bad_input_is_refused_by_name(small_target, options, config, message):
    with pytest.raises(UserError, match=message):
        make(small_target, config=config, **options)
