"""Estimated sizes against the sizes of real weights and caches, and against published figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DynamicCache, LlamaConfig

from lightning_modules.eagle3 import Eagle3Module
from specforge.cli.main import main
from specforge.contracts import CapturePolicy
from specforge.inference.sizing import estimate
from specforge.inference.target_files import TargetFiles

POLICY = CapturePolicy((1, 20, 40))
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)


KIMI_K2 = {"n_routed_experts": 384, "num_attention_heads": 64, "vocab_size": 163840, "first_k_dense_replace": 1}
LARGE = [  # target, weights, config, GPUs, GB of one
    ("Llama 3.1 70B", "bf16", LLAMA_70B, 2, 80),
    ("Llama 3.1 70B", "bf16", LLAMA_70B, 4, 80),
    ("DeepSeek-V3", "fp8", DeepseekV3Config(quantization_config=FP8), 8, 141),
    ("Kimi-K2", "fp8", DeepseekV3Config(quantization_config=FP8, **KIMI_K2), 8, 141),
    ("Kimi-K2", "fp8", DeepseekV3Config(quantization_config=FP8, **KIMI_K2), 8, 192),
]
PAGE = Path(__file__).parents[2] / "docs" / "servers.md"


def files(config, folder) -> TargetFiles:
    (folder / "config.json").write_text(config.to_json_string())
    return TargetFiles.find(str(folder))


def test_a_small_target_is_as_large_as_it_is_loaded(target, tmp_path):
    """Weights, and the growth of the cache that transformers keeps."""
    found = estimate(TargetFiles.find(str(target)), CapturePolicy((0, 1)), dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert found.weights == sum(x.numel() * 4 for x in model.parameters())
    cache = DynamicCache()
    model(input_ids=torch.arange(9)[None], past_key_values=cache, use_cache=True)
    assert found.cache == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) // 9


def test_a_dense_target_of_70b_needs_four_gpus_for_long_prompts(tmp_path):
    """Published: 70.6 billion parameters, 320 KiB of keys and values per token in bf16."""
    target = files(LLAMA_70B, tmp_path)
    one, four = (estimate(target, POLICY, devices=n) for n in (1, 4))
    assert one.weights == pytest.approx(2 * 70.55e9, rel=1e-3)
    assert (one.cache, four.cache) == (320 * 1024, 80 * 1024)
    assert one.captured == four.captured == 4 * 8192 * 2
    assert one.features == 4 * 8192 * 2 + 5
    assert one.tokens(80e9) < 0 < four.tokens(80e9)
    assert four.tokens(80e9) == int((0.9 * 80e9 - four.weights / 4) / (80 * 1024 + 64 * 1024))
    assert "do not fit; use more devices" in "\n".join(one.lines(80e9))
    assert "MB/s to the store" in "\n".join(four.lines(None))


def test_deepseek_v3_fits_eight_large_gpus_in_8_bits_only(tmp_path):
    """Published: 671 billion parameters; the latent cache holds 576 values per token and layer, whole on each GPU."""
    in_8_bits = files(DeepseekV3Config(quantization_config=FP8), tmp_path)
    found = estimate(in_8_bits, POLICY, devices=8)
    assert found.weights == pytest.approx(673e9, rel=0.01)  # embedding and head stay in bf16
    assert found.cache == 61 * 576 * 2
    assert found.tokens(141e9) > 100_000
    assert found.tokens(80e9) < 0


def test_layers_with_a_bounded_state_do_not_grow_the_cache(tmp_path):
    kinds = {"layer_types": ["full_attention", "sliding_attention"] * 40, "sliding_window": 128}
    config = LlamaConfig(**LLAMA_70B.to_dict() | kinds)
    assert estimate(files(config, tmp_path), POLICY).cache == 160 * 1024


def test_the_table_of_large_targets_is_computed(request, tmp_path):
    rows = []
    for name, weights, config, devices, memory in LARGE:
        target = files(config, tmp_path)
        policy = Eagle3Module.capture_policy(target)
        x = estimate(target, policy, devices=devices)
        tokens = x.tokens(memory * 1e9)
        fits = f"{tokens:,}" if tokens > 0 else "the weights do not fit"
        sizes = f"{x.weights / devices / 1e9:.1f} | {x.cache / 1024:.1f} | {x.captured / 1024:.1f}"
        rows.append(f"| {name} | {weights} | {devices} | {memory} | {sizes} | {fits} | {x.features / 100:,.0f} |")
    table = re.compile(r"(?<=\|---\|\n)(?:\| .*\n)*(?=\nCaptured are)")
    if request.config.getoption("--write-docs"):
        PAGE.write_text(table.sub("".join(f"{row}\n" for row in rows), PAGE.read_text()))
    found = table.search(PAGE.read_text())
    assert found is not None
    assert found.group().splitlines() == rows


def test_the_plan_needs_no_weights_and_starts_nothing(tmp_path, capsys):
    target = files(LLAMA_70B, tmp_path)
    words = ["--engine", "vllm", "--engine.tensor_parallel", "4", "--plan", "true", "--device_memory", "80"]
    assert main(["target", "serve", "--target", target.name, *words]) == 0
    out = capsys.readouterr().out
    assert "capturing layers [1, 39, 76] and the last hidden states" in out
    assert "35.3 GB on each of 4 devices" in out
    assert "tokens fit into the caches" in out
