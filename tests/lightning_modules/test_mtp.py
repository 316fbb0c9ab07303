"""The MTP module against the definition written out in mtp_reference.py, and targets' own MTP weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_modules.mtp import MTPModule
from specforge.contracts import LAST_HIDDEN_STATES, mask_spans
from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from specforge.modeling.draft.mtp.export import mtp_tensors
from tests.lightning_modules.mtp_reference import LatentMTPReference, MTPReference
from tests.lightning_modules.test_eagle3 import V, make_head, pack, run, same, small_target
from tests.lightning_modules.test_heads import documents_of, mask_prompts

__all__ = ["small_target"]

H, STEPS = 16, 3
LATENT = {
    "architectures": ["DeepseekMTPDraft"],
    "q_lora_rank": 10,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 6,
    "v_head_dim": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
EXPERTS = {
    **LATENT,
    "moe": True,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 6,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}


def make_module(target: Path, draft_vocab: int = 20, config: dict | None = None, **options) -> MTPModule:
    torch.manual_seed(0)
    fields = {"draft_vocab_size": draft_vocab, **ROPE, **(config or {})}
    module = MTPModule(str(target), draft_config=fields, **options)
    module.draft.double()
    for name, parameter in module.draft.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    for name, bias in module.draft.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(bias, std=0.2)
    if draft_vocab < V:
        module.draft.set_vocabulary(torch.randperm(V)[:draft_vocab].sort().values)
    return module


@pytest.mark.parametrize(
    ("options", "draft_vocab", "config", "share"),
    [
        ({}, 20, {}, 0.6),
        ({"label": "target", "chunk": 1}, 20, {"norm_output": False}, 0.6),
        ({"step_decay": 1.0}, V, {"qk_norm": True}, 1.0),
        ({"loss": "kl", "chunk": 3}, 20, {"attention_bias": True}, 0.6),
        ({}, 20, {"mask_first": True}, 1.0),
        ({"loss": "lk_alpha"}, 20, {"qk_norm": True, "attention_bias": True, "norm_output": False}, 0.6),
        ({}, 20, LATENT, 0.6),
        ({"loss": "kl", "label": "target", "chunk": 2}, 20, {**LATENT, "norm_output": False}, 0.6),
        ({}, 20, EXPERTS, 0.6),
        ({}, 20, {**EXPERTS, "norm_topk_prob": False, "norm_output": False}, 0.6),
    ],
)
def test_loss_gradients_and_hits_are_those_of_the_definition(small_target, options, draft_vocab, config, share):
    module, head = make_module(small_target, draft_vocab, config, **options), make_head()
    documents = documents_of((9, 12, 3, 7, 1, 2), share=share)
    documents[1].loss_mask[:5] = False
    documents[1].spans = mask_spans(documents[1].loss_mask, (12,))
    weights = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in module.draft.state_dict().items()
    }
    module.draft.config.norm_output = config.get("norm_output", True)
    definition = LatentMTPReference if "kv_lora_rank" in config else MTPReference
    reference = definition(weights, module.draft.config, head.embedding, head.lm_head)
    parts = [
        reference.document(
            d.input_ids,
            d.loss_mask,
            d.features[LAST_HIDDEN_STATES],
            steps=STEPS,
            beta=options.get("step_decay", 0.6),
            loss=options.get("loss", "ce"),
            label=options.get("label", "data"),
        )
        for d in documents
    ]
    loss = torch.stack([part[0] for part in parts]).sum()
    loss.backward()
    hits, rows = (torch.tensor([part[i] for part in parts]).sum(0) for i in (2, 3))
    gradients = {name: weights[name].grad for name, _ in module.draft.named_parameters()}
    batch = pack(documents)
    same(run(module, head, [batch]), (loss.detach(), gradients, hits))
    output = module.training_loss(batch, head)
    assert output.num_supervised == sum(part[1] for part in parts)
    assert output.rows.tolist() == rows.tolist()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("config", [{"qk_norm": True}, LATENT, EXPERTS], ids=["qwen3", "latent", "experts"])
def test_packed_is_one_by_one(small_target, config, masked):
    module, head = make_module(small_target, config=config), make_head()
    documents = documents_of((8, 3, 11, 5), share=1.0)
    if masked:
        mask_prompts(documents)
    same(run(module, head, [pack(documents)]), run(module, head, documents))


def test_padding_chunks_and_order_change_nothing(small_target):
    head, documents = make_head(), documents_of((8, 3, 11, 5))
    expected = run(make_module(small_target), head, [pack(documents)])
    same(run(make_module(small_target), head, [pack(documents, padding=13)]), expected)
    same(run(make_module(small_target), head, [pack(documents[::-1])]), expected)
    for chunk in (1, 4, 100):
        same(run(make_module(small_target, chunk=chunk), head, [pack(documents)]), expected)


def test_nothing_leaks_across_documents(small_target):
    module, head = make_module(small_target), make_head()
    first, second = documents_of((8, 9), share=1.0)
    alone = run(module, head, [second])
    first.features = {name: x * 100 for name, x in first.features.items()}
    first.input_ids = first.input_ids.flip(0)
    for order in ([first, second], [second, first]):
        both, other = run(module, head, [pack(order)]), run(module, head, [first])
        torch.testing.assert_close(both[0] - other[0], alone[0], rtol=1e-5, atol=1e-5, check_dtype=False)


def test_a_batch_without_supervised_rows_gives_zero_gradients(small_target):
    module, head = make_module(small_target), make_head()
    loss, gradients, _ = run(module, head, [pack(documents_of((2, 1), share=1.0))])
    assert float(loss) == 0.0
    assert gradients.keys() == dict(module.draft.named_parameters()).keys()
    assert not any(bool(x.any()) for x in gradients.values())


def test_bf16_gradients_are_close_to_fp64(small_target):
    module, head = make_module(small_target, config={"qk_norm": True, "attention_bias": True}), make_head()
    batch = pack(documents_of((30, 40)))
    _, exact, _ = run(module, head, [batch])
    module.draft.float()
    batch.features = {name: x.float() for name, x in batch.features.items()}
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_loss(batch, TargetHead(head.embedding, head.lm_head, torch.bfloat16)).loss
    loss.backward()
    for name, parameter in module.draft.named_parameters():
        error = (parameter.grad.double() - exact[name]).norm() / exact[name].norm()
        # The softmax cancels a bias of the keys, up to the rotation: what is left is small.
        assert error < (0.3 if name.endswith("k_proj.bias") else 0.1), (name, float(error))


NAMES = {
    "deepseek": ("model.layers.8.", "", ("enorm", "hnorm", "eh_proj", "shared_head.norm")),
    "qwen": ("mtp.", "layers.0.", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")),
    "mimo": ("model.mtp_layers.0.", "", ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")),
}


def write_mtp_target(small_target: Path, folder: Path, family: str, extra: dict | None = None) -> dict[str, Tensor]:
    """A copy of the tiny target with MTP weights of its own under a family's names; returns them by those names."""
    shutil.copytree(small_target, folder)
    tensors = load_file(folder / "model.safetensors")
    g = torch.Generator().manual_seed(1)
    prefix, layer, (embed, hidden, proj, norm) = NAMES[family]
    last = "model.layers.7."
    mine = {
        prefix + layer + n.removeprefix(last): torch.randn(x.shape, generator=g)
        for n, x in tensors.items()
        if n.startswith(last)
    }
    mine |= {f"{prefix}{n}.weight": torch.randn(H, generator=g) for n in (embed, hidden, norm)}
    mine[f"{prefix}{proj}.weight"] = torch.randn(H, 2 * H, generator=g)
    save_file({**tensors, **mine, **(extra or {})}, folder / "model.safetensors", metadata={"format": "pt"})
    return mine


