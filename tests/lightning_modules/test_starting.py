"""Drafts that start from a draft on disk: its own config says what they are, and another network is refused by name."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_modules
from lightning_modules.loading import load_module
from specforge.cli.main import main
from specforge.errors import UserError
from tests.fuzz import survives
from tests.tiny import recipe, write_target

V, H = 48, 16
LAYERS = {"layer_ids": [1, 2, 4]}
# Fields that are not what the target would give.
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eagle3": (
        {
            "draft_vocab_size": 20,
            "rms_norm_eps": 1e-3,
            "norm_output": True,
            "intermediate_size": 24,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5},
        },
        LAYERS,
    ),
    "peagle": ({"draft_vocab_size": 20, "num_hidden_layers": 2, "mask_token_id": 5, "attention_bias": True}, LAYERS),
    "mtp": ({"draft_vocab_size": 20, "norm_output": False, "rope_theta": 77.0}, {}),
    "dflash": ({"block_size": 5, "num_hidden_layers": 2, "draft_vocab_size": 20, "qk_norm": False}, LAYERS),
    "dspark": ({"block_size": 5, "num_hidden_layers": 1, "markov_rank": 4, "markov_head_type": "rnn"}, LAYERS),
    "dflash2": ({"block_size": 5, "num_hidden_layers": 1, "dflash_config": {"selector_rank": 4}}, LAYERS),
    "domino": (
        {
            "block_size": 5,
            "num_hidden_layers": 1,
            "dflash_config": {"gru_hidden_dim": 4, "emb_dim": 4, "shift_label": False, "pure_draft_prefix_len": 2},
        },
        LAYERS,
    ),
    "medusa": ({"num_draft_heads": 2, "num_head_blocks": 2}, {}),
    "hydra": ({"num_draft_heads": 2, "draft_vocab_size": 20}, {}),
    "standalone": ({"num_hidden_layers": 2, "intermediate_size": 24}, {}),
}
EVERY = pytest.mark.parametrize("name", OWN)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4))


def make(name: str, target: str, **options: Any) -> Any:
    return lightning_modules.algorithms()[name](target, **options)


@pytest.fixture(scope="module")
def exported(small: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One draft of each algorithm, as if trained, in the field's own form."""
    folders = {}
    for name, (config, options) in OWN.items():
        torch.manual_seed(0)
        module = make(name, small, draft_config=config, **options)
        if module.draft.d2t.shape != module.draft.t2d.shape:
            module.draft.set_vocabulary(torch.randperm(V)[: len(module.draft.d2t)].sort().values)
        for parameter in module.draft.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1
        folders[name] = tmp_path_factory.mktemp("exported") / name
        module.export_format.to_hf(module.draft, module.target, folders[name], "float32")
    return folders


