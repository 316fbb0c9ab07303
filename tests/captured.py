"""What the tests of both capturing servers share."""

from __future__ import annotations

import torch

BOUND = 2e-5  # relative distance from transformers' states, in fp32


def random_prompts(*lengths: int) -> list[list[int]]:
    """Prompts of these lengths over the tiny target's vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


def stored(engine) -> list[tuple[str, str]]:
    """What is in the store that an engine shares with its server."""
    return engine._handoff.backend.stored()


def assert_close(found, expected) -> None:
    """The same features, up to the order of summation."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape
        assert (found[name] - x).norm() <= BOUND * x.norm(), name
