"""Drafts in the speculators form, and with Qwen3's attention, in vLLM itself (as tests/test_vllm.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import specforge
from tests import vllm_cpu

vllm = pytest.importorskip("tests.test_vllm")
python = vllm.python

QWEN3 = {"qk_norm": True}
FORMS = {
    "eagle3": vllm.Form("eagle3", {"norm_before_fc": True, "norm_before_residual": True}, vllm.EAGLE),
    "eagle3.1, Qwen3": vllm.Form(
        "eagle3", {**vllm.SMALL, **QWEN3, "fc_norm": True, "norm_output": True}, {**vllm.LAYERS, "steps": vllm.GAMMA}
    ),
    "peagle, Qwen3": vllm.Form(
        "peagle", {**vllm.SMALL, **QWEN3, "num_hidden_layers": 2, "embed_requires_grad": True}, vllm.LAYERS
    ),
    "dflash": vllm.Form("dflash", {**vllm.BLOCK, **vllm.SMALL}, vllm.LAYERS),
    "dflash, both directions": vllm.Form("dflash", {**vllm.BLOCK, **vllm.SLIDING, "is_causal": False}, vllm.LAYERS),
}
INTERPRETED = {"dspark": vllm.Form("dspark", {**vllm.BLOCK, **vllm.SMALL, "block_size": vllm.GAMMA}, vllm.LAYERS)}
ALONE = ("eagle3", "dflash")  # also served as `vllm serve FOLDER`, which finds target and algorithm in the config
AS_VLLM_TOO = ("eagle3.1, Qwen3", "peagle, Qwen3", "dflash, both directions")  # forms that tests/test_vllm.py has not

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def serve(
    python: str, forms: dict[str, Any], root: Path, tokens: int, program: Sequence[str]
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """What SpecForge says of every draft, and what vLLM made of it by the name of the job."""
    target, jobs, found = vllm.make_target("llama", root / "llama"), [], {}
    for name, form in forms.items():
        work, found[name] = vllm.prepare(name, form, target, root, tokens)
        module = specforge.load_draft(found[name].folder, target)
        folder = root / f"{name}, speculators"
        module.export_format.to_speculators(module.draft, module.target, folder, "float32")
        jobs.append({**work, "speculative": {**work["speculative"], "model": str(folder)}})
        if name in ALONE:
            jobs.append({**work, "name": f"{name}, alone", "model": str(folder), "speculative": None})
        if name in AS_VLLM_TOO:
            jobs.append({**work, "name": f"{name}, for vLLM"})
    vllm.run(python, jobs, root, program)
    results = {job["name"]: json.loads((root / f"{job['name']}.json").read_text()) for job in jobs}
    for name in {*ALONE} & forms.keys():
        results[f"{name}, alone"]["parameters"] = [*load_file(root / f"{name}, alone.safetensors")]
    return {name: (said, results) for name, said in found.items()}


@pytest.fixture(scope="module")
def served(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, Any]]]:
    found = serve(python, FORMS, tmp_path_factory.mktemp("vllm"), 24, vllm_cpu.RUN)
    return found | serve(python, INTERPRETED, tmp_path_factory.mktemp("interpreted"), 8, vllm_cpu.INTERPRETED)


@pytest.mark.parametrize("form", [*FORMS, *INTERPRETED])
def test_answers_are_the_targets_in_as_many_rounds_as_specforge_counts(form, served):
    said, results = served[form]
    for name in (form, *([f"{form}, for vLLM"] if form in AS_VLLM_TOO else [])):
        assert results[name].get("answers") == said.answers, results[name].get("error")
        assert results[name]["rounds"] == said.rounds, name


@pytest.mark.parametrize("form", ALONE)
def test_the_folder_alone_serves_target_and_draft(form, served):
    said, results = served[form]
    alone = results[f"{form}, alone"]
    assert alone.get("answers") == said.answers, alone.get("error")
    assert any(name.endswith("fc.weight") for name in alone["parameters"])  # the draft is what was loaded last