@pytest.fixture
def damaged(exported, tmp_path):
    """A copy of an exported draft whose config or tensors a test changes."""

    def change(name: str, fields: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Path:
        folder = Path(shutil.copytree(exported[name], tmp_path / name, dirs_exist_ok=True))
        config = {**json.loads((folder / "config.json").read_text()), **(fields or {})}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        stored = {**load_file(folder / "model.safetensors"), **(tensors or {})}
        save_file({k: v for k, v in stored.items() if v is not None}, folder / "model.safetensors")
        return folder

    return change


@EVERY
def test_the_config_of_a_draft_on_disk_is_the_default(name, small, exported):
    """No field has to be repeated, and none is replaced by the target's value."""
    again = make(name, small, init_from=str(exported[name]))
    loaded = load_module(exported[name], small)
    fresh = make(name, small, draft_config=OWN[name][0], **OWN[name][1])
    assert again.draft.config.to_dict() == loaded.draft.config.to_dict()
    assert again.draft.difference(fresh.draft.config.to_dict(), "fresh") is None
    assert again.spec.capture == loaded.spec.capture == fresh.spec.capture
    for key, tensor in loaded.draft.state_dict().items():
        assert torch.equal(again.draft.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("eagle3", {"layer_ids": [1, 2, 5]}, r"hidden_state_layer_ids \[1, 2, 4\], but .* has \[1, 2, 5\]"),
        ("eagle3", {"draft_config": {"norm_output": False}}, "norm_output True, but .* has"),
        ("eagle3", {"draft_config": {"norm_before_residual": True}}, "norm_before_residual False, but .* has True"),
        ("eagle3", {"draft_config": {"rope_theta": 10000.0}}, "rope_parameters .*77.0"),
        ("eagle3", {"draft_config": {"partial_rotary_factor": 1.0}}, "rope_parameters .*0.5"),
        ("eagle3", {"draft_config": {"rms_norm_eps": 1e-6}}, "rms_norm_eps 0.001, but .* has 1e-06"),
        ("eagle3", {"draft_config": {"num_attention_heads": 2, "head_dim": 16}}, "head_dim 8, but .* has 16"),
        ("eagle3", {"draft_config": {"draft_vocab_size": 30}}, "draft_vocab_size 20, but .* has 30"),
        ("peagle", {"draft_config": {"mask_token_id": 6}}, "mask_token_id 5, but .* has 6"),
        ("mtp", {"draft_config": {"mask_first": True}}, "mask_first False, but .* has True"),
        ("dflash", {"layer_ids": [0, 2, 4]}, r"target_layer_ids \[1, 2, 4\], but .* has"),
        (
            "dflash",
            {"draft_config": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}},
            "layer_types",
        ),
        ("dflash2", {"draft_config": {"dflash_config": {"selector_top_k": 8}}}, "selector_top_k 16, but .* has 8"),
        ("domino", {"draft_config": {"dflash_config": {"shift_label": True}}}, "shift_label"),
        ("standalone", {"draft_config": {"rms_norm_eps": 1e-3}}, "rms_norm_eps"),
    ],
)
def test_a_network_other_than_the_trained_one_is_refused_by_name(small, exported, name, change, words):
    with pytest.raises(UserError, match=f"{name} was trained with .*{words}") as error:
        make(name, small, init_from=str(exported[name]), **change)
    (option,) = change if "layer_ids" in change else re.findall(r"trained with (\S+)", str(error.value))
    assert f"set model.{'' if option == 'layer_ids' else 'draft_config.'}{option} to" in str(error.value)


def test_fields_that_do_not_change_the_network_may_differ(small, exported):
    """Blocks of another size, other kernels, a longer text."""
    config = {"block_size": 9, "attn_implementation": "flex_attention", "max_position_embeddings": 4096}
    assert make("dflash", small, init_from=str(exported["dflash"]), draft_config=config).draft.block_size == 9


@EVERY
def test_the_complete_config_of_the_draft_may_also_be_given(name, small, exported):
    path = exported[name] / "config.json"
    for config in (str(path), json.loads(path.read_text())):
        make(name, small, draft_config=config, init_from=str(exported[name]))


def test_a_config_without_captured_layers_means_the_defaults_of_servers(small, damaged):
    fields = {"eagle_config": ..., "eagle_aux_hidden_state_layer_ids": ...}
    folder = damaged("eagle3", {**fields, "draft_vocab_size": ...})
    module = make("eagle3", small, init_from=str(folder))
    assert module.draft.layer_ids == (1, 3, 4)
    assert len(module.draft.d2t) == 20
    assert load_module(folder, small).draft.layer_ids == (1, 3, 4)


