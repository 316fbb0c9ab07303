"""Losses and gradients of DFlash and D-PACE against the definition written out in block_reference.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_modules.dflash import DFlashModule
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, mask_spans
from specforge.errors import UserError
from specforge.modeling.draft.dflash.plan import plan_blocks, sample_anchors
from tests.lightning_modules.block_reference import BlockReference, dflash_document
from tests.lightning_modules.checks import assert_bf16_gradients_are_close, assert_nothing_leaks_across_documents
from tests.lightning_modules.test_eagle3 import H, V, make_documents, make_head, pack, run, same
from tests.tiny import write_target

SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 5}

EAGLE = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
}


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


def shake(module, draft_vocab: int = V) -> None:
    """Weights in fp64 that no initialisation gives, and a draft vocabulary."""
    module.draft.double()
    for parameter in module.draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    if draft_vocab < V:
        module.draft.set_vocabulary(torch.randperm(V)[:draft_vocab].sort().values)


def make_module(target: Path, draft_vocab: int = V, config: dict | None = None, kind=DFlashModule, **options):
    torch.manual_seed(0)
    fields = {
        "num_hidden_layers": 2,
        "block_size": 5,
        "draft_vocab_size": draft_vocab,
        "head_dim": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }
    options = {"layer_ids": [1, 3, 4], **options}
    module = kind(str(target), draft_config={**fields, **(config or {})}, **options)
    shake(module, draft_vocab)
    return module


def slow(module, reference_class, head, documents, document, **options):
    """Loss, gradients, hits and count of the definition."""
    weights = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in module.draft.state_dict().items()
    }
    reference = reference_class(weights, module.draft.config, head.embedding, head.lm_head, shift=module.draft.shift)
    loss, count, hits = torch.zeros((), dtype=torch.float64), 0, torch.zeros(reference.drafts)
    for d in documents:
        part, rows, right = document(
            reference,
            d.input_ids,
            d.loss_mask,
            d.features[AUX_HIDDEN_STATES],
            d.features[LAST_HIDDEN_STATES],
            **options,
        )
        loss, count, hits = loss + part, count + rows, hits + torch.tensor(right)
    loss.backward()
    gradients = {n: weights[n].grad for n, _ in module.draft.named_parameters() if weights[n].grad is not None}
    return (loss.detach(), gradients, hits.long()), count


@pytest.mark.parametrize(
    ("options", "draft_vocab", "config", "share"),
    [
        ({}, V, {}, 0.7),
        ({"decay": 2.0, "label": "target"}, V, {}, 1.0),
        ({"chunk": 3}, 20, {}, 0.7),
        ({"label": "target"}, 20, {"qk_norm": False}, 0.7),
        ({}, V, SLIDING, 0.9),
        ({}, V, {**SLIDING, "is_causal": False}, 0.9),
        ({"weights": "dpace"}, V, {}, 0.7),
        ({"weights": "dpace", "alpha": 0.2, "chunk": 1}, 20, {}, 0.8),
        ({"weights": "prefix", "chunk": 7}, V, {}, 0.7),
        ({"weights": "continuation"}, 20, {"num_hidden_layers": 1}, 1.0),
    ],
)
def test_loss_gradients_and_hits_are_those_of_the_definition(small_target, options, draft_vocab, config, share):
    module, head = make_module(small_target, draft_vocab, config, **options), make_head()
    documents = make_documents((9, 12, 3, 7, 1, 2), share=share)
    documents[1].loss_mask[:5] = False
    documents[1].spans = mask_spans(documents[1].loss_mask, (12,))
    plain = {name: x for name, x in options.items() if name != "chunk"}
    expected, count = slow(module, BlockReference, head, documents, dflash_document, **plain)
    batch = pack(documents)
    same(run(module, head, [batch]), expected)
    assert module.training_loss(batch, head).num_supervised == count


@pytest.mark.parametrize("weights", ["decay", "dpace"])
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_packed_is_one_by_one(small_target, share, weights):
    module, head = make_module(small_target, weights=weights), make_head()
    documents = make_documents((8, 3, 11, 5), share=share)
    same(run(module, head, [pack(documents)]), run(module, head, documents))


def test_slots_are_counted_as_one_by_one(small_target):
    """Documents of 40, 30 and 20 tokens, blocks of 4: no slot lies in the next document."""
    module, head = make_module(small_target, config={"block_size": 4}, gamma=3), make_head()
    documents = make_documents((40, 30, 20), share=1.0)
    assert module.training_loss(pack(documents), head).rows.tolist() == [90 - 3, 90 - 6, 90 - 9]
    for document in documents:
        document.loss_mask[: document.num_tokens // 4] = False
        document.spans = mask_spans(document.loss_mask, document.lengths)
    supervised = sum(d.num_supervised for d in documents)
    rows = module.training_loss(pack(documents), head).rows.tolist()
    assert rows == [supervised - 3, supervised - 6, supervised - 9]


@pytest.mark.parametrize("weights", ["decay", "dpace"])
def test_padding_chunks_and_order_change_nothing(small_target, weights):
    head = make_head()
    documents = make_documents((8, 3, 11, 5), share=0.8)
    expected = run(make_module(small_target, weights=weights), head, [pack(documents)])
    same(run(make_module(small_target, weights=weights), head, [pack(documents, padding=13)]), expected)
    same(run(make_module(small_target, weights=weights), head, [pack(documents[::-1])]), expected)
    for chunk in (1, 4, 100):
        module = make_module(small_target, weights=weights, chunk=chunk)
        same(run(module, head, [pack(documents)]), expected)


def test_nothing_leaks_across_documents(small_target):
    assert_nothing_leaks_across_documents(make_module(small_target, config=SLIDING))


def test_a_document_without_a_block_gives_nothing(small_target):
    module, head = make_module(small_target), make_head()
    batch = pack(make_documents((2, 1), share=0.0))
    output = module.training_loss(batch, head)
    output.loss.backward()
    assert (output.num_supervised, float(output.loss.detach())) == (0, 0.0)
    assert all(p.grad is not None and not p.grad.any() for p in module.draft.parameters())
    assert module.validation_chains(batch, head, 2).chains == ()


def test_bf16_gradients_are_close_to_fp32(small_target):
    assert_bf16_gradients_are_close(make_module(small_target))


def test_validation_chains_are_the_drafts_greedy_choices(small_target):
    module, head = make_module(small_target), make_head()
    (document,) = make_documents((14,), share=1.0)
    document.loss_mask[:3] = document.loss_mask[9] = False
    document.spans = mask_spans(document.loss_mask, (14,))
    weights = {n: x.detach() for n, x in module.draft.state_dict().items()}
    reference = BlockReference(weights, module.draft.config, head.embedding, head.lm_head)
    chains = module.validation_chains(document, head, 3).chains
    assert len(chains) == len(document.spans) == 2
    for (first, stop), found in zip(document.spans, chains, strict=True):
        expected = np.zeros((stop - first - 1, 3), dtype=bool)
        for start in range(len(expected)):
            drafts = reference.logits(document.input_ids, document.features[AUX_HIDDEN_STATES], first + start)
            for k in range(min(3, len(expected) - start)):
                expected[start, k] = int(drafts[k][2].argmax()) == int(document.input_ids[first + start + 1 + k])
        assert found.tolist() == expected.tolist()


def test_anchors_are_drawn_by_document_and_depend_on_nothing_else():
    lengths, spans = (50, 40, 3), ((5, 30), (35, 50), (60, 90), (92, 93))
    drawn = sample_anchors(lengths, spans, 10, ["a", "b", "c"])
    assert [int((drawn < 50).sum()), len(drawn)] == [10, 20]
    assert len(set(drawn.tolist())) == 20
    assert drawn.tolist() == sorted(drawn.tolist())
    alone = sample_anchors((40,), ((10, 40),), 10, ["b"])
    assert (drawn[10:] - 50).tolist() == alone.tolist()
    assert sample_anchors((40,), ((10, 40),), 10, ["other"]).tolist() != alone.tolist()
    assert sample_anchors((40,), ((10, 40),), 100, ["b"]).tolist() == list(range(10, 39))
    share = np.mean(
        [np.isin(np.arange(10, 39), sample_anchors((40,), ((10, 40),), 10, [str(i)])) for i in range(2000)], 0
    )
    assert np.abs(share - 10 / 29).max() < 0.06  # five standard deviations


def test_anchors_change_with_the_epoch_and_the_seed_alone(small_target):
    head = make_head()
    batch = pack(make_documents((40, 30), share=1.0))
    losses = []
    for seed in (0, 0, 1):
        module = make_module(small_target, anchors=4, anchor_seed=seed)
        torch.manual_seed(len(losses))  # not of the global generator
        losses.append(float(module.training_loss(batch, head).loss))
    assert losses[0] == losses[1] != losses[2]


def test_a_gap_ends_a_contiguous_block_only():
    plans = [plan_blocks((8,), ((1, 4), (5, 8)), np.array([1]), 5, contiguous=c) for c in (False, True)]
    assert [p.labels[: p.count].tolist() for p in plans] == [[2, 3, 5, 6], [2, 3]]


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({}, {"dflash_config": {"mask_token_id": V}}, "mask_token_id is 48, outside"),
        ({}, {"block_size": 1}, "block_size is 1"),
        ({}, {"layer_types": ["sliding_attention"] * 2}, "sliding_window is None"),
        ({}, {**SLIDING, "sliding_window": 4}, "sliding_window is 4"),
        ({}, {"attention_bias": True}, "attention_bias"),
        ({}, EAGLE, "LlamaForCausalLMEagle3 is not a draft of dflash"),
        ({"gamma": 5}, {}, "drafts at most 4"),
        ({"layer_ids": [1, 9]}, {}, "layer 9"),
    ],
)
def test_bad_input_is_refused_by_name(small_target, options, config, message):
    with pytest.raises(UserError, match=message):
        make_module(small_target, config=config, **options)
