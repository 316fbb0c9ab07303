"""Exported drafts: the field's names, nothing damaged, the same logits when read back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_modules.eagle3 import Eagle3Module
from lightning_modules.optimizers import OptimizerOptions, build_optimizer
from specforge.errors import UserError
from specforge.files import read_json
from specforge.modeling.draft import build_draft
from specforge.modeling.draft.eagle3.export import Eagle3Format

FORM = Eagle3Format()


@pytest.fixture
def module(target) -> Eagle3Module:
    """A draft that looks trained: no weight as it was initialised."""
    torch.manual_seed(0)
    module = Eagle3Module(str(target), draft_config={"draft_vocab_size": 64})
    module.draft.set_vocabulary(torch.arange(64) * 4)
    with torch.no_grad():
        for parameter in module.draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def test_sglang_form(module, target, tmp_path):
    FORM.to_sglang(module.draft, module.target, tmp_path / "draft")
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == 64
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert config["eagle_config"]["use_aux_hidden_state"] is True
    assert {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"} <= set(tensors)
    layer = {name.split(".", 1)[1] for name in tensors if name.startswith("midlayer.")}
    assert {"self_attn.q_proj.weight", "mlp.gate_proj.weight", "hidden_norm.weight", "input_layernorm.weight"} <= layer
    assert (torch.arange(64) + tensors["d2t"]).tolist() == [4 * i for i in range(64)]
    assert tensors["t2d"].nonzero().flatten().tolist() == [4 * i for i in range(64)]
    assert tensors["fc.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors["fc.weight"], module.draft.fc.weight.bfloat16())


def test_hf_form_brings_the_embedding(module, tmp_path):
    FORM.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], module.target.embedding().float())


@pytest.mark.parametrize("write", [FORM.to_hf, FORM.to_sglang])
def test_an_exported_draft_can_be_started_from(module, target, tmp_path, write):
    write(module.draft, module.target, tmp_path / "draft", "float32")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    again = Eagle3Module(str(target), draft_config=config, init_from=str(tmp_path / "draft"))
    for name, tensor in module.draft.state_dict().items():
        assert torch.equal(again.draft.state_dict()[name], tensor), name


def test_other_peoples_names_are_understood(module, target, tmp_path):
    FORM.to_sglang(module.draft, module.target, tmp_path / "draft", "float32")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    renamed = {name.replace("midlayer.", "layers.0."): x for name, x in tensors.items() if name != "t2d"}
    found = FORM.read(config, renamed, "theirs")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_draft_without_its_map_is_refused(module, tmp_path):
    with pytest.raises(UserError, match="d2t"):
        FORM.read({"vocab_size": 264, "draft_vocab_size": 64}, {"fc.weight": torch.zeros(1)}, "theirs")


@pytest.mark.parametrize(
    ("damage", "words"), [(lambda p: p.zero_(), "all zeros"), (lambda p: p.fill_(float("nan")), "NaN")]
)
def test_damaged_tensors_are_refused_and_nothing_is_written(module, tmp_path, damage, words):
    with torch.no_grad():
        damage(module.draft.midlayer.mlp.up_proj.weight)
    with pytest.raises(UserError, match=f"midlayer.mlp.up_proj.weight.*{words}"):
        FORM.to_sglang(module.draft, module.target, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def untrained(target, **config) -> Eagle3Module:
    torch.manual_seed(0)
    module = Eagle3Module(str(target), draft_config={"draft_vocab_size": 64, **config})
    module.draft.set_vocabulary(torch.arange(64))
    return module


@pytest.mark.parametrize("config", [{}, {"intermediate_size": 4096}], ids=["small", "large"])
def test_a_draft_that_was_never_trained_is_refused(target, tmp_path, config):
    module = untrained(target, **config)
    for write in (FORM.to_hf, FORM.to_sglang):
        with pytest.raises(UserError, match="the draft was not trained; train it with `specforge fit`"):
            write(module.draft, module.target, tmp_path / "draft")
        assert not (tmp_path / "draft").exists()


def test_one_optimizer_step_counts_as_training(target, tmp_path):
    """The matrices still look random, but even the smallest step moves the norms."""
    module = untrained(target, intermediate_size=4096)
    optimizer, _ = build_optimizer(OptimizerOptions(lr=1e-6), module.draft, 100)
    for parameter in module.draft.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    FORM.to_sglang(module.draft, module.target, tmp_path / "draft", "float32")


def test_a_checkpoint_with_an_optimizer_step_counts_as_trained(target, tmp_path):
    """Also if the step was too small to change weights of this dtype."""
    module = untrained(target)
    module.draft.trained = True
    FORM.to_sglang(module.draft, module.target, tmp_path / "draft", "float32")


def test_norms_that_were_folded_into_matrices_do_not_count_as_untrained(target, tmp_path):
    module = untrained(target, intermediate_size=4096)
    module.draft.midlayer.mlp.up_proj.weight.data *= 1.1
    FORM.to_sglang(module.draft, module.target, tmp_path / "draft", "float32")


def test_a_bias_may_be_zero(module, target, tmp_path):
    biased = Eagle3Module(str(target), draft_config={"draft_vocab_size": 64, "attention_bias": True})
    biased.draft.load_state_dict(module.draft.state_dict(), strict=False)
    assert not biased.draft.midlayer.self_attn.q_proj.bias.any()
    FORM.to_hf(biased.draft, biased.target, tmp_path / "draft", "float32")


def test_one_folder_names_the_captured_layers_for_both_servers(module, tmp_path):
    """SGLang reads eagle_config, which counts outputs of layers; vLLM a top-level field, which counts inputs."""
    for write in (FORM.to_hf, FORM.to_sglang):
        write(module.draft, module.target, tmp_path / "draft", "float32")
        config = json.loads((tmp_path / "draft" / "config.json").read_text())
        assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
        assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
        assert config["norm_before_residual"] is False


@pytest.mark.parametrize("field", ["norm_before_residual", "attention_bias"])
def test_fields_that_only_vllm_supports_are_refused_for_sglang(target, tmp_path, field):
    module = Eagle3Module(str(target), draft_config={"draft_vocab_size": 64, field: True})
    module.draft.set_vocabulary(torch.arange(64) * 4)
    for parameter in module.draft.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    with pytest.raises(UserError, match=f"{field} is set, which SGLang's draft does not support; use --to vllm"):
        FORM.to_sglang(module.draft, module.target, tmp_path / "draft")
    FORM.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    assert json.loads((tmp_path / "draft" / "config.json").read_text())[field] is True
    again = Eagle3Module(str(target), init_from=str(tmp_path / "draft"))
    assert all(torch.equal(again.draft.state_dict()[n], x) for n, x in module.draft.state_dict().items())


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 7.0, "factor": 4.0},
    "partial": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("rope", ROPES)
def test_positions_are_written_as_they_were_trained_in_both_spellings(module, target, tmp_path, rope):
    config = {"draft_vocab_size": 64, "rope_parameters": ROPES[rope]}
    turned = Eagle3Module(str(target), draft_config=config)
    turned.draft.load_state_dict(module.draft.state_dict())
    FORM.to_sglang(turned.draft, turned.target, tmp_path / "draft", "float32")
    written = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert written["rope_parameters"] == ROPES[rope]
    assert written["rope_theta"] == 7.0
    if rope == "partial":
        assert written["partial_rotary_factor"] == 0.5
    else:
        assert written["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    place, new = torch.device("cpu"), ("rope_parameters",)
    old = ("rope_theta", "rope_scaling", "partial_rotary_factor")
    for dropped in ((), new, old):
        again = build_draft({key: value for key, value in written.items() if key not in dropped})
        assert all(map(torch.equal, again.rotary(50, place), turned.draft.rotary(50, place)))


def test_unknown_and_missing_tensors_are_refused(module, target, tmp_path):
    FORM.to_sglang(module.draft, module.target, tmp_path / "draft", "float32")
    path = tmp_path / "draft" / "model.safetensors"
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    tensors = load_file(path)
    for change, words in (({"extra.weight": torch.ones(1)}, "extra.weight"), ({}, "fc.weight")):
        changed = {**tensors, **change}
        if not change:
            del changed["fc.weight"]
        save_file(changed, path)
        with pytest.raises(UserError, match=words):
            Eagle3Module(str(target), draft_config=config, init_from=str(tmp_path / "draft"))


def test_a_missing_eagle_config_is_refused(module):
    with pytest.raises(UserError, match="eagle_config"):
        FORM.sglang.check("LlamaForCausalLMEagle3", {}, module.target)


def test_an_export_replaces_the_old_one_whole(module, tmp_path):
    folder = tmp_path / "draft"
    FORM.to_sglang(module.draft, module.target, folder)
    FORM.to_sglang(module.draft, module.target, folder, "float32")
    assert read_json(folder / "config.json")["dtype"] == "float32"
    (folder / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"contains more than this command writes \(.*notes\.txt"):
        FORM.to_sglang(module.draft, module.target, folder)
    assert (folder / "notes.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]
