"""Exported drafts in vLLM itself: every tensor reaches a parameter, and vLLM accepts what SpecForge says.

vLLM lives in an environment of its own, which ``--vllm-python`` names (docs/user-guide.md, section 5, says how to make
it). All engines of a kind run one after another in one process (``tests/vllm_cpu/run.py``).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules import algorithms
from specforge.decoding.decoder import decode
from specforge.decoding.drafters import Features, TrainedDrafter
from specforge.inference.target_engine import HFTargetEngine
from specforge.modeling.draft import config_fields
from specforge.modeling.draft.servers import Proof
from specforge.modeling.draft.standalone.drafter import StandaloneDrafter
from tests import vllm_cpu
from tests.lightning_modules.test_mtp_deepseek import memorise, write_deepseek
from tests.test_sglang import DEEPSEEK_YARN, YARN, as_rows, change_config, mimo, place
from tests.tiny import write_target

GAMMA, END = 3, 256
PROMPTS = 6

LAYERS: dict[str, object] = {"layer_ids": [1, 3, 4]}
EAGLE = {**LAYERS, "init_from": "target", "steps": GAMMA}
SMALL = {"draft_vocab_size": 200}
BLOCK = {"block_size": GAMMA + 1, "num_hidden_layers": 2}
SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 16, "use_sliding_window": True}
SCALED = {"rope_parameters": {**YARN, "attention_factor": 0.9}}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "architectures": ["Eagle3DeepseekV2ForCausalLM"],
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}


class Form(NamedTuple):
    """A draft to serve."""

    algorithm: str
    config: Mapping[str, object]
    options: Mapping[str, object] = MappingProxyType({})
    target: str = "llama"


FORMS = {
    "eagle3": Form("eagle3", SMALL, EAGLE),
    "eagle3.1": Form("eagle3", {**SMALL, "fc_norm": True, "norm_output": True}, EAGLE),
    "eagle3, other norms": Form("eagle3", {"norm_before_fc": True, "norm_before_residual": True, **SCALED}, EAGLE),
    "eagle3, latent": Form(
        "eagle3", {**SMALL, **LATENT, **DEEPSEEK_YARN}, {"layer_ids": [0, 1], "steps": GAMMA}, "deepseek"
    ),
    "peagle": Form("peagle", {**SMALL, "num_hidden_layers": 2}, LAYERS),
    "dflash": Form("dflash", {**BLOCK, **SCALED}, LAYERS),
    "dflash, draft vocabulary": Form("dflash", {**BLOCK, **SMALL}, LAYERS),
    "dflash, sliding": Form("dflash", {**BLOCK, **SLIDING}, LAYERS),
    "medusa": Form("medusa", {"num_draft_heads": GAMMA, "num_head_blocks": 2}),
    "standalone": Form("standalone", {"num_hidden_layers": 2}),
    "mtp, mimo": Form("mtp", {}, {"init_from": "target_mtp"}, "mimo"),
    "mtp, deepseek": Form("mtp", {"mask_first": True}, {"init_from": "target_mtp"}, "deepseek"),
}
# Those that need the model runner that vLLM uses on GPUs; on a CPU, Triton's interpreter runs its kernels.
INTERPRETED = {
    "dspark": Form("dspark", {**BLOCK, "block_size": GAMMA}, LAYERS),
    "dspark, draft vocabulary": Form("dspark", {**BLOCK, **SMALL, "block_size": GAMMA}, LAYERS),
    "dflash, sliding and full": Form("dflash", {**BLOCK, **MIXED}, LAYERS),
    "eagle3, second runner": Form("eagle3", SMALL, EAGLE),
    "dflash2": Form("dflash2", BLOCK, LAYERS),
}

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


class Served(NamedTuple):
    """A draft in vLLM, and what SpecForge says of it."""

    form: tuple[str, str]  # the algorithm, and the form in the table of its format
    folder: Path
    answers: list[list[int]]  # of the target, by transformers
    rounds: list[int]
    theirs: dict[str, Any]  # from tests/vllm_cpu/run.py
    held: dict[str, Tensor]


@pytest.fixture(scope="session")
def python(pytestconfig: pytest.Config) -> str:
    """The interpreter of vLLM's environment."""
    path = pytestconfig.getoption("--vllm-python")
    if not path:
        pytest.skip("vLLM is elsewhere: --vllm-python names its interpreter (docs/user-guide.md, section 5)")
    return str(path)


class FromTheFirstToken(StandaloneDrafter):
    """As vLLM's: it reads the first token of a text, too."""

    def observe(self, tokens: Sequence[int], features: Features) -> None:
        """The base class leaves out the first token that it is given."""
        super().observe(tokens if self._tokens else [tokens[0], *tokens], features)


def make_target(name: str, folder: Path) -> Path:
    """A target whose heads have a size that vLLM runs on a CPU."""
    if name == "mimo":
        return mimo(folder, hidden=128)
    if name == "deepseek":
        sizes = {key: size for key, size in LATENT.items() if key != "architectures"}
        write_deepseek(folder, hidden_size=128, intermediate_size=128, moe_intermediate_size=64, **sizes)
        change_config(
            folder, num_nextn_predict_layers=1, topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1
        )
        return folder
    return write_target(folder, layers=6, hidden=128)


