"""Losses and gradients of the Medusa and Hydra modules against the definitions written out in heads_reference.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules.loading import load_module
from lightning_modules.medusa import HydraModule, MedusaModule
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, TrainBatch, mask_spans
from specforge.errors import UserError
from tests.lightning_modules.heads_reference import HeadsReference
from tests.lightning_modules.test_eagle3 import V, make_documents, make_head, pack, run, same, small_target

__all__ = ["small_target"]

BOTH = pytest.mark.parametrize("cls", [MedusaModule, HydraModule])
HEADS = 4


def make_module(
    cls: type[MedusaModule], target: Path, draft_vocab: int = 20, config: dict | None = None, **options
) -> MedusaModule:
    torch.manual_seed(0)
    module = cls(str(target), draft_config={"draft_vocab_size": draft_vocab, **(config or {})}, **options)
    module.draft.double()
    for parameter in module.draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if draft_vocab < V:
        module.draft.set_vocabulary(torch.randperm(V)[:draft_vocab].sort().values)
    return module


def documents_of(lengths: tuple[int, ...], share: float = 0.6) -> list[TrainBatch]:
    """Documents without captured layers, which heads do not read."""
    documents = make_documents(lengths, share=share)
    for document in documents:
        del document.features[AUX_HIDDEN_STATES]
    return documents


def mask_prompts(documents: list[TrainBatch]) -> None:
    for document in documents:
        document.loss_mask[: document.num_tokens // 2] = False
        document.spans = mask_spans(document.loss_mask, document.lengths)


@BOTH
@pytest.mark.parametrize(
    ("options", "draft_vocab", "config", "share"),
    [
        ({}, 20, {}, 0.6),
        ({"label": "target", "chunk": 1}, 20, {}, 0.6),
        ({"head_decay": 0.5}, V, {}, 1.0),
        ({"loss": "kl", "chunk": 3}, 20, {"num_head_blocks": 3}, 0.6),
        ({"loss": "tv", "label": "target"}, 20, {"num_head_blocks": 2}, 0.3),
    ],
)
def test_loss_gradients_and_hits_are_those_of_the_definition(small_target, cls, options, draft_vocab, config, share):
    module, head = make_module(cls, small_target, draft_vocab, config, **options), make_head()
    documents = documents_of((9, 12, 3, 7, 1, 2), share=share)
    documents[1].loss_mask[:5] = False
    documents[1].spans = mask_spans(documents[1].loss_mask, (12,))
    weights = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in module.draft.state_dict().items()
    }
    reference = HeadsReference(weights, cls is HydraModule, head.embedding, head.lm_head)
    parts = [
        reference.document(
            d.input_ids,
            d.loss_mask,
            d.features[LAST_HIDDEN_STATES],
            heads=HEADS,
            decay=options.get("head_decay", 0.8),
            loss=options.get("loss", "ce"),
            label=options.get("label", "data"),
        )
        for d in documents
    ]
    loss = torch.stack([part[0] for part in parts]).sum()
    loss.backward()
    losses, hits, rows = (torch.tensor([part[i] for part in parts]).sum(0) for i in (2, 3, 4))
    gradients = {name: weights[name].grad for name, _ in module.draft.named_parameters()}
    batch = pack(documents)
    same(run(module, head, [batch]), (loss.detach(), gradients, hits))
    output = module.training_loss(batch, head)
    assert output.num_supervised == sum(part[1] for part in parts)
    assert output.rows.tolist() == rows.tolist()
    torch.testing.assert_close(output.losses.double(), losses.double(), rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_packed_is_one_by_one(small_target, cls, masked):
    module, head = make_module(cls, small_target), make_head()
    documents = documents_of((8, 3, 11, 5), share=1.0)
    if masked:
        mask_prompts(documents)
    same(run(module, head, [pack(documents)]), run(module, head, documents))


@BOTH
def test_padding_chunks_and_order_change_nothing(small_target, cls):
    head, documents = make_head(), documents_of((8, 3, 11, 5))
    expected = run(make_module(cls, small_target), head, [pack(documents)])
    same(run(make_module(cls, small_target), head, [pack(documents, padding=13)]), expected)
    same(run(make_module(cls, small_target), head, [pack(documents[::-1])]), expected)
    for chunk in (1, 4, 100):
        same(run(make_module(cls, small_target, chunk=chunk), head, [pack(documents)]), expected)


@BOTH
def test_nothing_leaks_across_documents(small_target, cls):
    module, head = make_module(cls, small_target), make_head()
    first, second = documents_of((8, 9), share=1.0)
    alone = run(module, head, [second])
    first.features = {name: x * 100 for name, x in first.features.items()}
    first.input_ids = first.input_ids.flip(0)
    for order in ([first, second], [second, first]):
        both, other = run(module, head, [pack(order)]), run(module, head, [first])
        torch.testing.assert_close(both[0] - other[0], alone[0], rtol=1e-5, atol=1e-4, check_dtype=False)


@BOTH
def test_a_batch_without_supervised_rows_gives_zero_gradients(small_target, cls):
    module, head = make_module(cls, small_target), make_head()
    loss, gradients, hits = run(module, head, [pack(documents_of((2, 1), share=1.0))])
    assert float(loss) == 0.0
    assert hits.tolist() == [0] * HEADS
    assert gradients.keys() == dict(module.draft.named_parameters()).keys()
    assert not any(bool(x.any()) for x in gradients.values())


@BOTH
def test_validation_chains_are_the_heads_greedy_choices(small_target, cls):
    module, head = make_module(cls, small_target), make_head()
    (document,) = documents_of((12,), share=1.0)
    (found,) = module.validation_chains(document, head, 3).chains
    weights = {name: x.detach() for name, x in module.draft.state_dict().items()}
    reference = HeadsReference(weights, cls is HydraModule, head.embedding, head.lm_head)
    tokens, last = document.input_ids, document.features[LAST_HIDDEN_STATES]
    for start in range(1, len(found)):  # the token before the first is unknown: no row can draft for it
        for k in range(min(3, len(found) - start)):
            # Start s follows token s, whose features are not known yet: those of token s - 1 are.
            choice = int(reference.logits(tokens, last[start - 1], start - 1, k).argmax())
            assert found[start, k] == (reference.target_ids[choice] == int(tokens[start + 1 + k]))


@BOTH
def test_heads_start_as_the_targets_own(small_target, cls):
    """At the start every head is the target's next-token head at its hidden state."""
    module = make_module(cls, small_target, config={"num_head_blocks": 2})
    module.draft.start_from_target(module.target)
    hidden: Tensor = torch.randn(5, 16, dtype=torch.float64)
    states = module.draft(hidden, [torch.randn(5, 16, dtype=torch.float64)] * HEADS)
    rows = module.target.lm_head()[module.draft.target_ids].double()
    for k, head in enumerate(module.draft.heads):
        assert torch.equal(states[k], hidden)
        assert torch.equal(head.lm_head.weight, rows)
    module.draft.zero_grad()
    states.sum().backward()
    assert all(bool(head.blocks[0].weight.grad.any()) for head in module.draft.heads)


