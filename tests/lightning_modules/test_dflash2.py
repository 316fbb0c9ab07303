"""Losses and gradients of DFlash-2 against its definition."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.dflash import DFlashModule
from lightning_modules.dflash2 import DFlash2Module
from specforge.contracts import AUX_HIDDEN_STATES, mask_spans
from specforge.errors import UserError
from specforge.inference.target_head import TargetHead
from tests.lightning_modules.block_reference import BlockReference
from tests.lightning_modules.checks import (
    assert_bf16_gradients_are_close,
    assert_nothing_leaks_across_documents,
    assert_packing_changes_nothing,
)
from tests.lightning_modules.test_dflash import SLIDING, make_module, slow
from tests.lightning_modules.test_eagle3 import H, V, make_documents, make_head, pack, run, same
from tests.tiny import write_target


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


class DFlash2Reference(BlockReference):
    """Convolutions tap by tap, candidates token by token."""

    def around(self, xs: list[Tensor], normed: list[Tensor], name: str, side: int) -> list[Tensor]:
        fields = self.config.dflash_config
        taps, size = fields["conv_kernel_size"], fields["conv_group_size"]
        groups = len(xs[0]) // size
        base = self.w[name + "base_kernel"]
        out = []
        for k, x in enumerate(normed):
            delta = (self.w[name + "kernel_projection.weight"] @ x).view(2, taps, groups)
            kernel = base[side] + delta[side].repeat_interleave(size, 1)  # [taps, channels]
            out.append(sum(xs[k - j] * kernel[j] for j in range(min(taps, k + 1))))
        return out

    def score(self, before: int, state: Tensor, index: int) -> Tensor:
        w, name = self.w, "candidate_selector."
        seen = w[name + "predecessor_codebook"][before] * (w[name + "hidden_projection.weight"] @ state)
        return seen @ w[name + "successor_codebook"][index]

    def candidates(self, base: Tensor) -> list[int]:
        order = sorted(range(len(base)), key=lambda i: -float(base[i]))
        return order[: self.config.dflash_config["selector_top_k"]]

    def choice(self, before: int, state: Tensor, base: Tensor) -> int:
        return max(self.candidates(base), key=lambda i: float(base[i] + self.score(before, state, i)))


def document(reference: DFlash2Reference, tokens, mask, aux, last, *, decay=4.0, selector=1.0, label="data"):
    total, count, hits = aux.new_zeros(()), 0, [0] * reference.drafts
    for rows in reference.blocks(tokens, mask, aux):
        for depth, (at, state, base, _) in rows.items():
            count += 1
            right = int(tokens[at]) if label == "data" else int((reference.lm_head @ last[at - 1]).argmax())
            if right not in reference.ids:
                continue
            index, before = reference.ids.index(right), int(tokens[at - 1])
            chosen = reference.candidates(base)
            if index not in chosen:
                chosen[-1] = index
            scores = torch.stack([base[i] + reference.score(before, state, i) for i in chosen])
            loss = -base.log_softmax(0)[index] - selector * scores.log_softmax(0)[chosen.index(index)]
            total = total + math.exp(-depth / decay) * loss
            hits[depth] += reference.choice(before, state, base) == index
    return total, count, hits


def make(target, draft_vocab=V, config=None, fields=None, **options) -> DFlash2Module:
    fields = {"conv_kernel_size": 2, "conv_group_size": 4, "selector_rank": 6, "selector_top_k": 5, **(fields or {})}
    config = {"block_size": 5, "dflash_config": fields, **(config or {})}
    return make_module(target, draft_vocab, config, kind=DFlash2Module, **options)


@pytest.mark.parametrize(
    ("options", "draft_vocab", "config", "fields", "share"),
    [
        ({}, V, {}, {}, 0.7),
        ({"selector": 0.3, "chunk": 3}, 20, {}, {"conv_kernel_size": 3}, 1.0),
        ({"label": "target", "decay": 2.0}, 20, SLIDING, {"selector_top_k": 1}, 0.8),
        ({"chunk": 1}, V, {"num_hidden_layers": 1}, {"conv_group_size": 16, "selector_top_k": V}, 0.8),
        ({}, V, {}, {"conv_kernel_size": 1, "conv_group_size": 1}, 0.8),
    ],
)
def test_loss_gradients_and_hits_are_those_of_the_definition(small_target, options, draft_vocab, config, fields, share):
    module, head = make(small_target, draft_vocab, config, fields, **options), make_head()
    documents = make_documents((9, 11, 3, 6, 1, 2), share=share)
    documents[1].loss_mask[:5] = False
    documents[1].spans = mask_spans(documents[1].loss_mask, (11,))
    plain = {name: x for name, x in options.items() if name != "chunk"}
    expected, count = slow(module, DFlash2Reference, head, documents, document, **plain)
    # The rotary tables are fp32, and these random convolutions amplify what they round.
    same(run(module, head, [pack(documents)]), expected, tolerance=5e-6)
    assert module.training_loss(pack(documents), head).num_supervised == count


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_packing_padding_order_and_chunks_change_nothing(small_target, share):
    documents = make_documents((8, 3, 11, 5), share=share)
    documents[2].loss_mask[:4] = False
    documents[2].spans = mask_spans(documents[2].loss_mask, (11,))
    assert_packing_changes_nothing(make(small_target), documents)


def test_nothing_leaks_across_documents(small_target):
    assert_nothing_leaks_across_documents(make(small_target))


def test_bf16_gradients_are_close_to_fp32(small_target):
    module = make(small_target, fields={"selector_top_k": V})
    for layer in module.draft.decoder_layers:
        for conv in (layer.attention_conv, layer.mlp_conv):
            conv.start_as_identity()
    assert_bf16_gradients_are_close(module)


def test_validation_chains_are_the_chosen_candidates(small_target):
    module, head = make(small_target), make_head()
    (document,) = make_documents((14,), share=1.0)
    weights = {n: x.detach() for n, x in module.draft.state_dict().items()}
    reference = DFlash2Reference(weights, module.draft.config, head.embedding, head.lm_head)
    (found,) = module.validation_chains(document, head, 3).chains
    ids = document.input_ids
    for anchor in range(13):
        drafts = reference.logits(ids, document.features[AUX_HIDDEN_STATES], anchor)
        length = min(3, 13 - anchor)
        right = [
            reference.choice(int(ids[anchor + k]), *drafts[k][:2]) == int(ids[anchor + 1 + k]) for k in range(length)
        ]
        assert found[anchor].tolist() == [*right, *[False] * (3 - length)]


def test_it_starts_as_dflash(small_target):
    """The convolutions pass on what comes in: the same base loss and states as DFlash with the same other weights."""
    options = {"layer_ids": [1, 3, 4], "draft_config": {"num_hidden_layers": 2, "block_size": 5}}
    both = [kind(str(small_target), **options) for kind in (DFlashModule, DFlash2Module)]
    own = both[1].draft.state_dict()
    both[0].draft.load_state_dict({name: own[name] for name in both[0].draft.state_dict()})
    head = make_head()
    batch = pack(make_documents((9, 12), share=1.0))
    batch.features = {name: x.float() for name, x in batch.features.items()}
    head = TargetHead(head.embedding.float(), head.lm_head.float(), torch.float32)
    losses = [m.training_loss(batch, head).losses for m in both]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({}, {"conv_group_size": 3}, "conv_group_size is 3"),
        ({}, {"conv_kernel_size": 6}, "conv_kernel_size 6"),
        ({}, {"selector_top_k": V + 1}, "selector_top_k is 49"),
        ({}, {"selector_rank": 0}, "selector_rank is 0"),
        ({}, {"mask_token_id": V}, "mask_token_id is 48, outside"),
        ({"gamma": 5}, {}, "drafts at most 4"),
        ({"config": {"architectures": ["DFlashDraftModel"]}}, {}, "not a draft of dflash2"),
    ],
)
def test_bad_input_is_refused_by_name(small_target, options, fields, message):
    with pytest.raises(UserError, match=message):
        make(small_target, fields=fields, **options)
