"""MTP on DeepSeek-V3 targets: their own NextN weights are read, decoded with, and stitched back."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from lightning_modules.base import DraftModule
from lightning_modules.mtp import MTPModule
from specforge.contracts import TrainBatch
from specforge.decoding.decoder import decode
from specforge.errors import UserError
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import OutputHead
from tests.decoding.test_decoding import plain
from tests.tiny import write_tokenizer

LAYERS, NEXTN = 2, "model.layers.2."
BIAS = "mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest such target."""
    return write_deepseek(tmp_path_factory.mktemp("deepseek") / "target")


def write_deepseek(folder: Path, **sizes: int) -> Path:
    """A dense layer, a layer of experts, and a NextN module of the second's form with weights near it."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    fields: dict[str, Any] = dict(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=12,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=6,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    config = DeepseekV3Config(**{**fields, **sizes})
    model = DeepseekV3ForCausalLM(config)
    torch.nn.init.normal_(model.model.layers[1].mlp.gate.e_score_correction_bias, std=0.1)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    last, size = f"model.layers.{LAYERS - 1}.", config.hidden_size
    mine = {
        NEXTN + n.removeprefix(last): x + 0.01 * torch.randn(x.shape) for n, x in tensors.items() if n.startswith(last)
    }
    mine |= {f"{NEXTN}{n}.weight": torch.rand(size) + 0.5 for n in ("enorm", "hnorm", "shared_head.norm")}
    mine[f"{NEXTN}eh_proj.weight"] = torch.cat([0.1 * torch.randn(size, size), torch.eye(size)], dim=1)
    copies = {
        f"{NEXTN}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{NEXTN}shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    save_file({**tensors, **mine, **copies}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def nextn(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {n.removeprefix(NEXTN): x for n, x in tensors.items() if n.startswith(NEXTN)}


def test_the_targets_own_experts_are_read_and_stitched_back_bit_for_bit(deepseek, tmp_path):
    module, theirs = MTPModule(str(deepseek), init_from="target_mtp"), nextn(deepseek)
    experts = module.draft.layer.mlp.experts
    for i in (0, 7):
        gate, up = experts.gate_up_proj[i].chunk(2)
        for mine, name in ((gate, "gate"), (up, "up"), (experts.down_proj[i], "down")):
            assert torch.equal(mine, theirs[f"mlp.experts.{i}.{name}_proj.weight"])
    assert torch.equal(module.draft.layer.mlp.gate.e_score_correction_bias, theirs[BIAS])
    module.export_format.to_sglang(module.draft, module.target, tmp_path / "same", "float32")
    before, after = (load_file(x / "model.safetensors") for x in (deepseek, tmp_path / "same"))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, before[n]) for n, x in after.items())

    with torch.no_grad():
        for parameter in module.draft.parameters():
            parameter.add_(1)
    module.export_format.to_sglang(module.draft, module.target, tmp_path / "trained", "bfloat16")
    untrained = (BIAS, "embed_tokens.weight", "shared_head.head.weight")
    for name, tensor in nextn(tmp_path / "trained").items():
        expected = theirs[name] if name in untrained else (theirs[name] + 1).bfloat16()
        assert torch.equal(tensor, expected), name


def test_a_module_that_sglang_would_chain_otherwise_is_refused(deepseek, tmp_path):
    module = MTPModule(str(deepseek), {"norm_output": False}, init_from="target_mtp")
    with pytest.raises(UserError, match="norm_output is off"):
        module.export_format.to_sglang(module.draft, module.target, tmp_path / "stitched", "float32")
    assert not (tmp_path / "stitched").exists()


def test_the_layer_is_deepseeks_own(deepseek):
    """What is fed back without ``norm_output`` is transformers' decoder layer's output on the projected input."""
    module = MTPModule(str(deepseek), {"norm_output": False}, init_from="target_mtp")
    draft, ids = module.draft, torch.arange(3, 14)
    config = DeepseekV3Config.from_pretrained(deepseek, attn_implementation="eager")
    model = DeepseekV3ForCausalLM(config).eval()
    layer, tensors = model.model.layers[1], draft.state_dict()
    own = {n.removeprefix("layer."): x for n, x in tensors.items() if n.startswith("layer.")}
    layer.load_state_dict(own)
    head = module.target_head(torch.device("cpu"))
    hidden = torch.randn(len(ids), 32)
    x = torch.cat([draft.embed_norm(head.embed(ids)), draft.hidden_norm(hidden)], dim=1) @ draft.proj.weight.T
    positions = torch.arange(len(ids))[None]
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)[None, None]
    angles = model.model.rotary_emb(x[None], positions)
    expected = layer(x[None], attention_mask=mask, position_embeddings=angles)
    expected = expected[0] if isinstance(expected, tuple) else expected
    decoder = draft.decoder(OutputHead(module.target.lm_head()), torch.float32)
    for end in range(1, len(ids) + 1):
        _, state = decoder.extend(hidden[end - 1 : end], head.embed(ids[end - 1 : end]))
        torch.testing.assert_close(state, expected.view(len(ids), -1)[end - 1], rtol=1e-4, atol=1e-4)


def memorise(module: DraftModule, engine: HFTargetEngine, texts: list[list[int]], steps: int = 60) -> None:
    """Train on texts until the draft knows them."""
    head, optimizer = module.target_head(torch.device("cpu")), torch.optim.Adam(module.draft.parameters(), 1e-2)
    captured = engine.capture(texts, module.spec.capture)
    features = {name: torch.cat([x[name] for x in captured]) for name in captured[0]}
    ids = torch.tensor([token for text in texts for token in text])
    ends = (*itertools.accumulate(map(len, texts)),)
    spans = (*zip((0, *ends), ends, strict=False),)
    batch = TrainBatch(ids, torch.ones(len(ids), dtype=torch.bool), features, (*map(len, texts),), spans)
    for _ in range(steps):
        optimizer.zero_grad()
        output = module.training_loss(batch, head)
        (output.loss / output.num_supervised).backward()
        optimizer.step()


def test_greedy_decoding_is_lossless_and_accepts(deepseek):
    module = MTPModule(str(deepseek), init_from="target_mtp")
    engine = HFTargetEngine(TargetFiles.find(str(deepseek)), "float32")
    head = module.target_head(torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (n,), generator=g).tolist() for n in (3, 11, 6)]
    expected = [plain(engine, p, 24, ()) for p in prompts]
    texts = [[*p, *answer] for p, answer in zip(prompts, expected, strict=True)]
    memorise(module, engine, texts[:2])
    decoded = decode(
        engine.model, lambda: module.drafter(head, torch.float32), prompts, gamma=3, max_new_tokens=24, end_ids=()
    )
    assert [d.tokens for d in decoded] == expected
    # The texts that it was trained on are drafted well.
    assert sum(sum(d.accepted) for d in decoded[:2]) > 12


def test_it_starts_as_the_last_layer(deepseek):
    module = MTPModule(str(deepseek), init_from="target")
    experts, files = module.draft.layer.mlp.experts, module.target
    assert torch.equal(experts.down_proj[5], files.layer_tensor(1, "mlp.experts.5.down_proj.weight"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": False}, "layer.mlp.down_proj.weight is missing for a DeepSeek layer"),
        ({"n_routed_experts": 12}, r"layer.mlp.experts.8.gate_proj.weight is missing for a DeepSeek layer"),
        ({"n_routed_experts": 4}, r"layer.mlp.experts.4.down_proj.weight does not belong to a DeepSeek layer"),
        ({"kv_lora_rank": 6}, r"kv_a_layernorm.weight is \(8,\), but the draft's is \(6,\)"),
    ],
)
def test_another_form_is_refused_by_its_tensor(deepseek, change, message):
    with pytest.raises(UserError, match=message):
        MTPModule(str(deepseek), draft_config=change, init_from="target_mtp")


BLOCK = (8, 6)


def plain_dequantised(values: Tensor, scales: Tensor) -> Tensor:
    """Entry by entry."""
    wide = torch.empty(values.shape)
    for row in range(len(values)):
        for column in range(values.shape[1]):
            wide[row, column] = float(values[row, column]) * float(scales[row // BLOCK[0], column // BLOCK[1]])
    return wide


def rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def eight_bit(deepseek: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target with its layers' matrices in 8-bit blocks, as DeepSeek-V3 is published."""
    folder = tmp_path_factory.mktemp("eight") / "target"
    shutil.copytree(deepseek, folder)
    tensors = {}
    for name, tensor in load_file(deepseek / "model.safetensors").items():
        tensors[name] = tensor
        plain = ("norm.weight", "gate.weight", "eh_proj.weight", "embed_tokens.weight", "head.weight")
        if tensor.ndim == 2 and not name.endswith(plain):
            grid = [-(-size // block) for size, block in zip(tensor.shape, BLOCK, strict=True)]
            scales = torch.rand(grid) * 0.01 + 0.001
            values = torch.randint(-400, 401, tensor.shape).float()
            for i, j in itertools.product(*map(range, grid)):  # the largest value of every block is the format's
                values[i * BLOCK[0], j * BLOCK[1]] = -448.0
            tensors |= {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    rewrite(folder, tensors, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK})
    return folder


def test_published_8_bit_weights_are_read_and_stitched_back(eight_bit, tmp_path):
    """Ragged blocks included; what was not trained comes back as it was, in the target's own 8 bits."""
    module, stored = MTPModule(str(eight_bit), init_from="target_mtp"), nextn(eight_bit)
    scaled = [name for name in stored if f"{name}_scale_inv" in stored]
    assert len(scaled) == 5 + 3 * 8 + 3
    state = module.draft.module_tensors(torch.float32)
    ragged = set()
    for name in scaled:
        expected = plain_dequantised(stored[name], stored[f"{name}_scale_inv"])
        assert torch.equal(state[f"layer.{name}"], expected), name
        ragged |= {tuple(bool(size % block) for size, block in zip(expected.shape, BLOCK, strict=True))}
    assert (True, True) in ragged
    assert torch.equal(module.draft.proj.weight, stored["eh_proj.weight"])
    module.export_format.to_sglang(module.draft, module.target, tmp_path / "same", "float32")
    before, after = (load_file(x / "model.safetensors") for x in (eight_bit, tmp_path / "same"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        torch.testing.assert_close(after[name].float(), tensor.float(), rtol=1e-6, atol=0, msg=name)

    with torch.no_grad():
        for parameter in module.draft.parameters():
            parameter.copy_(torch.randn_like(parameter))
    module.export_format.to_sglang(module.draft, module.target, tmp_path / "trained")
    trained, again = nextn(tmp_path / "trained"), module.draft.module_tensors(torch.float32)
    for name in scaled:
        found = plain_dequantised(trained[name], trained[f"{name}_scale_inv"])
        torch.testing.assert_close(found, again[f"layer.{name}"], rtol=1 / 16, atol=1e-2, msg=name)
    assert trained["eh_proj.weight"].dtype == torch.bfloat16


def test_it_can_start_at_the_last_layer_of_an_8_bit_target(eight_bit):
    layer = MTPModule(str(eight_bit), init_from="target").draft.layer.self_attn.o_proj.weight
    stored = load_file(eight_bit / "model.safetensors")
    name = f"model.layers.{LAYERS - 1}.self_attn.o_proj.weight"
    assert torch.equal(layer, plain_dequantised(stored[name], stored[f"{name}_scale_inv"]))


@pytest.mark.parametrize(
    ("quantization", "dtype", "message"),
    [
        ({"quant_method": "fp8", "weight_block_size": None}, None, "float8_e4m3fn, but only"),
        ({"quant_method": "fp8", "weight_block_size": [8, 8]}, None, "have . x . scales, not"),
        ({"quant_method": "fp8", "weight_block_size": BLOCK}, torch.float8_e5m2, "float8_e5m2, but only"),
        ({"quant_method": "bitsandbytes"}, torch.int8, "int8, but only"),
    ],
)
def test_other_quantised_weights_are_refused_by_name(eight_bit, tmp_path, quantization, dtype, message):
    shutil.copytree(eight_bit, tmp_path / "target")
    tensors = load_file(eight_bit / "model.safetensors")
    if dtype is not None:
        tensors = {n: x.float().to(dtype) if x.dtype.itemsize == 1 else x for n, x in tensors.items()}
    rewrite(tmp_path / "target", tensors, quantization)
    with pytest.raises(UserError, match=rf"layers.2.\S+_proj\S*.weight.*{message}"):
        MTPModule(str(tmp_path / "target"), init_from="target_mtp")


def test_an_exported_draft_can_be_started_from(deepseek, tmp_path):
    module = MTPModule(str(deepseek), init_from="target_mtp")
    module.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    again = MTPModule(
        str(deepseek), draft_config=str(tmp_path / "draft" / "config.json"), init_from=str(tmp_path / "draft")
    )
    for name, tensor in module.draft.state_dict().items():
        assert torch.equal(again.draft.state_dict()[name], tensor), name