@BOTH
def test_bad_options_are_refused_by_name(small_target, cls):
    target = str(small_target)
    with pytest.raises(UserError, match="gamma is 5, but the draft has 4 heads"):
        cls(target, gamma=5)
    with pytest.raises(UserError, match="num_head_blocks is 0"):
        cls(target, draft_config={"num_head_blocks": 0})
    with pytest.raises(UserError, match=f"is not a draft of {cls.algorithm}"):
        cls(target, draft_config={"architectures": ["HydraDraft" if cls is MedusaModule else "MedusaDraft"]})
    with pytest.raises(UserError, match="reads only the last hidden state"):
        cls.capture_policy(make_module(cls, small_target).target, [1, 2])
    with pytest.raises(UserError, match="loss 'cee'"):
        cls(target, loss="cee")
    module, head = make_module(cls, small_target), make_head()
    with pytest.raises(UserError, match="gamma is 5, but the draft has 4 heads"):
        next(iter(module.draft_logits(pack(documents_of((9,))), head, 5)))


def test_medusa_over_the_whole_vocabulary_is_written_under_the_names_of_vllm(small_target, tmp_path):
    module = make_module(MedusaModule, small_target, V, {"num_head_blocks": 2})
    module.draft.float()
    MedusaModule.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert set(tensors) == {
        *(f"blocks.{k}.layers.{j}.weight" for k in range(HEADS) for j in range(2)),
        *(f"lm_heads.{k}.weight" for k in range(HEADS)),
    }
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    expected = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "num_heads": HEADS,
        "num_hidden_layers": 2,
        "medusa_fc_bias": False,
        "hidden_size": 16,
        "vocab_size": 48,
    }
    assert {key: config[key] for key in expected} == expected
    # vLLM renames fields of such names.
    assert not {"num_draft_heads", "num_head_blocks"} & set(config)
    again = load_module(tmp_path / "draft", str(small_target))
    for name, tensor in module.draft.state_dict().items():
        assert torch.equal(again.draft.state_dict()[name], tensor), name


def test_a_draft_of_few_heads_can_be_read(small_target, tmp_path):
    module = make_module(MedusaModule, small_target, config={"num_draft_heads": 2}, gamma=2)
    module.draft.float()
    MedusaModule.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    assert load_module(tmp_path / "draft", str(small_target)).gamma == 2


@BOTH
def test_an_exported_draft_can_be_started_from(small_target, cls, tmp_path):
    module = make_module(cls, small_target)
    module.draft.float()
    cls.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    assert "heads.3.lm_head.weight" in load_file(tmp_path / "draft" / "model.safetensors")
    again = cls(
        str(small_target), draft_config=os.fspath(tmp_path / "draft" / "config.json"), init_from=str(tmp_path / "draft")
    )
    for name, tensor in module.draft.state_dict().items():
        assert torch.equal(again.draft.state_dict()[name], tensor), name
    with pytest.raises(UserError, match=r"SGLang has no (Medusa|Hydra)"):
        cls.export_format.to_sglang(module.draft, module.target, tmp_path / "served")
