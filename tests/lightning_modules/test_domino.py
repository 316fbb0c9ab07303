"""Losses and gradients of Domino against its definition."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightning_modules.domino
from lightning_modules.domino import DominoModule
from specforge.cli.main import main
from specforge.contracts import AUX_HIDDEN_STATES, mask_spans
from specforge.errors import UserError
from tests.lightning_modules.block_reference import BlockReference
from tests.lightning_modules.checks import (
    assert_bf16_gradients_are_close,
    assert_nothing_leaks_across_documents,
    assert_packing_changes_nothing,
)
from tests.lightning_modules.test_dflash import make_module, slow
from tests.lightning_modules.test_eagle3 import H, V, make_documents, make_head, pack, run, same
from tests.tiny import recipe, write_target

UNSHIFTED = {"shift_label": False}


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


class DominoReference(BlockReference):
    """PyTorch's own GRU over each block's tokens, from the start for every draft."""

    def corrections(self, tokens: Tensor, anchor: int, states: list[Tensor]) -> list[Tensor | float]:
        w, fields = self.w, self.config.dflash_config
        names = ("prefix_gru.weight_ih_l0", "prefix_gru.weight_hh_l0")
        gru = torch.nn.GRU(self.embedding.shape[1], fields["gru_hidden_dim"], bias=False, dtype=torch.float64)
        out: list[Tensor | float] = []
        for depth, state in enumerate(states):
            if depth < fields["pure_draft_prefix_len"] or anchor + depth >= len(tokens):
                out.append(0.0)
                continue
            read = self.embedding[tokens[anchor : anchor + depth + 1]]
            weights = {name.removeprefix("prefix_gru."): w[name] for name in names}
            memory = torch.func.functional_call(gru, weights, (read,))[0][-1]
            x = w["embed_proj.0.weight"] @ torch.cat([state, memory])
            out.append(w["embed_proj.2.weight"] @ (x * torch.sigmoid(x)))
        return out


def document(reference: DominoReference, tokens, mask, aux, last, *, decay=4.0, share=0.0, label="data"):
    total, count, hits = aux.new_zeros(()), 0, [0] * reference.drafts
    for rows in reference.blocks(tokens, mask, aux):
        for depth, (at, _, base, logits) in rows.items():
            count += 1
            right = int(tokens[at]) if label == "data" else int((reference.lm_head @ last[at - 1]).argmax())
            if right not in reference.ids:
                continue
            index = reference.ids.index(right)
            loss = -(1 - share) * logits.log_softmax(0)[index] - share * base.log_softmax(0)[index]
            total = total + math.exp(-depth / decay) * loss
            hits[depth] += int(logits.argmax()) == index
    return total, count, hits


def make(target, draft_vocab=V, share=0.0, config=None, fields=None, **options) -> DominoModule:
    fields = {"gru_hidden_dim": 7, "emb_dim": 6, **(fields or {})}
    config = {"block_size": 4, "dflash_config": fields, **(config or {})}
    options = {"gamma": 3, "base_start": share, **options}
    module = make_module(target, draft_vocab, config, kind=DominoModule, **options)
    module.horizon = 8.0  # at step 0 the share is the one that it starts with
    return module


@pytest.mark.parametrize(
    ("options", "draft_vocab", "fields", "share"),
    [
        ({}, V, {}, 0.7),
        ({"share": 0.3}, V, {}, 0.7),
        ({"share": 0.6, "chunk": 3}, 20, {"pure_draft_prefix_len": 0}, 1.0),
        ({"label": "target", "decay": 2.0}, 20, {"pure_draft_prefix_len": 2}, 0.8),
        ({"share": 0.5}, V, UNSHIFTED, 0.8),
        ({"share": 0.2, "chunk": 1}, 20, {**UNSHIFTED, "pure_draft_prefix_len": 0}, 1.0),
        ({"share": 1.0}, V, {}, 0.8),
    ],
)
def test_loss_gradients_and_hits_are_those_of_the_definition(small_target, options, draft_vocab, fields, share):
    module, head = make(small_target, draft_vocab, fields=fields, **options), make_head()
    documents = make_documents((9, 11, 3, 6, 1, 2), share=share)
    documents[1].loss_mask[:5] = False
    documents[1].spans = mask_spans(documents[1].loss_mask, (11,))
    plain = {name: x for name, x in options.items() if name != "chunk"}
    loss, gradients, hits = run(module, head, [pack(documents)])
    expected, count = slow(module, DominoReference, head, documents, document, **plain)
    same((loss, gradients, hits), expected)
    assert module.training_loss(pack(documents), head).num_supervised == count
    corrected = [n for n, x in gradients.items() if n.startswith(("prefix_gru", "embed_proj")) and x.any()]
    assert len(corrected) == (0 if options.get("share") == 1.0 else 4)


@pytest.mark.parametrize("fields", [{}, UNSHIFTED], ids=["shifted", "unshifted"])
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_packing_padding_order_and_chunks_change_nothing(small_target, share, fields):
    documents = make_documents((8, 3, 11, 5), share=share)
    assert_packing_changes_nothing(make(small_target, share=0.4, fields=fields), documents)


def test_a_masked_prompt_is_read_and_not_learnt(small_target):
    module, head = make(small_target, share=0.4), make_head()
    documents = make_documents((12, 9, 15), share=1.0)
    for d in documents:
        d.loss_mask[: d.num_tokens // 2] = False
        d.spans = mask_spans(d.loss_mask, d.lengths)
    same(run(module, head, [pack(documents)]), run(module, head, documents))
    supervised = sum(d.num_supervised for d in documents)
    rows = module.training_loss(pack(documents), head).rows.tolist()
    assert rows == [supervised - 3 * (k + 1) for k in range(4)]


def test_nothing_leaks_across_documents(small_target):
    assert_nothing_leaks_across_documents(make(small_target, share=0.4))


def test_bf16_gradients_are_close_to_fp32(small_target):
    assert_bf16_gradients_are_close(make(small_target, share=0.5))


@pytest.mark.parametrize("fields", [{}, UNSHIFTED], ids=["shifted", "unshifted"])
def test_validation_chains_are_the_corrected_greedy_choices(small_target, fields):
    module, head = make(small_target, fields=fields), make_head()
    (document,) = make_documents((14,), share=1.0)
    weights = {n: x.detach() for n, x in module.draft.state_dict().items()}
    reference = DominoReference(weights, module.draft.config, head.embedding, head.lm_head, shift=module.draft.shift)
    (found,) = module.validation_chains(document, head, 3).chains
    again = module.validation_chains(document, head, 3).chains[0]
    assert found.tolist() == again.tolist()
    ids = document.input_ids
    for anchor in range(13):
        drafts = reference.logits(ids, document.features[AUX_HIDDEN_STATES], anchor)
        length = min(3, 13 - anchor)
        right = [int(drafts[k][2].argmax()) == int(ids[anchor + 1 + k]) for k in range(length)]
        assert found[anchor].tolist() == [*right, *[False] * (3 - length)]


def test_the_base_counts_less_with_every_step(target, features, tmp_path, monkeypatch):
    """λ is 1 at the first of 8 steps and 0 after half of them; evaluation never counts the base."""
    shares: list[float] = []
    plain = lightning_modules.domino.tiled_loss

    def spy(*args, base_share: float, **options):
        shares.append(base_share if torch.is_grad_enabled() else -base_share)
        return plain(*args, base_share=base_share, **options)

    monkeypatch.setattr(lightning_modules.domino, "tiled_loss", spy)
    fields = {"block_size": 4, "num_hidden_layers": 1, "dflash_config": {"gru_hidden_dim": 8, "emb_dim": 4}}
    path = recipe(
        target,
        features,
        tmp_path,
        trainer__max_steps=8,
        trainer__check_val_every_n_epoch=None,
        trainer__val_check_interval=3,
        model__class_path="DominoModule",
        model__init_args={"target": str(target), "layer_ids": [1, 3, 4], "draft_config": fields},
    )
    assert main(["fit", "--config", str(path)]) == 0
    assert len(shares) > 8
    assert [s for s in shares if s] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({}, {"gru_hidden_dim": 0}, "gru_hidden_dim is 0"),
        ({}, {"emb_dim": 0}, "emb_dim is 0"),
        ({}, {"pure_draft_prefix_len": 4}, "pure_draft_prefix_len is 4"),
        ({}, {**UNSHIFTED, "pure_draft_prefix_len": 3}, "below the 3 tokens"),
        ({}, {"mask_token_id": V}, "mask_token_id is 48, outside"),
        ({"gamma": 5}, {}, "drafts at most 4"),
        ({"config": {"architectures": ["DFlashDraftModel"]}}, {"projector_type": None}, "not a draft of domino"),
    ],
)
def test_bad_input_is_refused_by_name(small_target, options, fields, message):
    with pytest.raises(UserError, match=message):
        make(small_target, fields=fields, **options)


@pytest.mark.parametrize("kind", ["DFlashModule", "DFlash2Module", "DSparkModule", "DominoModule"])
def test_samples_shorter_than_a_block_are_refused_before_training(kind, target, features, tmp_path, capsys):
    path = recipe(
        target,
        features,
        tmp_path,
        model__class_path=kind,
        model__init_args={
            "target": str(target),
            "layer_ids": [1, 3, 4],
            "draft_config": {"block_size": 400, "num_hidden_layers": 1},
        },
    )
    assert main(["fit", "--config", str(path)]) != 0
    error = capsys.readouterr().err
    assert "a block of 400 needs" in error
    assert "block_size" in error
    assert not (tmp_path / "run" / "checkpoints").exists()
