"""The losses, hits, counts and gradients of ranks that share a batch add up to those of one rank."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from specforge.contracts import TrainBatch
from specforge.errors import UserError
from specforge.inference.target_head import TargetHead
from tests.lightning_modules.test_ragged import FORMS, H, V, document, draw_documents, make_module, pack
from tests.threads import on_ranks
from tests.tiny import write_target

ALONE = ("peagle", "mtp", "medusa", "hydra", "standalone")
SHARED = [form for form in FORMS if form not in ALONE]


@pytest.fixture(scope="module")
def small_target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


def step(module, batch: TrainBatch, head: TargetHead, group=None):
    """Output and gradients of a batch, in a copy of the module that shares it with a group."""
    module = copy.deepcopy(module)
    module.context_group = group
    output = module.training_loss(batch, head)
    output.loss.backward()
    return output, {name: p.grad for name, p in module.draft.named_parameters() if p.grad is not None}


def assert_ranks_add_up(module, head: TargetHead, batches: list[TrainBatch], ranks: int, tolerance: float) -> None:
    alone = [step(module, batch, head) for batch in batches]
    shared = on_ranks(ranks, lambda group: [step(module, batch, head, group) for batch in batches])
    for (expected, gradients), *parts in zip(alone, *shared, strict=True):
        outputs = [output for output, _ in parts]
        assert sum(output.num_supervised for output in outputs) == expected.num_supervised
        assert sum(output.hits for output in outputs).tolist() == expected.hits.tolist()
        assert sum(output.rows for output in outputs).tolist() == expected.rows.tolist()
        close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
        torch.testing.assert_close(sum(output.loss for output in outputs), expected.loss, **close)
        torch.testing.assert_close(sum(output.losses for output in outputs), expected.losses, **close)
        for name, gradient in gradients.items():
            difference = sum(part[name] for _, part in parts) - gradient
            assert difference.norm() <= tolerance * gradient.norm().clamp(min=1e-3), name


def make_batches(form: str) -> list[TrainBatch]:
    """Several turns, with fewer rows than ranks, with fewer tokens, with nothing to learn, and drawn ones."""
    rng = random.Random(form)
    turns = [i % 7 > 2 for i in range(50)]
    chosen = [[turns, turns[:20]], [[False, True, True]], [[True, True]], [[True], [True], [False] * 9]]
    documents = [[document(rng, mask, number) for number, mask in enumerate(masks)] for masks in chosen]
    return [
        pack(batch, rng.choice([0, 1, 17, 100])) for batch in (*documents, *(draw_documents(rng) for _ in range(5)))
    ]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("form", SHARED)
def test_ranks_that_share_a_batch_add_up_to_one(form, ranks, small_target):
    module = make_module(form, small_target)
    head = TargetHead(*(torch.randn(V, H, dtype=torch.float64) for _ in range(2)), torch.float64)
    assert_ranks_add_up(module, head, make_batches(form), ranks, 1e-12)


@pytest.mark.parametrize("form", ["eagle3", "dflash"])
def test_in_fp32_too(form, small_target):
    module = make_module(form, small_target)
    module.draft.float()
    head = TargetHead(*(torch.randn(V, H) for _ in range(2)), torch.float32)
    batches = make_batches(form)
    for batch in batches:
        batch.features = {name: x.float() for name, x in batch.features.items()}
    assert_ranks_add_up(module, head, batches, 3, 1e-5)


@pytest.mark.parametrize("form", ["eagle3", "dflash"])
def test_with_layers_computed_again(form, small_target):
    """Keys and values of a block drafter's layers are then gathered again, in the backward pass."""
    module = make_module(form, small_target)
    module.draft.checkpoint_activations("layer")
    head = TargetHead(*(torch.randn(V, H, dtype=torch.float64) for _ in range(2)), torch.float64)
    assert_ranks_add_up(module, head, make_batches(form), 3, 1e-12)


@pytest.mark.parametrize("form", ["eagle3", "dflash"])
def test_validation_is_not_shared(form, small_target):
    """Each rank validates documents of its own, without the others."""
    module = make_module(form, small_target)
    head = TargetHead(*(torch.randn(V, H, dtype=torch.float64) for _ in range(2)), torch.float64)
    batch = make_batches(form)[0]
    expected = module.validation_chains(batch, head, 3)

    def validate(group):
        own = copy.deepcopy(module)
        own.context_group = group
        return own.validation_chains(batch, head, 3) if group.rank() == 0 else None

    found, _ = on_ranks(2, validate)
    assert torch.equal(found.loss, expected.loss)
    assert all((a == b).all() for a, b in zip(found.chains, expected.chains, strict=True))


class Trainer:
    """What a module reads of the trainer before anything else."""

    class strategy:
        context_group = object()


@pytest.mark.parametrize("form", ALONE)
def test_other_algorithms_refuse(form, small_target):
    module, trainer = make_module(form, small_target), Trainer()
    module.trainer = trainer
    with pytest.raises(UserError, match="does not support context parallelism; use ddp or fsdp2"):
        module.setup("fit")
