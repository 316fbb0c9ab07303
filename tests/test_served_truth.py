"""`specforge bench` and `parity` against running servers: their rounds are those of our decoder, prompt by prompt."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.eagle3 import Eagle3Module
from specforge.cli.main import main
from specforge.decoding.decoder import decode
from specforge.errors import UserError
from specforge.inference.server_client import ServerClient
from specforge.inference.target_engine import HFTargetEngine
from tests import vllm_cpu
from tests.lightning_modules.test_mtp_deepseek import memorise
from tests.sglang_cpu import serve as serve_sglang
from tests.tiny import write_target

GAMMA, TOKENS = 3, 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A draft that knows half the answers, its export, a file of prompts, and the rounds that decoding them takes."""
    root = tmp_path_factory.mktemp("served")
    target = write_target(root / "target", layers=6, hidden=128)
    torch.manual_seed(0)
    module = Eagle3Module(str(target), layer_ids=[1, 3, 4], init_from="target", draft_config={"draft_vocab_size": 200})
    module.draft.set_vocabulary(torch.randperm(264)[:200].sort().values)
    engine = HFTargetEngine(module.target, "float32")
    prompts = torch.randint(0, 256, (6, 9)).tolist()
    answers = engine.generate(prompts, max_new_tokens=TOKENS, end_ids=[256])
    memorise(module, engine, [[*p, *a] for p, a in zip(prompts[:3], answers, strict=False)])
    module.eval()
    head = module.target_head(torch.device("cpu"))
    mine = decode(
        engine.model,
        lambda: module.drafter(head, torch.float32),
        prompts,
        gamma=GAMMA,
        max_new_tokens=TOKENS,
        end_ids=[256],
    )
    module.export_format.to_sglang(module.draft, module.target, root / "draft", "float32")
    rows = [{"input_ids": [*p, 1], "loss_mask": [0] * len(p) + [1]} for p in prompts]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = [(d.counted, d.rounds) for d in mine]
    assert sum(rounds for _, rounds in counts) < 0.8 * sum(tokens for tokens, _ in counts)  # something is accepted
    return {"root": root, "counts": counts}


@contextmanager
def sglang(python: str, root: Path) -> Iterator[str]:
    options = ["--model-path", root / "target", "--speculative-algorithm", "EAGLE3", "--speculative-eagle-topk", 1]
    options += ["--speculative-draft-model-path", root / "draft", "--speculative-num-steps", GAMMA]
    with serve_sglang(python, root / "log", *options, "--speculative-num-draft-tokens", GAMMA + 1) as server:
        yield f"http://127.0.0.1:{server.port}"


@contextmanager
def vllm(python: str, root: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    draft = {"method": "eagle3", "model": str(root / "draft"), "num_speculative_tokens": GAMMA}
    words = [python, *vllm_cpu.SERVE, "--model", root / "target", "--port", port]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", 256, "--max-num-seqs", 8]
    words += ["--speculative-config", json.dumps(draft), "--per-request-spec-decode-metrics", "detailed"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, words)), env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        with ServerClient(f"http://127.0.0.1:{port}", patience=1) as client:
            while process.poll() is None:
                try:
                    client.get("/health")
                    break
                except UserError:  # it does not listen yet
                    continue
        assert process.poll() is None, (root / "log").read_text()[-4000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


SERVERS = {"vllm": vllm, "sglang": sglang}


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in SERVERS])
def test_bench_and_parity_agree_with_our_decoder(engine, trained, tmp_path, pytestconfig, capsys):
    python = pytestconfig.getoption(f"--{engine}-python")
    if not python:
        pytest.skip(f"{engine} is elsewhere: --{engine}-python names its interpreter (docs/user-guide.md, section 5)")
    root = tmp_path / "served"
    shutil.copytree(trained["root"], root)
    prompts = ["--prompts", str(root / "prompts.jsonl"), "--max_new_tokens", str(TOKENS)]
    with SERVERS[engine](python, root) as url:
        words = ["bench", url, *prompts, "--concurrency", "1", "4", "--temperature", "0", "1"]
        assert main([*words, "--output", str(tmp_path / "out")]) == 0
        assert main(["parity", url, *prompts, "--draft", str(root / "draft")]) == 0
    assert "agree on 6/6 prompts" in capsys.readouterr().out
    levels = json.loads((tmp_path / "out" / "bench.json").read_text())["levels"]
    assert len(levels) == 4
    for level in levels:
        passes = level["speed"]["requests"] // 6
        found = [(p["tokens"], p["rounds"]) for p in level["acceptance"]["per_prompt"]]
        if level["case"]["temperature"] == 0:
            assert found == [(passes * tokens, passes * rounds) for tokens, rounds in trained["counts"]]
        assert 1 <= level["acceptance"]["tau"] <= GAMMA + 1
        assert level["speed"]["first_token"]["p50"] > 0
        assert level["speed"]["per_token"]["p50"] > 0
