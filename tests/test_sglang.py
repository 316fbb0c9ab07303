"""Exported drafts in SGLang itself: every tensor reaches a parameter, and the server accepts what SpecForge says.

SGLang lives in an environment of its own, which ``--sglang-python`` names (docs/user-guide.md, section 5, says how to
make it); the kernels that it has no CPU build of are stood in for by ``tests/sglang_cpu``. It is imported once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from lightning_modules import algorithms
from lightning_modules.base import DraftModule
from specforge.decoding.decoder import decode
from specforge.inference.target_engine import HFTargetEngine
from specforge.modeling.draft import config_fields
from specforge.modeling.draft.servers import Proof
from tests.lightning_modules.test_mtp import small_target, write_mtp_target
from tests.lightning_modules.test_mtp_deepseek import deepseek, memorise, write_deepseek
from tests.modeling.draft.eagle3.test_export import LATENT
from tests.sglang_cpu import DRAFTS, load, serve
from tests.tiny import write_tokenizer

__all__ = ["deepseek", "small_target"]

LLAMA = "LlamaForCausalLMEagle3"
SMALL = {"draft_vocab_size": 64}
BLOCKS = {"num_hidden_layers": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
DEEPSEEK_YARN = {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}
SMALL_DOMINO = {"dflash_config": {"gru_hidden_dim": 16, "emb_dim": 8}}
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "eagle3": ("eagle3", SMALL),
    "eagle3.1": ("eagle3", {**SMALL, "fc_norm": True, "norm_output": True}),
    "eagle3, norm before fc": ("eagle3", {**SMALL, "norm_before_fc": True, **DEEPSEEK_YARN}),
    "eagle3, latent": ("eagle3", {**SMALL, **LATENT, **DEEPSEEK_YARN}),
    "dflash": ("dflash", {**BLOCKS, "rope_parameters": YARN}),
    "dflash2": ("dflash2", BLOCKS),
    "domino": ("domino", {**BLOCKS, **SMALL_DOMINO}),
    "dspark": ("dspark", BLOCKS),
    "dspark, gated": ("dspark", {**BLOCKS, "markov_head_type": "gated"}),
    "dspark, rnn": ("dspark", {**BLOCKS, "markov_head_type": "rnn"}),
    "standalone": ("standalone", {"num_hidden_layers": 2}),
}

# What published targets of DeepSeek's architecture have in their configs, beside what transformers writes.
DEEPSEEK = {"num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
PREFIXES = {"mtp, mimo": "model.mtp_layers.0.", "mtp, deepseek": "model.layers.2."}

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@pytest.fixture(scope="session")
def python(pytestconfig: pytest.Config) -> str:
    """The interpreter of SGLang's environment."""
    path = pytestconfig.getoption("--sglang-python")
    if not path:
        pytest.skip("SGLang is elsewhere: --sglang-python names its interpreter (docs/user-guide.md, section 5)")
    return str(path)


def as_if_trained(module: DraftModule) -> DraftModule:
    """No weight as it was initialised."""
    if len(module.draft.d2t) < module.target.vocab_size:
        module.draft.set_vocabulary(torch.arange(len(module.draft.d2t)) * 4)
    with torch.no_grad():
        for parameter in module.draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def mtp_targets(small_target: Path, deepseek: Path, root: Path) -> dict[str, Path]:
    """Targets with MTP weights of their own, of each architecture that SGLang takes such weights of."""
    attention = "model.mtp_layers.0.self_attn."
    sizes = {"q": 16, "k": 8, "v": 8}
    biases = {f"{attention}{n}_proj.bias": torch.randn(size) for n, size in sizes.items()}
    write_mtp_target(small_target, root / "mimo", "mimo", biases)
    shutil.copytree(deepseek, root / "deepseek")
    for name, fields in {
        "mimo": {"model_type": "qwen2", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1},
        "deepseek": DEEPSEEK,
    }.items():
        change_config(root / name, **fields)
    return {f"mtp, {name}": root / name for name in ("mimo", "deepseek")}


