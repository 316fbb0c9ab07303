"""Draft configs: every field that changes a network is implemented or refused by name, whoever wrote the file."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from specforge.cli.recipes import recipe_folder
from specforge.errors import UserError
from specforge.modeling.draft import build_draft, canonical, registry
from tests.fuzz import survives

CPU = torch.device("cpu")
LLAMA = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
EAGLE = {**LLAMA, "draft_vocab_size": 20, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}}
LATENT = {"q_lora_rank": 10, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 3}
BLOCK = {**LLAMA, "block_size": 4, "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2]}}
HEADS = {"vocab_size": 48, "hidden_size": 16, "num_draft_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLMEagle3": EAGLE,
    "Eagle3DeepseekV2ForCausalLM": {**EAGLE, **LATENT},
    "PEagleDraftModel": {**EAGLE, "mask_token_id": 3},
    "MTPDraft": LLAMA,
    "DeepseekMTPDraft": {**LLAMA, **LATENT},
    "DFlashDraftModel": BLOCK,
    "Qwen3DSparkModel": {**BLOCK, "markov_rank": 4},
    "DFlash2DraftModel": {**BLOCK, "dflash_config": {**BLOCK["dflash_config"], "selector_rank": 4}},
    "DominoDraftModel": {**BLOCK, "dflash_config": {**BLOCK["dflash_config"], "gru_hidden_dim": 4, "emb_dim": 4}},
    "MedusaDraft": HEADS,
    "HydraDraft": HEADS,
}
WITH_LAYERS = [name for name, config in CONFIGS.items() if config is not HEADS]
EVERY = pytest.mark.parametrize("architecture", CONFIGS)


def build(architecture: str, **fields: Any) -> Any:
    return build_draft({"architectures": [architecture], **CONFIGS[architecture], **fields})


def tables(draft: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return draft.rotary(50, CPU)


def test_every_class_of_drafts_says_what_it_reads():
    ours = {n: cls for n, cls in registry._DRAFTS.items() if cls.__module__.startswith("specforge.")}
    assert set(ours) == set(CONFIGS)
    assert all(cls.fields is not None for cls in ours.values())
    for architecture in CONFIGS:
        assert build(architecture).architecture == architecture


@EVERY
@pytest.mark.parametrize(
    "field",
    [
        {"mlp_bias": True},
        {"clip_qkv": 8.0},
        {"residual_multiplier": 0.22},
        {"attention_multiplier": 0.1},
        {"embedding_multiplier": 12.0},
        {"logits_scaling": 8.0},
        {"num_experts": 8},
        {"attention_dropout": 0.1},
        {"quantization_config": {"bits": 4}},
        {"sliding_window": 64},
        {"use_parallel_residual": True},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"some_new_field": "on"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_a_network_does_not_have_is_refused_by_name_and_value(architecture, field):
    ((name, value),) = field.items()
    with pytest.raises(UserError, match=f"draft config: {name} is ") as error:
        build(architecture, **field)
    assert repr(value) in str(error.value) or name == "sliding_window"


@EVERY
def test_fields_that_do_not_change_a_network_are_accepted(architecture):
    """Names, tokens and dtypes; what is null or off; the defaults of transformers; settings of generation."""
    harmless = {
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "use_cache": True,
        "bos_token_id": 1,
        "top_k": 50,
        "_name_or_path": "somebody/draft",
        "auto_map": {"AutoModel": "code.Draft"},
        "initializer_range": 0.5,
        "sliding_window": None,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "some_new_field": False,
        "qk_norm": None,
        "model_type": "llama",
        "id2label": {"0": "x"},
        "max_window_layers": 36,
        "use_sliding_window": False,
    }
    if architecture in ("MedusaDraft", "HydraDraft"):
        del harmless["attention_dropout"]
    state = build(architecture, **harmless).state_dict()
    assert {n: x.shape for n, x in state.items()} == {n: x.shape for n, x in build(architecture).state_dict().items()}


@pytest.mark.parametrize("architecture", WITH_LAYERS)
@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; .* expects 'silu' or 'swish'"),
        ({"layer_types": ["linear_attention"]}, "layer_types is"),
        ({"rope_interleave": "yes"}, "rope_interleave is 'yes'"),
        ({"head_dim": 0}, "head_dim is 0; .* expects a whole number from 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_hidden_layers": 1.0}, "num_hidden_layers is 1.0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0"),
        ({"is_causal": 3}, "is_causal is 3"),
        ({"rope_parameters": []}, "rope_parameters is \\[\\]"),
        ({"rope_theta": "much"}, "rope_theta .* is "),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
        ({"rope_parameters": {"rope_type": "mrope", "mrope_section": [1, 1, 2]}}, "rope_type is 'mrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor is missing"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -1.0}}, "rope_parameters.factor is -1.0"),
        ({"rope_parameters": {"rope_type": "default", "wave": 3}}, "rope_parameters.wave is 3"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type of .* is both 'default' and 'yarn'"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value, default=str)[:40],
)
def test_values_that_a_network_cannot_have_are_refused(architecture, field, words):
    if "rope_interleave" in field and architecture not in ("Eagle3DeepseekV2ForCausalLM", "DeepseekMTPDraft"):
        words = "rope_interleave is 'yes', which .* does not support"
    if "head_dim" in field and architecture in ("Eagle3DeepseekV2ForCausalLM", "DeepseekMTPDraft"):
        field, words = {"qk_rope_head_dim": 0}, "qk_rope_head_dim is 0"
    with pytest.raises(UserError, match=words):
        build(architecture, **field)


@pytest.mark.parametrize(
    ("architecture", "field", "words"),
    [
        ("Eagle3DeepseekV2ForCausalLM", {"qk_norm": True}, "qk_norm is True, which .* does not support"),
        ("LlamaForCausalLMEagle3", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("LlamaForCausalLMEagle3", {"num_aux_hidden_states": 2}, "num_aux_hidden_states is 2, but"),
        ("LlamaForCausalLMEagle3", {"eagle_config": []}, r"eagle_config is \[\]; .* expects an object"),
        ("LlamaForCausalLMEagle3", {"eagle_config": {}}, "eagle_config.eagle_aux_hidden_state_layer_ids is missing"),
        ("LlamaForCausalLMEagle3", {"num_key_value_heads": 3}, "num_attention_heads is 4, not a multiple"),
        ("Eagle3DeepseekV2ForCausalLM", {"attention_bias": True}, "attention_bias is True"),
        ("Eagle3DeepseekV2ForCausalLM", {"rope_interleave": False}, "rope_interleave is False"),
        ("Eagle3DeepseekV2ForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("PEagleDraftModel", {"norm_output": True}, "norm_output is True, which"),
        ("PEagleDraftModel", {"mask_token_id": None}, "mask_token_id is missing"),
        ("PEagleDraftModel", {"ptd_token_id": 4}, "ptd_token_id is 4, but mask_token_id is 3"),
        ("MTPDraft", {"norm_before_residual": True}, "norm_before_residual is True, which"),
        ("DeepseekMTPDraft", {"qk_norm": True}, "qk_norm is True"),
        ("DFlashDraftModel", {"attention_bias": True}, "attention_bias is True, which"),
        ("DFlashDraftModel", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window is set, but"),
        ("DFlashDraftModel", {"mask_token_id": 5}, "mask_token_id is 5, but 3 in dflash_config"),
        ("DFlashDraftModel", {"is_causal": True}, "is_causal is True"),
        ("DFlashDraftModel", {"layer_types": ["sliding_attention"], "sliding_window": 8, "is_causal": True}, "causal"),
        ("Qwen3DSparkModel", {"sample_from_anchor": False}, "sample_from_anchor is False"),
        ("HydraDraft", {"rope_theta": 10000.0}, "rope_parameters is .*, which HydraDraft does not support"),
        ("MedusaDraft", {"medusa_fc_bias": True}, "medusa_fc_bias is True"),
    ],
)
def test_fields_of_other_classes_are_refused_by_name(architecture, field, words):
    with pytest.raises(UserError, match=words):
        build(architecture, **field)


@pytest.mark.parametrize("nested", ["eagle_config", "dflash_config"])
@pytest.mark.parametrize("ids", [[-1, 2], [1, 1], [True, 2], ["1"], "12", {}, [10**12]])
def test_captured_layers_are_different_layers_counted_from_0(nested, ids):
    architecture = "LlamaForCausalLMEagle3" if nested == "eagle_config" else "DFlashDraftModel"
    name = "eagle_aux_hidden_state_layer_ids" if nested == "eagle_config" else "target_layer_ids"
    fields = {**CONFIGS[architecture][nested], name: ids}
    with pytest.raises(UserError, match=f"{nested}.{name} is .*counted from 0"):
        build(architecture, **{nested: fields})


def test_layers_are_understood_as_vllm_counts_them():
    """Its top-level ids name the inputs of layers, so they are one higher than those in eagle_config."""
    config = {**EAGLE, "architectures": ["LlamaForCausalLMEagle3"]}
    above = {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}
    assert build_draft({**config, **above}).layer_ids == (1, 3, 4)
    alone = {key: value for key, value in config.items() if key != "eagle_config"}
    assert build_draft({**alone, **above}).layer_ids == (1, 3, 4)
    with pytest.raises(UserError, match="must be one higher"):
        build_draft({**config, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]})
    with pytest.raises(UserError, match="the inputs of layers from 1 on"):
        build_draft({**alone, "eagle_aux_hidden_state_layer_ids": [0, 3, 4]})
    with pytest.raises(UserError, match="not a list of layers"):
        build_draft({**config, "eagle_aux_hidden_state_layer_ids": "all"})


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("architecture", WITH_LAYERS)
@pytest.mark.parametrize(
    ("new", "old"),
    [
        ({"rope_type": "default", "rope_theta": 7.0}, {"rope_theta": 7.0, "rope_scaling": None}),
        (
            {"rope_type": "llama3", "rope_theta": 7.0, **LLAMA3},
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        ),
        (
            {"rope_type": "linear", "rope_theta": 7.0, "factor": 3.0},
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
        ),
        (
            {"rope_type": "yarn", "rope_theta": 7.0, "factor": 3.0, "original_max_position_embeddings": 16},
            {
                "rope_theta": 7.0,
                "rope_scaling": {"type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16},
            },
        ),
    ],
    ids=["default", "llama3", "linear", "yarn"],
)
def test_positions_may_be_spelled_as_in_transformers_4_or_5(architecture, new, old):
    plain = {key: value for key, value in CONFIGS[architecture].items() if key != "rope_parameters"}
    configs = [
        {**plain, "rope_parameters": new},
        {**plain, **old},
        {**plain, **old, "rope_parameters": new},
        {**plain, "rope_parameters": {"full_attention": new, "sliding_attention": new}},
    ]
    before = copy.deepcopy(configs)
    first, *others = (tables(build_draft({"architectures": [architecture], **config})) for config in configs)
    for other in others:
        assert all(map(torch.equal, first, other))
    assert configs == before, "a config that was given is not edited"


def test_positions_of_each_kind_of_layer_must_be_the_same():
    rope = {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}
    for kinds in (rope, {**rope, "full_attention": {"rope_theta": 1e4}, "rope_theta": 2.0}):
        with pytest.raises(UserError, match=r"rope_parameters is .*; drafts have the same positions in all layers"):
            build("DFlashDraftModel", rope_parameters=kinds)


def test_drafts_of_other_projects_are_recognised():
    domino = {**CONFIGS["DominoDraftModel"]["dflash_config"], "projector_type": "domino"}
    explicit = {"shift_label": False, "pure_draft_prefix_len": 0}
    draft = build("DFlashDraftModel", dflash_config={**domino, **explicit})
    assert (draft.architecture, draft.shift, draft.prefix) == ("DominoDraftModel", 0, 0)
    for name in explicit:  # other projects have other defaults
        fields = {key: value for key, value in explicit.items() if key != name}
        with pytest.raises(UserError, match=rf"dflash_config.{name} is missing"):
            build("DFlashDraftModel", dflash_config={**domino, **fields})
    assert build("LlamaForCausalLMEagle3", ptd_token_id=3).architecture == "PEagleDraftModel"
    medusa = {"architectures": ["MedusaModel"], "num_heads": 2, "num_hidden_layers": 3, "hidden_size": 16}
    draft = build_draft({**medusa, "vocab_size": 48, "model_type": "medusa", "medusa_fc_bias": False})
    assert (draft.architecture, len(draft.heads), len(draft.heads[0].blocks)) == ("MedusaDraft", 2, 3)
    assert build("LlamaForCausalLMEagle3", use_aux_norm=True).fc_norm is not None
    top = {key: value for key, value in BLOCK.items() if key != "dflash_config"} | BLOCK["dflash_config"]
    assert build_draft({"architectures": ["DFlashDraftModel"], **top}).layer_ids == (1, 2)


@pytest.mark.parametrize(
    "config", [[], "x", 3, None, {"architectures": "LlamaForCausalLMEagle3"}, {"architectures": [3]}]
)
def test_a_file_that_is_not_a_config_is_refused(config):
    with pytest.raises(UserError, match=r"^here: "):
        canonical(config, "here")


@pytest.mark.parametrize("size", ["hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "head_dim"])
def test_huge_sizes_are_refused_before_anything_is_allocated(size):
    assert not survives(lambda: build("LlamaForCausalLMEagle3", **{size: 10**12}), megabytes=8)


def test_a_draft_that_does_not_fit_into_memory_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(registry, "available_memory", lambda: 1 << 30)
    with pytest.raises(UserError, match=r"such a draft needs 1.6 GB, but only 1.1 GB of memory is available"):
        build("LlamaForCausalLMEagle3", intermediate_size=1 << 23)


@pytest.mark.parametrize("path", sorted((recipe_folder() / "draft").glob("*.json")), ids=lambda path: path.stem)
def test_every_field_of_the_shipped_configs_is_read(path):
    config = canonical(json.loads(path.read_text()), path.name)
    cls = registry.draft_class(config)
    registry.check_fields({k: v for k, v in config.items() if k != "architectures"}, cls.fields, path.name, {})


@EVERY
def test_damaged_configs_are_refused_in_one_line_or_built(architecture, fuzz):
    config = {"architectures": [architecture], **CONFIGS[architecture]}
    for value in fuzz.values([config], 25):
        survives(lambda value=value: build_draft(value))
