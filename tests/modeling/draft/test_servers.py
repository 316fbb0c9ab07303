"""What the formats say of servers: the table in the user guide, the commands, and what each server would misread."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
import torch

from lightning_modules import algorithms
from specforge.cli.main import main
from specforge.errors import UserError
from specforge.modeling.draft.servers import VLLM, Proof, SGLang
from tests.families import write_family
from tests.modeling.draft.eagle3.test_export import LATENT

GUIDE = Path(__file__).parents[3] / "docs" / "user-guide.md"


def cell(tested: Proof | str) -> str:
    return "served" if tested is Proof.SERVED else f"no: {tested.split(';')[0]}"


def rows() -> list[str]:
    """The table of the user guide."""
    lines = [f"| algorithm | form | vLLM {VLLM.version} | SGLang {SGLang.version} |", "|---|---|---|---|"]
    for name, module in sorted(algorithms().items()):
        vllm, sglang = module.export_format.vllm, module.export_format.sglang
        assert list(vllm.forms) == list(sglang.forms)
        assert name in ("standalone", "mtp") or set(vllm.forms) == set(module.architectures)
        for form in vllm.forms:
            lines.append(f"| `{name}` | {form} | {cell(vllm.forms[form])} | {cell(sglang.forms[form])} |")
    return lines


def test_the_guides_table_of_servers_is_what_the_formats_say():
    assert "\n".join(rows()) in GUIDE.read_text()


def looks_trained(name, target, **options):
    torch.manual_seed(0)
    module = algorithms()[name](str(target), **options)
    with torch.no_grad():
        for parameter in module.draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


@pytest.mark.parametrize(
    ("name", "options", "fields"),
    [
        ("eagle3", {}, {"method": "eagle3", "num_speculative_tokens": 4}),
        ("peagle", {}, {"method": "eagle3", "num_speculative_tokens": 4, "parallel_drafting": True}),
        ("dflash", {"draft_config": {"block_size": 6}}, {"method": "dflash", "num_speculative_tokens": 5}),
        ("dspark", {"draft_config": {"block_size": 6}}, {"method": "dspark", "num_speculative_tokens": 6}),
        ("medusa", {"draft_config": {"num_draft_heads": 3}}, {"method": "medusa", "num_speculative_tokens": 3}),
    ],
)
def test_the_command_for_vllm_has_the_drafts_method_and_tokens(name, options, fields, target, tmp_path):
    module = looks_trained(name, target, **options)
    folder = tmp_path / "a draft"
    module.export_format.to_vllm(module.draft, module.target, folder, "float32")
    vllm, command, *_ = module.export_format.served(module.draft, module.target, folder)
    assert vllm.startswith("for vLLM (in tests with")
    *words, config = shlex.split(command)
    assert words == ["vllm", "serve", module.target.name, "--speculative-config"]
    assert json.loads(config) == {**fields, "model": str(folder)}


@pytest.mark.parametrize("write", ["to_vllm", "to_sglang"])
def test_layers_that_a_server_would_hand_over_in_another_order_are_refused(write, target, tmp_path):
    for name in ("eagle3", "dflash"):
        module = looks_trained(name, target, layer_ids=[4, 1, 3])
        with pytest.raises(UserError, match=r"layers \[4, 1, 3\] in this order, but \w+ hands them over in ascending"):
            getattr(module.export_format, write)(module.draft, module.target, tmp_path / "draft")


def test_what_vllm_cannot_serve_is_refused(target, tmp_path):
    """Each with the reason; nothing is written."""
    refused = {
        "hydra": ({}, "vLLM has no Hydra"),
        "domino": ({}, "vLLM has no Domino"),
        "medusa": ({"draft_config": {"draft_vocab_size": 64}}, "draft_vocab_size is 64; vLLM serves Medusa over"),
        "dspark": ({"draft_config": {"markov_head_type": "rnn"}}, "markov_head_type is rnn, but vLLM has only vanilla"),
        "dflash": ({"draft_config": {"qk_norm": False}}, "qk_norm is off, but vLLM's DFlash requires"),
    }
    for name, (options, words) in refused.items():
        module = looks_trained(name, target, **options)
        with pytest.raises(UserError, match=words):
            module.export_format.to_vllm(module.draft, module.target, tmp_path / "draft")
    biased = looks_trained("dflash", write_family("phi", tmp_path / "phi"), layer_ids=[0, 1])
    with pytest.raises(UserError, match="has a bias, which vLLM omits when drafting"):
        biased.export_format.to_vllm(biased.draft, biased.target, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_vllm_may_capture_the_last_layer(target, tmp_path):
    module = looks_trained("eagle3", target, layer_ids=[1, 3, 7])
    with pytest.raises(UserError, match="layer 7 is the last of"):
        module.export_format.to_sglang(module.draft, module.target, tmp_path / "draft")
    module.export_format.to_vllm(module.draft, module.target, tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 8]
    *_, last = module.export_format.served(module.draft, module.target, tmp_path / "draft")
    assert last.startswith("not for SGLang: layer 7 is the last of")


def test_export_shows_the_commands_of_every_server_that_can_serve_the_draft(target, tmp_path, capsys):
    module = looks_trained("eagle3", target)
    module.export_format.to_hf(module.draft, module.target, tmp_path / "draft", "float32")
    words = ["export", "--draft", tmp_path / "draft", "--target", target, "--dtype", "float32"]
    assert main([*map(str, words), "--output", str(tmp_path / "served"), "--to", "vllm"]) == 0
    output = capsys.readouterr().out
    assert f'vllm serve {module.target.name} --speculative-config \'{{"method": "eagle3"' in output
    assert f"python -m sglang.launch_server --model-path {module.target.name} --speculative-algorithm EAGLE3" in output
    assert main([*map(str, words), "--output", str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert "vllm serve" not in capsys.readouterr().out


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "latent", "vllm", "sglang"),
    [
        ({}, False, None, None),
        ({"mscale": 0.7, "mscale_all_dim": 0.5}, False, None, None),
        ({"mscale": 0.7}, False, None, None),
        ({"attention_factor": 0.1 * math.log(4) + 1}, False, None, None),
        ({"attention_factor": 1.0}, False, None, "times 1, but SGLang would multiply them by 1.139 .*; use --to vllm"),
        ({"mscale": 0.0, "mscale_all_dim": 1.0}, False, None, "times 1.139, but SGLang would multiply them by 0.8782"),
        ({}, True, None, None),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, True, None, None),
        ({"mscale": 1.0}, True, None, None),
        ({"mscale": 0.5}, True, *["times 1.139, but {} would multiply them by 1.069"] * 2),
        ({"mscale_all_dim": 1.0}, True, *["times 1.139, but {} would multiply them by 1 "] * 2),
        ({"attention_factor": 1.0}, True, *["attention_factor is 1.0, which {} does not read for latent"] * 2),
        ({"rope_type": "linear"}, True, *["rope_type is linear; for latent attention, {} would compute yarn"] * 2),
        ({"rope_type": "linear"}, False, None, None),
    ],
)
def test_positions_that_a_server_computes_in_another_way_are_refused(rope, latent, vllm, sglang, target, tmp_path):
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    positions = linear if rope == {"rope_type": "linear"} else {**YARN, **rope}
    config = {"rope_parameters": positions, **(LATENT if latent else {})}
    module = looks_trained("eagle3", target, draft_config=config)
    form = module.export_format
    for server, words, write in (("vLLM", vllm, form.to_vllm), ("SGLang", sglang, form.to_sglang)):
        if words is None:
            write(module.draft, module.target, tmp_path / server, "float32")
        else:
            with pytest.raises(UserError, match=words.format(server)):
                write(module.draft, module.target, tmp_path / server, "float32")
            assert not (tmp_path / server).exists()