@pytest.fixture(scope="module")
def loaded(python, target, small_target, deepseek, tmp_path_factory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Every form's exported folder and what SGLang holds after loading it."""
    root = tmp_path_factory.mktemp("loaded")
    folders: dict[str, Path] = {}
    torch.manual_seed(0)
    modules = {}
    for name, (algorithm, config) in FORMS.items():
        options = {} if algorithm == "standalone" else {"layer_ids": [1, 3, 4]}
        modules[name] = algorithms()[algorithm](str(target), draft_config=config, **options)
    for name, folder in mtp_targets(small_target, deepseek, root).items():
        modules[name] = algorithms()["mtp"](str(folder), init_from="target_mtp")
    for name, module in modules.items():
        folders[name] = root / f"{len(folders)}"
        as_if_trained(module).export_format.to_sglang(module.draft, module.target, folders[name], "float32")
    load(python, root / "log", target, *(f"{folder}:{folder}.loaded" for folder in folders.values()))
    return {name: (folder, load_file(f"{folder}.loaded")) for name, folder in folders.items()}


def as_rows(x: Tensor) -> Tensor:
    """A view of ``[..., n]`` as ``[rows, n]``, and of a vector as single numbers."""
    return x.view(-1, x.shape[-1] if x.ndim > 1 else 1)


def place(tensor: Tensor, held: dict[str, Tensor]) -> tuple[str, int] | None:
    """The parameter and the row where a tensor's rows lie, one after another."""
    rows = as_rows(tensor)
    for name, into in ((name, as_rows(parameter)) for name, parameter in held.items()):
        if into.shape[1] != rows.shape[1]:
            continue
        for first in (into == rows[0]).all(1).nonzero().flatten().tolist():
            if torch.equal(into[first : first + len(rows)], rows):
                return name, first
    return None


@pytest.mark.parametrize("form", [*FORMS, *PREFIXES])
def test_every_tensor_reaches_a_parameter_and_no_parameter_is_left(form, loaded):
    folder, held = loaded[form]
    written = load_file(folder / "model.safetensors")
    if form in PREFIXES:
        copies = ("embed_tokens.weight", "shared_head.head.weight")  # of the target's own, as they were
        written = {n: x for n, x in written.items() if n.startswith(PREFIXES[form]) and not n.endswith(copies)}
    if "d2t" in written:
        assert torch.equal(held.pop("hot_token_id"), torch.arange(64) + written.pop("d2t"))
        written.pop("t2d")
    for name, tensor in written.items():
        found = place(tensor, held)
        assert found is not None, f"SGLang skips {name}"
        parameter, first = found
        as_rows(held[parameter])[first : first + len(as_rows(tensor))] = torch.inf
    left = {n for n, x in held.items() if not bool(torch.isinf(x).all())}
    assert left <= {"model.embed_tokens.weight", "lm_head.weight"}, "SGLang has these at random"


def mimo(folder: Path, hidden: int = 32) -> Path:
    """A random target of MiMo's architecture, whose MTP module is near its last layer."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=264,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    last, mine = "model.layers.3.", PREFIXES["mtp, mimo"]
    module = {
        mine + n.removeprefix(last): x + 0.01 * torch.randn(x.shape) for n, x in tensors.items() if n.startswith(last)
    }
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        module[f"{mine}{name}.weight"] = torch.rand(hidden) + 0.5
    module[f"{mine}input_proj.weight"] = torch.cat([torch.eye(hidden), 0.1 * torch.randn(hidden, hidden)], dim=1)
    save_file({**tensors, **module}, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1)
    return folder


def mtp_target(family: str, folder: Path) -> Path:
    """A target with the MTP module of a family."""
    if family == "MiMo":
        return mimo(folder)
    change_config(write_deepseek(folder), **DEEPSEEK)
    return folder


class Form(NamedTuple):
    """A draft to serve: its algorithm, its form in the table of its format, and its config."""

    algorithm: str
    name: str
    config: Mapping[str, object]


SERVED = {
    "eagle3": Form("eagle3", LLAMA, {"draft_vocab_size": 200}),
    "eagle3.1": Form("eagle3", LLAMA, {"draft_vocab_size": 200, "fc_norm": True, "norm_output": True}),
    "eagle3, latent": Form("eagle3", LATENT["architectures"][0], {"draft_vocab_size": 200, **LATENT}),
    "standalone": Form("standalone", "any causal language model", {"num_hidden_layers": 2}),
    "mtp, mimo": Form("mtp", "MiMo", {}),
    "mtp, deepseek": Form("mtp", "DeepSeek NextN", {}),
    "dflash": Form("dflash", "DFlashDraftModel", {**BLOCKS, "block_size": 4}),
    "dflash2": Form("dflash2", "DFlash2DraftModel", {**BLOCKS, "block_size": 4}),
    "domino": Form("domino", "DominoDraftModel", {**BLOCKS, **SMALL_DOMINO, "block_size": 4}),
    "dspark": Form("dspark", "Qwen3DSparkModel", {**BLOCKS, "block_size": 3}),
}


def test_what_the_formats_say_of_sglang_is_what_is_tested():
    said = {
        (name, form)
        for name, module in algorithms().items()
        for form, proof in module.export_format.sglang.forms.items()
        if proof is Proof.SERVED
    }
    assert {(form.algorithm, form.name) for form in SERVED.values()} == said


@pytest.mark.parametrize("name", SERVED)
def test_the_server_answers_as_the_target_and_accepts_what_specforge_says(name, python, target, tmp_path):
    form = SERVED[name]
    torch.manual_seed(0)
    options: dict[str, object] = {"draft_config": dict(form.config)}
    if form.algorithm == "mtp":
        target, options = mtp_target(form.name, tmp_path / "target"), {"init_from": "target_mtp"}
    elif form.algorithm != "standalone":
        options |= {"layer_ids": [1, 3, 4], **({"init_from": "target"} if form.name == LLAMA else {})}
    module = algorithms()[form.algorithm](str(target), **options)
    if len(module.draft.d2t) < 264:
        module.draft.set_vocabulary(torch.randperm(264)[: len(module.draft.d2t)].sort().values)
    engine = HFTargetEngine(module.target, "float32")
    prompts = torch.randint(0, 256, (6, 9)).tolist()
    answers = engine.generate(prompts, max_new_tokens=24, end_ids=[256])
    memorise(module, engine, [[*p, *a] for p, a in zip(prompts[:3], answers[:3], strict=True)])
    module.eval()
    head = module.target_head(torch.device("cpu"))
    mine = decode(
        engine.model, lambda: module.drafter(head, torch.float32), prompts, gamma=3, max_new_tokens=24, end_ids=[256]
    )
    assert sum(d.rounds for d in mine) < 0.8 * sum(d.counted for d in mine)  # something is accepted
    folder, export = tmp_path / "draft", module.export_format
    assert export.form(config_fields(module.draft), module.target) == form.name
    export.to_sglang(module.draft, module.target, folder, "float32")
    options = export.sglang.command(str(target), folder, 3).split()[3:]
    with serve(python, tmp_path / "log", *options, program=DRAFTS) as server:
        theirs = [server.answer(prompt, 24, [256]) for prompt in prompts]
    assert [reply["output_ids"] for reply in theirs] == answers == [d.tokens for d in mine]
    assert [reply["meta_info"]["spec_verify_ct"] for reply in theirs] == [d.rounds for d in mine]
