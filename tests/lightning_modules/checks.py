"""What every draft has to pass, whatever its loss."""

from __future__ import annotations

import torch

from specforge.contracts import TrainBatch
from specforge.inference.target_head import TargetHead
from tests.lightning_modules.test_eagle3 import make_documents, make_head, pack, run, same


def assert_packing_changes_nothing(module, documents: list[TrainBatch]) -> None:
    """Packed, in another order, padded, in small tiles: loss, gradients and hits of one document after the other."""
    head = make_head()
    expected = run(module, head, documents)
    for batch in (pack(documents), pack(documents[::-1]), pack(documents, padding=13)):
        same(run(module, head, [batch]), expected)
    module.chunk = 2
    same(run(module, head, [pack(documents)]), expected)


def assert_nothing_leaks_across_documents(module) -> None:
    """The loss of a packed document is its own, whatever stands before or behind it."""
    head = make_head()
    first, second = make_documents((8, 9), share=0.9)
    alone = run(module, head, [second])
    first.features = {name: values * 100 for name, values in first.features.items()}
    first.input_ids = first.input_ids.flip(0)
    for order in ([first, second], [second, first]):
        both, other = run(module, head, [pack(order)]), run(module, head, [first])
        torch.testing.assert_close(both[0] - other[0], alone[0], rtol=1e-6, atol=1e-6, check_dtype=False)


def assert_bf16_gradients_are_close(module) -> None:
    """Autocast gives every parameter a gradient within a tenth of the exact one; masters stay fp32."""
    head, documents = make_head(), make_documents((30, 40), share=0.9)
    _, exact, _ = run(module, head, [pack(documents)])
    module.draft.float()
    batch = pack(documents)
    batch.features = {name: x.float() for name, x in batch.features.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_loss(batch, TargetHead(head.embedding, head.lm_head, torch.bfloat16)).loss
    module.zero_grad()
    loss.backward()
    for name, parameter in module.draft.named_parameters():
        error = (parameter.grad.double() - exact[name]).norm() / exact[name].norm()
        assert error < 0.1, (name, float(error))
        assert parameter.dtype == torch.float32