def prepare(name: str, form: Form, target: Path, root: Path, tokens: int) -> tuple[dict[str, Any], Served]:
    """A draft that has learned half of the target's answers, exported, and the job that serves it."""
    torch.manual_seed(0)
    module = algorithms()[form.algorithm](str(target), draft_config=dict(form.config), **form.options)
    size = len(module.draft.d2t)
    if size < module.target.vocab_size:
        module.draft.set_vocabulary(torch.randperm(module.target.vocab_size)[:size].sort().values)
    engine = HFTargetEngine(module.target, "float32")
    prompts = torch.randint(0, 256, (PROMPTS, 9), generator=torch.Generator().manual_seed(0)).tolist()
    answers = engine.generate(prompts, max_new_tokens=tokens, end_ids=[END])
    memorise(module, engine, [[*p, *a] for p, a in zip(prompts[: PROMPTS // 2], answers, strict=False)])
    module.eval()
    head = module.target_head(torch.device("cpu"))

    def drafter() -> TrainedDrafter:
        made = module.drafter(head, torch.float32)
        if isinstance(made, StandaloneDrafter):
            return FromTheFirstToken(made.model, made.target_ids, made.vocab_size)
        return made

    mine = decode(engine.model, drafter, prompts, gamma=GAMMA, max_new_tokens=tokens, end_ids=[END])
    assert [d.tokens for d in mine] == answers
    assert sum(d.rounds for d in mine) < 0.9 * sum(d.counted for d in mine)  # something is accepted
    export, folder = module.export_format, root / f"{name}-draft"
    kind = form.algorithm, export.form(config_fields(module.draft), module.target)
    export.to_vllm(module.draft, module.target, folder, "float32")
    words = shlex.split(export.vllm.command(str(target), folder, GAMMA))
    work = {
        "name": name,
        "model": words[2],
        "speculative": json.loads(words[4]),
        "prompts": prompts,
        "max_tokens": tokens,
        "end_ids": [END],
    }
    return work, Served(kind, folder, answers, [d.rounds for d in mine], {}, {})


def run(python: str, jobs: Iterable[dict[str, Any]], root: Path, program: Sequence[str]) -> None:
    """Run jobs in vLLM's environment; their results are in ``root``."""
    (root / "jobs.json").write_text(json.dumps(list(jobs)))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, *program, root / "jobs.json"],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def serve(python: str, forms: Mapping[str, Form], root: Path, tokens: int, program: Sequence[str]) -> dict[str, Served]:
    """Serve every form."""
    targets = {name: make_target(name, root / name) for name in {form.target for form in forms.values()}}
    prepared = {name: prepare(name, form, targets[form.target], root, tokens) for name, form in forms.items()}
    run(python, [job for job, _ in prepared.values()], root, program)
    return {
        name: served._replace(
            theirs=json.loads((root / f"{name}.json").read_text()), held=load_file(root / f"{name}.safetensors")
        )
        for name, (_, served) in prepared.items()
    }


@pytest.fixture(scope="module")
def served(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """Every form in vLLM."""
    found = serve(python, FORMS, tmp_path_factory.mktemp("vllm"), 24, vllm_cpu.RUN)
    return found | serve(python, INTERPRETED, tmp_path_factory.mktemp("interpreted"), 8, vllm_cpu.INTERPRETED)


PREFIXES = {"mtp, mimo": "model.mtp_layers.0.", "mtp, deepseek": "model.layers.2."}  # of a draft in its target
# Parameters that vLLM takes from the target, or has but does not read.
NOT_THE_DRAFTS = (
    r"(model\.)?embed_tokens.weight|lm_head.weight|model.mask_embedding|model.layers.[1-9].hidden_norm.weight"
)


@pytest.mark.parametrize("form", [*FORMS, *INTERPRETED])
def test_every_tensor_reaches_a_parameter_and_no_parameter_is_left(form, served):
    folder, held = served[form].folder, dict(served[form].held)
    assert held, served[form].theirs
    written = load_file(folder / "model.safetensors")
    written = {n: x for n, x in written.items() if n.startswith(PREFIXES.get(form, "")) and n != "t2d"}
    if "d2t" in written:
        assert torch.equal(held.pop("draft_id_to_target_id"), written.pop("d2t"))
    for name, tensor in written.items():
        rows = tensor.reshape(1, -1) if name == "mask_hidden" else tensor
        found = place(rows, held)
        assert found is not None, f"vLLM skips {name}"
        parameter, first = found
        as_rows(held[parameter])[first : first + len(as_rows(rows))] = torch.inf
    left = {n for n, x in held.items() if bool(torch.isnan(x).any())}
    assert not [n for n in left if not re.fullmatch(NOT_THE_DRAFTS, n)], "vLLM has these at random"


@pytest.mark.parametrize("form", [*FORMS, *INTERPRETED])
def test_answers_are_the_targets_in_as_many_rounds_as_specforge_counts(form, served):
    found = served[form]
    assert found.theirs.get("answers") == found.answers, found.theirs.get("error")
    assert found.theirs["rounds"] == found.rounds


def test_what_the_formats_say_of_vllm_is_what_is_tested(served):
    said = {
        (name, form)
        for name, module in algorithms().items()
        for form, proof in module.export_format.vllm.forms.items()
        if proof is Proof.SERVED
    }
    assert {found.form for found in served.values()} == said
