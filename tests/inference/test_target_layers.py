"""Drafts that start from the target's last layer compute what it computes, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from lightning_modules.eagle3 import Eagle3Module
from lightning_modules.mtp import MTPModule
from lightning_modules.peagle import PEagleModule
from specforge.cli.main import main
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_layers import LastLayer, _is_rms_norm, _multiplier
from tests.families import BASE, LLAMA3, YARN, write_family
from tests.tiny import recipe, write_conversations

PLAIN = {"num_key_value_heads": 2, "head_dim": 8}
# Targets whose last layer a draft can start from, also with norms of 1 + w and fused matrices.
ALIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3.1": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "internlm3": ("internlm3", {"head_dim": 8}),
    "norms of 1 + w": ("gemma", {"head_dim": 8, "hidden_activation": "silu", "hidden_act": "silu"}),
    "fused matrices": ("phi3", {}),
}


def write(kind: str, fields: dict[str, Any], folder: Path) -> Path:
    """A random target with norms far from 1."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BASE, **fields}), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.5)
    model.save_pretrained(folder)
    return folder


def started(cls: type, target: Path, **config: Any) -> Any:
    torch.manual_seed(0)
    module = cls(str(target), init_from="target", draft_config=config)
    if module.draft.d2t.shape != module.draft.t2d.shape:
        module.draft.set_vocabulary(torch.arange(0, 264, 2)[: len(module.draft.d2t)])
    module.start(module.target)
    return module


@pytest.mark.parametrize("name", ALIKE)
@torch.no_grad()
def test_with_an_embedding_of_zero_the_draft_gives_the_logits_of_the_target(name, tmp_path):
    """Its first layer, norm and head on the states before the target's last layer give the target's own logits."""
    kind, fields = ALIKE[name]
    target = write(kind, fields, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    states: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_pre_hook(
        lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    logits = model(torch.randint(0, 250, (1, 12))).logits[0]
    for cls in (Eagle3Module, PEagleModule):
        draft = started(cls, target, draft_vocab_size=100).draft
        found = draft.norm(draft.first_layer.run(states[0][0], draft.rotary)) @ draft.lm_head.weight.T
        torch.testing.assert_close(found, logits[:, draft.target_ids], rtol=1e-3, atol=1e-3)
    mtp = started(MTPModule, target).draft
    found = mtp.norm(mtp.layer.run(states[0][0], mtp.rotary)) @ TargetFiles.find(str(target)).lm_head().T
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen3", "its last layer has self_attn.k_norm.weight, which the draft's layer does not have"),
        ("qwen2", "its last layer has self_attn.k_proj.bias, which"),
        ("gemma", r"\(gemma, activation gelu_pytorch_tanh\) does not compute what .* differ by \d+%"),
        ("gemma2", "has post_feedforward_layernorm.weight, which"),
        ("gemma3", "has post_feedforward_layernorm.weight, which"),
        ("olmo2", "no input_layernorm.weight in layer 7"),
        ("glm", "self_attn.k_proj.bias, which"),
        ("glm4", "post_mlp_layernorm.weight, which"),
        ("stablelm", "input_layernorm.bias, which"),
        ("cohere", "no post_attention_layernorm.weight in layer 7"),
        ("granite", r"\(granite, activation silu\) does not compute"),
        ("smollm3", r"\(smollm3, activation silu\) does not compute"),
        ("ernie4_5", r"\(ernie4_5, activation silu\) does not compute"),
        ("phi3", r"\(phi3, activation silu\) does not compute"),
        ("nemotron", "no mlp.gate_proj.weight in layer 7"),
        ("mixtral", "no mlp.gate_proj.weight in layer 7"),
        ("gpt2", "no self_attn.q_proj.weight in layer 7"),
        ("lfm2", "no self_attn.o_proj.weight in layer 7"),
        ("recurrent_gemma", "cannot be run on its own|no self_attn"),
    ],
)
def test_a_last_layer_of_another_kind_is_refused_with_the_reason(family, words, tmp_path):
    target = write_family(family, tmp_path / "target")
    with pytest.raises(UserError, match=words) as error:
        started(Eagle3Module, target)
    assert "leave init_from out" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gemma", "does not compute"),
        ("granite", "does not compute"),
        ("gemma3", "post_feedforward_layernorm"),
        ("minicpm3", "does not compute"),
        ("glm", "does not compute"),
    ],
)
def test_an_mtp_module_starts_only_from_a_layer_of_its_own_kind(family, words, tmp_path):
    with pytest.raises(UserError, match=words):
        started(MTPModule, write_family(family, tmp_path / "target"))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "seed_oss", "deepseek_v3"])
def test_an_mtp_module_may_start_from_layers_that_eagle_drafts_do_not_have(family, tmp_path):
    started(MTPModule, write_family(family, tmp_path / "target"))


class Doubled(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize(
    ("norm", "shift"), [(LlamaRMSNorm(16), 0.0), (GemmaRMSNorm(16), 1.0), (Qwen3NextRMSNorm(16), 1.0)], ids=str
)
def test_the_multiplier_of_a_norm_follows_from_its_class(norm, shift):
    weight = torch.randn(16)
    assert torch.equal(_multiplier(norm, weight), weight + shift)
    assert _is_rms_norm(norm, weight)
    assert torch.equal(_multiplier(norm, weight.bfloat16()), weight.bfloat16() + shift)


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.LayerNorm(16, bias=False), Doubled(16), None], ids=str)
def test_other_norms_are_recognised(norm):
    assert not _is_rms_norm(norm, torch.randn(16))


def test_chosen_positions_are_allowed(tmp_path):
    target = write("llama", {}, tmp_path)
    started(Eagle3Module, target, rope_theta=77.0)


def test_a_target_is_built_without_memory_and_without_random_numbers(tmp_path):
    target = TargetFiles.find(str(write("llama", {}, tmp_path)))
    before = torch.get_rng_state()
    layer = LastLayer(target)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(x.is_meta for x in layer._backbone.parameters())
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_a_new_run_is_refused_but_a_resumed_one_is_not(tmp_path, capsys):
    """A resumed run takes its weights from the checkpoint, so a start that is now refused must not end it."""
    target = write_family("qwen3", tmp_path / "target")
    data = write_conversations(tmp_path / "c.jsonl", 16)
    for words in (
        ["prepare", "--data", data, "--target", target, "--output", tmp_path / "prompts"],
        [
            "capture",
            "--target",
            target,
            "--prompts",
            tmp_path / "prompts",
            "--output",
            tmp_path / "features",
            "--dtype",
            "float32",
        ],
    ):
        assert main([str(word) for word in words]) == 0
    path = recipe(target, tmp_path / "features", tmp_path, trainer__max_steps=1)
    assert main(["fit", "--config", str(path)]) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    again = ["fit", "--config", str(path), "--model.init_from", "target", "--trainer.max_steps", "2"]
    assert main([*again, "--ckpt_path", str(last)]) == 0
    capsys.readouterr()
    assert main([*again, "--trainer.default_root_dir", str(tmp_path / "new")]) == 2
    assert "its last layer has self_attn.k_norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "new" / "checkpoints").exists()