@pytest.mark.parametrize("family", sorted(NAMES))
def test_a_targets_own_mtp_weights_are_read_and_stitched_back(small_target, tmp_path, family):
    theirs = write_mtp_target(small_target, tmp_path / "target", family)
    module = MTPModule(str(tmp_path / "target"), init_from="target_mtp")
    prefix, layer, names = NAMES[family]
    own = module.draft.state_dict()
    assert torch.equal(own["layer.self_attn.k_proj.weight"], theirs[f"{prefix}{layer}self_attn.k_proj.weight"])
    for mine, name in zip(("embed_norm", "hidden_norm", "norm"), (names[0], names[1], names[3]), strict=True):
        assert torch.equal(own[f"{mine}.weight"], theirs[f"{prefix}{name}.weight"])
    first, second = own["proj.weight"].chunk(2, dim=1)
    parts = [second, first] if family == "mimo" else [first, second]
    assert torch.equal(torch.cat(parts, dim=1), theirs[f"{prefix}{names[2]}.weight"])
    assert module.draft.norm_output  # SGLang feeds back the normed state, of every family

    with torch.no_grad():
        for parameter in module.draft.parameters():
            parameter.add_(1)
    if family == "qwen":
        with pytest.raises(UserError, match="SGLang has Qwen MTP modules with experts or gated attention only"):
            module.export_format.to_sglang(module.draft, module.target, tmp_path / "stitched", "float32")
        return
    module.export_format.to_sglang(module.draft, module.target, tmp_path / "stitched", "float32")
    before = load_file(tmp_path / "target" / "model.safetensors")
    after = load_file(tmp_path / "stitched" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, theirs[name] + 1 if name in theirs else before[name]), name
    again = mtp_tensors(TargetFiles.find(str(tmp_path / "stitched")))
    assert all(torch.equal(again[n], p) for n, p in module.draft.named_parameters())
    assert json.loads((tmp_path / "stitched" / "config.json").read_text()) == json.loads(
        (tmp_path / "target" / "config.json").read_text()
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "stitched")
    with pytest.raises(UserError, match=r"contains more than this command writes"):
        module.export_format.to_sglang(module.draft, module.target, tmp_path / "stitched", "float32")
    with torch.no_grad():
        module.draft.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"tensor norm.weight holds NaN"):
        module.export_format.to_sglang(module.draft, module.target, tmp_path / "damaged", "float32")
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("family", sorted(NAMES))
def test_the_final_norm_of_a_target_is_not_that_of_its_mtp_module(small_target, tmp_path, family):
    write_mtp_target(small_target, tmp_path / "target", family)
    expected = load_file(small_target / "model.safetensors")["model.norm.weight"]
    assert torch.equal(TargetFiles.find(str(tmp_path / "target")).final_norm(), expected)


