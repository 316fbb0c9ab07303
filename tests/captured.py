"""What the tests of both capturing servers share."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch

from specforge.errors import UserError

BOUND = 2e-5  # relative distance from transformers' states, in fp32


def random_prompts(*lengths: int) -> list[list[int]]:
    """Prompts of these lengths over the tiny target's vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


def stored(engine) -> list[tuple[str, str]]:
    """What is in the store that an engine shares with its server."""
    return engine._handoff.backend.stored()


def assert_a_closed_client_leaves_nothing(engine, server, prompts, policy) -> None:
    """Close the engine in the middle of its requests; the store is empty then, and another client finds it so later."""
    sent, post = threading.Semaphore(0), engine._post
    engine._post = lambda *args: sent.release() or post(*args)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(engine.capture, prompts, policy)
        for _ in range(engine.concurrency):
            assert sent.acquire(timeout=60)
        engine.close()
        with pytest.raises((UserError, RuntimeError, CancelledError)):
            found.result(60)
    assert not stored(engine)
    server.capture([[1, 2]], policy)  # read after whatever the server has not dropped
    assert not stored(engine)


def assert_close(found, expected) -> None:
    """The same features, up to the order of summation."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape
        assert (found[name] - x).norm() <= BOUND * x.norm(), name
