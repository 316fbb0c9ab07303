"""Rotary tables are transformers' own, depend only on the config, and rotate the part of each head that it names."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, StableLmConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

from specforge.modeling.layers.decoder_layer import RotaryTable, apply_rope

CPU = torch.device("cpu")
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def config_of(rope: dict, head_dim: int = 16) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=512,
        rope_parameters=dict(rope),
    )


def of_transformers(rotary: torch.nn.Module, length: int) -> tuple[torch.Tensor, ...]:
    tables = rotary(torch.zeros(1), torch.arange(length)[None])
    return tuple(x[0, :, : x.shape[-1] // 2] for x in tables)


@pytest.mark.parametrize("rope", ROPES)
def test_tables_are_those_of_transformers_bit_for_bit(rope):
    config = config_of(ROPES[rope])
    for length in (1, 3, 700):
        expected = of_transformers(LlamaRotaryEmbedding(config), length)
        assert all(map(torch.equal, RotaryTable(config)(length, CPU), expected))


@pytest.mark.parametrize("rope", ROPES)
def test_a_longer_table_begins_as_a_shorter_one(rope):
    table = RotaryTable(config_of(ROPES[rope]))
    for short, long in zip(table(5, CPU), table(2000, CPU), strict=True):
        assert torch.equal(short, long[:5])
    assert [tuple(x.shape) for x in table(0, CPU)] == [(0, 8), (0, 8)]


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "nonsense"])
def test_angles_that_depend_on_the_length_of_a_text_are_refused_by_name(kind):
    config = config_of(ROPES["default"])
    config.rope_parameters = {**ROPES["yarn"], "rope_type": kind}
    with pytest.raises(ValueError, match=f"rope_type is '{kind}'; drafts support default, linear, yarn"):
        RotaryTable(config)


@pytest.mark.parametrize(("factor", "rotated"), [(0.25, 4), (0.5, 8), (0.3, 4), (1.0, 16)])
def test_a_part_of_each_head_is_rotated_as_in_transformers(factor, rotated):
    rope = {**ROPES["default"], "partial_rotary_factor": factor}
    theirs = StableLmConfig(hidden_size=64, num_attention_heads=4, rope_parameters=dict(rope))
    tables = RotaryTable(config_of(rope))(9, CPU)
    assert all(map(torch.equal, tables, of_transformers(StableLmRotaryEmbedding(theirs), 9)))
    x = torch.randn(9, 2, 16)
    rotated_x = apply_rope(x, *tables)
    assert torch.equal(rotated_x[..., rotated:], x[..., rotated:])
    assert not torch.equal(rotated_x[5, :, :rotated], x[5, :, :rotated])


def test_heads_of_odd_size_are_refused():
    with pytest.raises(ValueError, match="head_dim is 3"):
        RotaryTable(config_of(ROPES["default"], head_dim=3))