def test_start_from_the_last_layer_reads_it_over_the_hidden_state(small_target):
    module = MTPModule(str(small_target), init_from="target")
    draft, files = module.draft, module.target
    assert torch.equal(draft.layer.mlp.up_proj.weight, files.layer_tensor(7, "mlp.up_proj.weight"))
    assert torch.equal(draft.norm.weight, files.final_norm())
    assert torch.equal(draft.proj.weight[:, H:], torch.eye(H))
    assert 0 < float(draft.proj.weight[:, :H].detach().std()) < 0.01


def test_bad_options_are_refused_by_name(small_target, tmp_path):
    target = str(small_target)
    with pytest.raises(UserError, match="has no MTP weights of its own"):
        MTPModule(target, init_from="target_mtp")
    with pytest.raises(UserError, match="num_hidden_layers is 2"):
        MTPModule(target, draft_config={"num_hidden_layers": 2})
    with pytest.raises(UserError, match="is not a draft of mtp"):
        MTPModule(target, draft_config={"architectures": ["MedusaDraft"], "num_draft_heads": 4})
    module = MTPModule(target)
    with pytest.raises(UserError, match="has no MTP weights of its own"):
        module.export_format.to_sglang(module.draft, module.target, tmp_path / "stitched")
    with pytest.raises(UserError, match="reads only the last hidden state"):
        MTPModule.capture_policy(module.target, [1])


@pytest.mark.parametrize(
    "name", ["mlp.experts.0.up_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "linear_attn.A_log"]
)
def test_a_layer_of_another_kind_is_refused_by_its_tensor(small_target, tmp_path, name):
    extra = {f"model.layers.8.{name}": torch.ones(2, 2)}
    write_mtp_target(small_target, tmp_path / "target", "deepseek", extra)
    with pytest.raises(UserError, match=f"layer.{name} does not belong to a Llama or Qwen3 layer"):
        MTPModule(str(tmp_path / "target"), init_from="target_mtp")


def test_an_exported_draft_can_be_started_from(small_target, tmp_path):
    module = make_module(small_target)
    module.draft.float()
    module.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    config = str(tmp_path / "draft" / "config.json")
    again = MTPModule(str(small_target), draft_config=config, init_from=str(tmp_path / "draft"))
    for name, tensor in module.draft.state_dict().items():
        assert torch.equal(again.draft.state_dict()[name], tensor), name
