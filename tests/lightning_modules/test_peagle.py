"""Losses and gradients of the P-EAGLE module against peagle_reference.py; its sampling; its borders."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_modules.peagle import PEagleModule
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, TrainBatch, mask_spans
from specforge.errors import UserError
from specforge.modeling.draft.peagle.plan import DepthSampling, PEaglePlan, plan_peagle
from tests.lightning_modules.peagle_reference import Reference
from tests.lightning_modules.test_eagle3 import H, V, make_documents, make_head, pack, run, same
from tests.tiny import write_target

DEPTHS = 4


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


def make_module(target: Path, draft_vocab: int = 20, config: dict | None = None, **options) -> PEagleModule:
    torch.manual_seed(0)
    fields = {
        "draft_vocab_size": draft_vocab,
        "head_dim": 4,
        "num_hidden_layers": 2,
        "mask_token_id": 7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        **(config or {}),
    }
    module = PEagleModule(str(target), fields, **{"depths": DEPTHS, "keep_ratio": 0.7, **options})
    module.draft.double()
    for parameter in module.draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    module.draft.set_vocabulary(torch.randperm(V)[:draft_vocab].sort().values)
    return module


def named(documents: list[TrainBatch]) -> list[TrainBatch]:
    """Documents with an identity, on which their sampling depends."""
    return [dataclasses.replace(d, sample_ids=(f"d{i}",)) for i, d in enumerate(documents)]


def join(documents: list[TrainBatch], padding: int = 0) -> TrainBatch:
    ids = tuple(name for d in documents for name in d.sample_ids)
    return dataclasses.replace(pack(documents, padding), sample_ids=ids)


def deep_elements(module: PEagleModule, document: TrainBatch) -> list[tuple[int, int]]:
    return elements(module.training_plan(document))


def elements(plan: PEaglePlan) -> list[tuple[int, int]]:
    return [(a, d) for a, d in zip(plan.anchors.tolist(), plan.depths.tolist(), strict=True) if d > 0]


@pytest.mark.parametrize(
    ("options", "draft_vocab", "config", "share"),
    [
        ({}, 20, {}, 0.7),
        ({"label": "data", "keep_ratio": 1.0}, 20, {}, 1.0),
        ({"loss": "ce", "chunk": 3}, 20, {"num_hidden_layers": 1}, 0.8),
        ({"depths": 1, "gamma": 1}, V, {}, 0.7),
        ({}, 20, {"fc_norm": True, "num_hidden_layers": 3}, 0.9),
        ({}, 20, {"embed_requires_grad": True}, 0.9),
        ({}, 20, {"norm_before_residual": True, "attention_bias": True, "num_hidden_layers": 2}, 0.9),
        ({}, 20, {"qk_norm": True, "num_hidden_layers": 2}, 0.9),
    ],
)
def test_loss_gradients_and_hits_are_those_of_the_definition(small_target, options, draft_vocab, config, share):
    module, head = make_module(small_target, draft_vocab, config, **options), make_head()
    documents = named(make_documents((9, 12, 3, 7, 1, 2), share=share))
    documents[1].loss_mask[:5] = False
    documents[1].spans = mask_spans(documents[1].loss_mask, (12,))
    weights = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in module.draft.state_dict().items()
    }
    reference = Reference(weights, module.draft.config, head.embedding, head.lm_head)
    depths = module.depths
    loss, count, hits = torch.zeros((), dtype=torch.float64), 0, torch.zeros(depths)
    for d in documents:
        part, rows, right = reference.document(
            d.input_ids,
            d.loss_mask,
            d.features[AUX_HIDDEN_STATES],
            d.features[LAST_HIDDEN_STATES],
            deep_elements(module, d),
            depths=depths,
            loss=options.get("loss", "kl"),
            label=options.get("label", "target"),
        )
        loss, count, hits = loss + part, count + rows, hits + torch.tensor(right)
    loss.backward()
    grads = {n: weights[n].grad for n, _ in module.draft.named_parameters()}
    if depths == 1:
        assert grads.pop("mask_hidden") is None  # nothing reads it
    batch = join(documents)
    found = run(module, head, [batch])
    found[1].pop("mask_hidden") if depths == 1 else None
    same(found, (loss.detach(), grads, hits.long()))
    assert module.training_loss(batch, head).num_supervised == count
    assert all(float(g.norm()) > 0 for g in grads.values())


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_packed_is_one_by_one(small_target, share):
    module, head = make_module(small_target), make_head()
    documents = named(make_documents((8, 3, 11, 5), share=share))
    same(run(module, head, [join(documents)]), run(module, head, documents))


def test_padding_chunks_and_order_change_nothing(small_target, monkeypatch):
    head = make_head()
    documents = named(make_documents((8, 3, 11, 5), share=0.9))
    expected = run(make_module(small_target), head, [join(documents)])
    same(run(make_module(small_target), head, [join(documents, padding=13)]), expected)
    same(run(make_module(small_target), head, [join(documents[::-1])]), expected)
    same(run(make_module(small_target, chunk=1), head, [join(documents)]), expected)
    for size in (1, 4, 7):  # elements of an attention product; an anchor's are never parted
        monkeypatch.setattr("specforge.modeling.draft.peagle.plan._CHUNK", size)
        same(run(make_module(small_target), head, [join(documents)]), expected)


def test_nothing_leaks_across_documents(small_target):
    module, head = make_module(small_target), make_head()
    first, second = named(make_documents((8, 9), share=1.0))
    alone = run(module, head, [second])
    for name, values in first.features.items():
        first.features[name] = values * 100
    first.input_ids = first.input_ids.flip(0)
    both, other = run(module, head, [join([first, second])]), run(module, head, [first])
    torch.testing.assert_close(both[0] - other[0], alone[0], rtol=1e-6, atol=1e-6, check_dtype=False)


def test_a_batch_without_labels_still_reaches_every_parameter(small_target):
    module, head = make_module(small_target), make_head()
    output = module.training_loss(join(named(make_documents((2, 1), share=1.0))), head)
    assert output.num_supervised == 0
    assert float(output.loss.detach()) == 0.0
    output.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.draft.parameters())


def test_an_empty_batch_runs(small_target):
    module, head = make_module(small_target), make_head()
    (document,) = named(make_documents((1,)))
    features = {name: x[:0] for name, x in document.features.items()}
    empty = TrainBatch(document.input_ids[:0], document.loss_mask[:0], features, (), ())
    output = module.training_loss(empty, head)
    assert output.num_supervised == 0
    output.loss.backward()
    assert module.validation_chains(empty, head, 3) == (0.0, 0, ())


def test_bf16_gradients_are_close_to_fp32(small_target):
    head, module = make_head(), make_module(small_target)
    batch = join(named(make_documents((30, 40))))
    _, exact, _ = run(module, head, [batch])
    module.draft.float()
    batch.features = {name: x.float() for name, x in batch.features.items()}
    with torch.autocast("cpu", torch.bfloat16):
        _, narrow, _ = run(module, head, [batch])
    for name, gradient in exact.items():
        assert (narrow[name] - gradient).norm() / gradient.norm() < 0.06, name


def test_sampling_keeps_the_shares_of_the_paper_without_holes():
    """Sizes by formula, labels supervised, chains whole, documents apart, all elements equally likely."""
    lengths = (30, 50, 3)
    mask = torch.rand(83, generator=torch.Generator().manual_seed(0)) < 0.8
    spans = mask_spans(mask, lengths)
    sampling = DepthSampling(0.7, 0.3)
    begins = np.repeat([0, 30, 80], lengths)
    seen: Counter[tuple[int, int]] = Counter()
    for seed in range(300):
        found = elements(plan_peagle(lengths, spans, 5, sampling=sampling, seeds=(seed, seed + 1000, seed)))
        seen.update(found)
        assert len(set(found)) == len(found)
        for a, d in found:
            assert mask[a + d + 2]
            assert begins[a] == begins[a + d + 2]
            assert d == 1 or (a, d - 1) in found
        for begin, end in ((0, 30), (30, 80)):
            labels = [t for t in range(begin + 2, end) if mask[t]]
            kept = {d: [a + d + 2 for a, e in found if e == d and begin <= a < end] for d in range(5)}
            candidates = labels
            for d in range(1, 5):
                candidates = [t for t in candidates if t - 2 - d >= begin]
                size = int((len(labels) - d) * max(0.7**d, 0.3))
                assert len(kept[d]) == min(size, len(candidates))
                candidates = [t + 1 for t in kept[d] if mask[min(t + 1, 82)] and t + 1 < end]
    first = [seen[a, 1] for a in range(30, 77) if mask[a + 3]]
    assert max(first) - min(first) < 8 * (300 * 0.7 * 0.3) ** 0.5
    everything = elements(plan_peagle(lengths, spans, 5))
    assert set(seen) == set(everything)


def test_sampling_changes_with_the_epoch_and_repeats_within_it(small_target, monkeypatch):
    module = make_module(small_target)
    (document,) = named(make_documents((40,), share=1.0))
    first = deep_elements(module, document)
    assert deep_elements(module, document) == first
    monkeypatch.setattr(PEagleModule, "current_epoch", 1)
    assert deep_elements(module, document) != first


def test_validation_is_deterministic_and_complete(small_target):
    module, head = make_module(small_target), make_head()
    batch = join(named(make_documents((20, 15), share=0.9)))
    a, b = (module.validation_chains(batch, head, 3) for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(a.chains, b.chains, strict=True))
    logits = {
        int(t): row
        for tile in module.draft_logits(batch, head, 3)
        for t, row in zip(tile.labels, tile.logits, strict=True)
    }
    ids = module.draft.draft_ids(batch.input_ids)
    checked = 0
    for (start, _), chain in zip(batch.spans, a.chains, strict=True):
        for s, k in itertools.product(range(len(chain)), range(3)):
            token, anchor = start + 1 + s + k, start + s - 1
            if k < len(chain) - s and anchor >= (0 if start < 20 else 20):
                assert chain[s, k] == (int(logits[token][k].argmax()) == int(ids[token]))
                checked += 1
    assert checked > 50


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"mask_token_id": V}, {}, "mask_token_id is 48, but the target has 48 tokens"),
        ({"mask_token_id": -1}, {}, "mask_token_id is -1"),
        ({"num_hidden_layers": 0}, {}, "num_hidden_layers is 0"),
        ({"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}, {}, "is not a draft of peagle"),
        ({}, {"gamma": 9}, "gamma is 9, but must be from 1 to 8"),
        ({}, {"topk": 0}, "topk must be at least 1, not 0"),
        ({}, {"layer_ids": [1, 2, 99]}, "99"),
    ],
)
def test_bad_options_are_refused(small_target, config, options, message):
    with pytest.raises(UserError, match=message):
        PEagleModule(str(small_target), config, **options)
