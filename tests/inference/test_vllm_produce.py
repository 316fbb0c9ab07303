"""A disaggregated run whose features a server stores: the stand-in's are transformers', so the weights must be too."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from specforge.cli.main import main
from specforge.inference.target_engine.vllm import VLLMTargetEngine
from specforge.runtime.data_plane.store import StoreFullError
from tests.disaggregated import assert_nothing_is_left, disaggregated, places, producers
from tests.fake_vllm import FakeVLLM, fake_vllm

pytestmark = pytest.mark.faults


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = next((folder / "run").rglob("last.ckpt"))
    return torch.load(path, weights_only=True, map_location="cpu")["state_dict"]


@pytest.fixture(scope="module")
def expected(target, prompts, tmp_path_factory):
    """Weights of a run whose producer runs transformers."""
    folder = tmp_path_factory.mktemp("expected")
    with producers(target, places(folder)):
        assert main(["fit", "--config", str(disaggregated(target, prompts, folder, places(folder)))]) == 0
    return weights(folder)


def fit(target, prompts, folder, url, store, count=1, **options):
    """Train on what producers have a server store."""
    where = places(folder)
    engine = partial(VLLMTargetEngine, url=url, store=store, patience=30, compare=False)
    with producers(target, where, count, engine=engine, max_prompts=16, **options):
        assert main(["fit", "--config", str(disaggregated(target, prompts, folder, where))]) == 0
    assert_nothing_is_left(where, 72)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_features_go_straight_into_the_runs_store(target, prompts, tmp_path, expected, monkeypatch):
    store = places(tmp_path)["store"]
    monkeypatch.setattr(VLLMTargetEngine, "capture", None)  # after the check, no tensor reaches a producer
    monkeypatch.setattr(VLLMTargetEngine, "_capture_one", lambda *args: {})
    with fake_vllm(target, Path(store)) as server:
        fit(target, prompts, tmp_path, server.url, store, 2)
    assert_equal(weights(tmp_path), expected)


def test_features_go_through_the_producer_if_the_server_has_a_store_of_its_own(target, prompts, tmp_path, expected):
    with fake_vllm(target, tmp_path / "own") as server:
        fit(target, prompts, tmp_path, server.url, str(tmp_path / "own"))
        assert not server.sink._backend.stored()
    assert_equal(weights(tmp_path), expected)


def test_a_server_that_dies_and_comes_back_trains_nothing_twice(target, prompts, tmp_path, expected):
    """It drops some requests unanswered, some after its answer, and stays away for a while."""
    store = places(tmp_path)["store"]
    with fake_vllm(target, Path(store)) as first:
        port, again, count = first.server_address[1], [], 0

        def die(body):
            nonlocal count
            count += 1
            if count == 9:
                threading.Thread(target=restart).start()
            if count >= 9:
                raise ConnectionAbortedError
            return 503 if count % 4 == 0 else None

        def restart():
            first.shutdown()
            first.server_close()
            server = FakeVLLM(target, Path(store), port=port)
            again.append(server)
            server.serve_forever(0.01)

        first.faults = [die] * 1000
        try:
            fit(target, prompts, tmp_path, first.url, store)
        finally:
            for server in again:
                server.shutdown()
                server.server_close()
                server.sink.close()
    assert again
    assert_equal(weights(tmp_path), expected)


def test_a_full_store_is_waited_for(target, prompts, tmp_path, expected):
    store = places(tmp_path)["store"]
    with fake_vllm(target, Path(store)) as server:
        write, times = server.sink._backend.write, iter(range(1000))

        def full(key, group, uri):
            if "error" not in group and next(times) % 5 == 3:
                raise StoreFullError("no space")
            return write(key, group, uri)

        server.sink._backend.write = full
        fit(target, prompts, tmp_path, server.url, store)
    assert_equal(weights(tmp_path), expected)
