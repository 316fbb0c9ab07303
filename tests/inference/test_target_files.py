"""What a target's files mean is what transformers makes of them, and reading them changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from tests.families import LLAMA3, write_family
from tests.fuzz import Fuzz, survives
from tests.tiny import write_target


def copy(source: Path, folder: Path, **fields: object) -> Path:
    """A target with some fields of its config.json changed; None drops one."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_nothing_that_is_done_to_a_config_reaches_the_fingerprint(target, tmp_path):
    old = {"rope_parameters": None, "rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    folder = copy(target, tmp_path / "t", **old)
    files, before = TargetFiles.find(str(folder)), TargetFiles.find(str(folder)).fingerprint
    config = files.config
    config["rope_parameters"]["factor"] = 99.0
    config["vocab_size"] = 1
    assert files.config["rope_parameters"]["factor"] == 8.0
    assert files.vocab_size == 264
    assert files.fingerprint == before


def test_the_config_has_the_defaults_of_its_class_and_the_common_names(tmp_path):
    cohere = TargetFiles.find(str(write_family("cohere", tmp_path / "cohere")))
    assert "logit_scale" not in json.loads((cohere.folder / "config.json").read_text())
    assert cohere.logit_scale == 0.0625
    gpt2 = TargetFiles.find(str(write_family("gpt2", tmp_path / "gpt2")))
    assert (gpt2.hidden_size, gpt2.num_layers, gpt2.config["num_attention_heads"]) == (32, 8, 4)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3",
        "cohere",
        "granite",
        "hyperclovax",
        "minicpm3",
        "gemma2",
        "nanochat",
        "phi",
        "phimoe",
        "ernie4_5_moe",
        "gpt_neox",
        "gpt2",
        "opt",
        "recurrent_gemma",
    ],
)
def test_embedding_and_head_are_those_of_the_model(name, tmp_path):
    """The head's product with the last state, by what the files say of factor, bias and cap, is the model's logits."""
    files = TargetFiles.find(str(write_family(name, tmp_path / "t")))
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        logits, states = model(ids).logits[0], model.base_model(ids).last_hidden_state[0]
    bias = files.lm_head_bias()
    mine = states @ files.lm_head().T + (0 if bias is None else bias)
    mine = mine if files.softcap is None else files.softcap * torch.tanh(mine / files.softcap)
    torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(files.embedding(), model.get_input_embeddings().weight)


def own_head(folder: Path) -> torch.Tensor:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(264, 32, generator=torch.Generator().manual_seed(3))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights["lm_head.weight"]


def test_a_head_of_its_own_wins_over_a_config_that_ties(target, tmp_path):
    head = own_head(copy(target, tmp_path / "t", tie_word_embeddings=True))
    files = TargetFiles.find(str(tmp_path / "t"))
    assert files.has_own_head()
    assert torch.equal(files.lm_head(), head)


def test_a_single_file_wins_over_an_index_that_was_left_beside_it(target, tmp_path):
    folder = copy(target, tmp_path / "t")
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    head = own_head(folder)
    assert torch.equal(TargetFiles.find(str(folder)).lm_head(), head)


def test_no_head_among_the_tensors_of_a_config_that_ties_none_is_refused(target, tmp_path):
    files = TargetFiles.find(str(copy(target, tmp_path / "t", tie_word_embeddings=False)))
    with pytest.raises(UserError, match="no lm_head among its tensors"):
        files.lm_head()


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"x": "../../x.safetensors"}}, "not a file in the same folder"),
        ({"weight_map": {"x": "/etc/passwd"}}, "not a file in the same folder"),
        ({"weight_map": {"x": "model-00002-of-00002.safetensors"}}, "not a file in the same folder"),
        ({"weight_map": {"x": ["a"]}}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_an_index_names_files_beside_it(target, tmp_path, index, words):
    folder = copy(target, tmp_path / "t")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=words):
        _ = TargetFiles.find(str(folder)).fingerprint


def test_code_that_comes_with_a_target_is_never_run(target, tmp_path, monkeypatch):
    """Not even where somebody would say yes to transformers' question."""
    names = "LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for kind in ("llama", "own_kind"):
        auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        folder = copy(target, tmp_path / kind, model_type=kind, auto_map=auto_map)
        (folder / "own.py").write_text(f"open('ran', 'w').close()\nfrom transformers import {names}\n")
        files = TargetFiles.find(str(folder))
        if kind == "llama":
            assert files.lm_head().shape == (264, 32)
        else:
            with pytest.raises(UserError, match=r"config.json: .*own_kind"):
                _ = files.vocab_size
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "made_for", "learned"),
    [
        ("llama", 512, None),
        ("gpt2", 512, 512),
        ("opt", 512, 512),
        ("llama, dynamic", 2048, None),
        ("bloom", 512, None),
        ("llama, yarn", 512, None),
    ],
)
def test_how_long_a_text_may_be(name, made_for, learned, tmp_path):
    files = TargetFiles.find(str(write_family(name, tmp_path / "t")))
    assert (files.max_positions, files.learned_positions) == (made_for, learned)


@pytest.mark.parametrize(
    ("name", "limit"), [("llama", None), ("llama, yarn", None), ("llama, dynamic", 512), ("phi3", 400)]
)
def test_the_length_at_which_positions_change(name, limit, tmp_path):
    assert TargetFiles.find(str(write_family(name, tmp_path / "t"))).positions_change_at == limit


def test_damaged_configs_are_one_line(target, tmp_path, fuzz: Fuzz):
    folder = copy(target, tmp_path / "t")
    fields = json.loads((folder / "config.json").read_text())

    def read(content: bytes) -> None:
        (folder / "config.json").write_bytes(content)
        files = TargetFiles.find(str(folder))
        _ = (files.hidden_size, files.num_layers, files.vocab_size, files.max_positions, files.positions_change_at)
        _ = files.logit_scale, files.softcap, files.weight_block, files.fingerprint

    originals = [fields, {**fields, "rope_parameters": LLAMA3}, {"model_type": "gemma3", "text_config": fields}]
    for value in fuzz.values(originals, 60):
        survives(lambda value=value: read(json.dumps(value).encode()), outside=tmp_path / "elsewhere")
    for content in fuzz.bytes([json.dumps(value).encode() for value in originals], 40):
        survives(lambda content=content: read(content))


def test_the_fingerprint_of_an_ordinary_target_is_the_one_that_earlier_versions_wrote(tmp_path):
    """Checkpoints and features name their target by it."""
    folder = write_target(tmp_path / "t")
    written = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "transformers_version"}
    (folder / "config.json").write_text(json.dumps(written))
    import xxhash

    digest = xxhash.xxh3_128(json.dumps(written, sort_keys=True).encode())
    content = (folder / "model.safetensors").read_bytes()
    digest.update(f"model.safetensors:{len(content)}".encode())
    piece = 1 << 16
    starts = [0, *(max(0, (len(content) - piece) * i // 64) for i in range(1, 65))]
    for start in starts:
        digest.update(content[start : start + piece])
    assert TargetFiles.find(str(folder)).fingerprint == digest.hexdigest()
