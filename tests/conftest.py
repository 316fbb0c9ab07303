"""What the tests share: the tiny target, its prompts and its features."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import specforge.callbacks.report
from specforge.cli.main import main
from tests import forks, processes, ray_workers
from tests.fuzz import Fuzz
from tests.tiny import write_conversations, write_target


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many seeds the kills of tests/test_faults.py are drawn with."""
    parser.addoption("--fault-seeds", type=int, default=3, help="seeds of the fault matrix (default 3)")
    parser.addoption("--write-docs", action="store_true", help="write docs/targets.md (tests/test_targets.py)")
    parser.addoption("--fuzz", type=int, default=1, help="try so many times as many damaged inputs (default 1)")
    parser.addoption("--vllm-python", default=os.environ.get("VLLM_PYTHON"), help="interpreter that has vLLM")
    parser.addoption("--sglang-python", default=os.environ.get("SGLANG_PYTHON"), help="interpreter that has SGLang")


def pytest_configure(config: pytest.Config) -> None:
    """Programs are started from forks, whichever process of the session starts them first."""
    if not hasattr(config, "workerinput"):  # not in a process of pytest-xdist, which has the first one's environment
        stack = ExitStack()
        stack.enter_context(forks.session())
        config.add_cleanup(stack.close)
        processes.make_python()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first: an idle process takes half of the tests that are left, and repeats their fixtures."""
    lost = [i for i in items if i.get_closest_marker("ray") and not i.path.match("tests/test_cluster*.py")]
    if lost:
        raise pytest.UsageError(
            f"{lost[0].nodeid}: `make test` runs tests marked `ray` from tests/test_cluster*.py only"
        )
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Sums depend on the number of threads; set before the fixtures of a test, those that outlive it too."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most runs of the suite draw no plots, which take a third of a second; those of wider fixtures do."""
    monkeypatch.setattr(specforge.callbacks.report, "write_report", str)


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """Damaged inputs and what must hold with each of them, drawn with the test's own name."""
    return Fuzz(seed=request.node.nodeid, factor=request.config.getoption("--fuzz"))


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny target."""
    return write_target(tmp_path_factory.mktemp("target") / "tiny")


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 conversations, 8 of them held out."""
    return write_conversations(tmp_path_factory.mktemp("data") / "conversations.jsonl")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory, target: Path, conversations: Path) -> Path:
    """The conversations as prompt sets of the tiny target."""
    folder = tmp_path_factory.mktemp("prompts")
    assert main(["prepare", "--data", str(conversations), "--target", str(target), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory, target: Path, prompts: Path) -> Path:
    """Their features for EAGLE-3, in fp32."""
    folder = tmp_path_factory.mktemp("features")
    command = ["capture", "--target", target, "--prompts", prompts, "--output", folder, "--dtype", "float32"]
    assert main([str(word) for word in command]) == 0
    return folder


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers of Ray start quickly (tests/ray_workers.py)."""
    with ray_workers.forked_workers(tmp_path_factory.mktemp("workers") / "socket"):
        yield
