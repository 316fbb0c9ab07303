"""What training computes again in the backward pass changes memory, and not one bit of the gradients."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lightning_modules import algorithms
from specforge.errors import UserError
from tests.lightning_modules.test_eagle3 import make_head, run
from tests.lightning_modules.test_ragged import FORMS, H, V, draw_documents, make_module, pack
from tests.tiny import write_target

HEADS = ("medusa", "hydra")


@pytest.fixture(scope="module")
def small_target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in HEADS])
def test_loss_and_gradients_are_the_same_bit_for_bit(form, small_target):
    batch = pack(draw_documents(random.Random(form)), 10)
    found, kept = {}, {}
    for what in ("none", "mlp", "layer"):
        module = make_module(form, small_target)
        module.draft.checkpoint_activations(what)
        sizes: list[int] = []
        with saved_tensors_hooks(partial(_note, sizes), lambda x: x):
            module.training_loss(batch, make_head())
        found[what], kept[what] = run(module, make_head(), [batch]), sum(sizes)
    for what in ("none", "layer"):
        assert found[what][0].equal(found["mlp"][0])
        for name, gradient in found["mlp"][1].items():
            assert gradient.equal(found[what][1][name]), (what, name)
    if form in ("eagle3", "peagle", "mtp", "dflash"):
        assert kept["layer"] < kept["mlp"] < kept["none"]


def _note(sizes: list[int], x: torch.Tensor) -> torch.Tensor:
    sizes.append(x.nbytes)
    return x


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_no_layers_to_compute_again(name, target):
    with pytest.raises(UserError, match=r"checkpoint_activations is layer, but a draft of heads has no layers"):
        algorithms()[name](str(target), checkpoint_activations="layer")