@pytest.mark.parametrize(
    ("name", "fields", "tensors", "words"),
    [
        ("eagle3", {"vocab_size": ...}, {}, "vocab_size is missing"),
        ("eagle3", {"hidden_size": ...}, {}, "hidden_size is None"),
        ("eagle3", {"architectures": ["Qwen2ForCausalLM"]}, {}, r"architectures is \['Qwen2ForCausalLM'\]"),
        ("eagle3", {"architectures": ["MTPDraft"], "eagle_config": ...}, {}, "MTPDraft is not a draft of eagle3"),
        ("eagle3", {"vocab_size": 99}, {}, "vocab_size is 99, but the target"),
        ("eagle3", {"mlp_bias": True}, {}, "mlp_bias is True"),
        ("eagle3", {"draft_vocab_size": 30}, {}, "d2t is .20,., but the draft vocabulary has 30 tokens"),
        ("eagle3", {}, {"d2t": None}, "no tensor d2t, but the draft vocabulary is 20 of 48"),
        ("eagle3", {}, {"d2t": torch.arange(20) * 40}, "d2t does not map draft ids"),
        ("eagle3", {}, {"d2t": torch.zeros(2, 10).long()}, r"d2t is \(2, 10\)"),
        ("eagle3", {}, {"d2t": torch.zeros(20)}, "d2t is torch.float32, not integers"),
        ("eagle3", {}, {"norm.weight": torch.full((H,), torch.nan)}, "norm.weight holds NaN"),
        (
            "eagle3",
            {},
            {"norm.weight": torch.ones(H).long()},
            "norm.weight is torch.int64, but the draft's is torch.float32",
        ),
        ("eagle3", {}, {"fc.weight": torch.ones(H, 3 * H).to(torch.float8_e4m3fn)}, "fc.weight is torch.float8_e4m3fn"),
        ("eagle3", {}, {"fc.weight": torch.ones(H, 2 * H)}, r"fc.weight is \(16, 32\), but the draft's is \(16, 48\)"),
        ("eagle3", {}, {"midlayer.mlp.up_proj.weight": None}, "tensor midlayer.mlp.up_proj.weight is missing"),
        (
            "eagle3",
            {},
            {"midlayer.self_attn.q_proj.bias": torch.ones(H)},
            "the draft has no tensor midlayer.self_attn.q_proj.bias",
        ),
        ("dflash", {"dflash_config": {}}, {}, "dflash_config.mask_token_id is missing"),
        ("dflash", {"num_hidden_layers": 3}, {}, "layer_types"),
        ("medusa", {"num_heads": 3}, {}, "tensor heads.2.blocks.0.weight is missing"),
        ("standalone", {"model_type": ...}, {}, "transformers has no model_type None"),
        ("standalone", {}, {"model.norm.weight": None}, "tensor model.model.norm.weight is missing"),
    ],
)
def test_a_folder_with_another_kind_of_draft_is_refused_in_one_line(small, damaged, name, fields, tensors, words):
    folder = damaged(name, fields, tensors)
    with pytest.raises(UserError, match=words) as error:
        make(name, small, init_from=str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", ["[]", "3", "{", '{"architectures": [{}]}', "[" * 5000])
def test_a_config_that_is_not_an_object_is_refused(small, damaged, config):
    folder = damaged("eagle3")
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"config.json"):
        make("eagle3", small, init_from=str(folder))


def test_a_pickle_is_never_read(small, damaged):
    folder = damaged("eagle3")
    (folder / "model.safetensors").rename(folder / "kept")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": 1}))
    with pytest.raises(UserError, match=r"pytorch_model.bin: is a pickle, which SpecForge never loads"):
        make("eagle3", small, init_from=str(folder))


def test_a_single_file_of_tensors_takes_precedence_over_shards(small, damaged, exported):
    folder = damaged("eagle3")
    save_file({"fc.weight": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")
    make("eagle3", small, init_from=str(folder))


def in_shards(folder: Path) -> dict[str, str]:
    """Move a draft's tensors to two files; the index is returned and not written."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: x for name, x in tensors.items() if files[name] == file}, folder / file)
    return files


def test_shards_are_those_of_the_index(small, damaged):
    folder = damaged("eagle3")
    expected = load_file(folder / "model.safetensors")
    files = in_shards(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    save_file(
        {"fc.weight": torch.full((H, 3 * H), 7.0)}, folder / "model-00003-of-00003.safetensors"
    )  # of an older one
    loaded = make("eagle3", small, init_from=str(folder)).draft
    assert torch.equal(loaded.fc.weight, expected["fc.weight"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, r"model.safetensors: no such file; a draft is config.json beside"),
        ({"fc.weight": "gone.safetensors"}, r"index.json: names 'gone.safetensors', which is not a file"),
        ({"fc.weight": "../part-0.safetensors"}, r"index.json: names '../part-0.safetensors', which is not a file"),
        ({"fc.bias": "part-0.safetensors"}, r"part-0.safetensors: has no tensor fc.bias, which the index"),
    ],
)
def test_an_index_that_is_wrong_is_refused_by_file(small, damaged, changes, words):
    folder = damaged("eagle3")
    files = in_shards(folder)
    if changes is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**files, **changes}}))
    with pytest.raises(UserError, match=words):
        make("eagle3", small, init_from=str(folder))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("eagle3", {"logit_scale": 0.5}, "logit_scale is 0.5, which LlamaForCausalLMEagle3 does not support"),
        ("dflash", {}, "DFlashDraftModel is not a draft of eagle3"),
    ],
)
def test_a_folder_that_does_not_fit_is_named_and_no_option(small, damaged, name, fields, words):
    folder = damaged(name, fields)
    with pytest.raises(UserError) as error:
        make("eagle3", small, init_from=str(folder))
    assert str(error.value) == f"{folder / 'config.json'}: {words}"
    if fields:
        with pytest.raises(UserError) as error:
            load_module(folder, small)
        assert str(error.value) == f"{folder / 'config.json'}: {words}"


def test_a_missing_draft_is_refused_in_one_line(small, tmp_path):
    for name, start in (("eagle3", "nowhere"), ("dflash", "target"), ("medusa", "target_mtp")):
        with pytest.raises(UserError, match=f"{start}: no such checkpoint"):
            make(name, small, init_from=start)
    with pytest.raises(UserError, match=r"config.json: no such file"):
        make("eagle3", small, init_from=str(tmp_path))


@EVERY
def test_damaged_tensors_are_refused_in_one_line_or_read(name, small, damaged, fuzz):
    folder = damaged(name)
    original = (folder / "model.safetensors").read_bytes()
    for data in fuzz.bytes([original], 3):
        (folder / "model.safetensors").write_bytes(data)
        survives(lambda: make(name, small, init_from=str(folder)))


@pytest.fixture(scope="module")
def checkpoint(target: Path, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    path = recipe(target, features, folder, trainer__max_steps=2)
    assert main(["fit", "--config", str(path)]) == 0
    return folder / "run" / "checkpoints" / "last.ckpt"


def test_fields_that_were_ignored_are_dropped_from_older_checkpoints(checkpoint, target, tmp_path):
    """The drafts were trained without them: as plain Llama layers that rotate whole heads by default positions."""
    content = torch.load(checkpoint, weights_only=True)
    saved = content["specforge"]
    assert saved.pop("config_version") == 1
    rope = saved["draft_config"]["rope_parameters"]
    saved["draft_config"] |= {
        "attention_bias": True,
        "norm_before_residual": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
        "qk_norm": True,
        "sliding_window": 8,
        "rope_parameters": {**rope, "rope_type": "dynamic", "factor": 4.0, "partial_rotary_factor": 0.5},
    }
    torch.save(content, tmp_path / "old.ckpt")
    old, new = (load_module(path, str(target)).draft for path in (tmp_path / "old.ckpt", checkpoint))
    assert old.config.to_dict() == new.config.to_dict()
    assert all(
        torch.equal(a, b)
        for a, b in zip(old.rotary(99, old.fc.weight.device), new.rotary(99, old.fc.weight.device), strict=True)
    )
    assert all(torch.equal(old.state_dict()[name], x) for name, x in new.state_dict().items())


def test_a_run_resumes_from_an_older_checkpoint(checkpoint, target, features, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    del content["specforge"]["config_version"]
    content["specforge"]["draft_config"]["mlp_bias"] = True
    torch.save(content, tmp_path / "old.ckpt")
    path = recipe(target, features, tmp_path, trainer__max_steps=4)
    assert main(["fit", "--config", str(path), "--ckpt_path", str(tmp_path / "old.ckpt")]) == 0


def test_a_resumed_run_names_the_option_that_differs(checkpoint, target, features, tmp_path, capsys):
    config = {"draft_vocab_size": 64, "norm_output": True}
    path = recipe(target, features, tmp_path, trainer__max_steps=4, model__init_args__draft_config=config)
    assert main(["fit", "--config", str(path), "--ckpt_path", str(checkpoint)]) == 2
    assert "has norm_output False, but the model's has True; change model.draft_config" in capsys.readouterr().err
