"""Drafts that other projects trained: read by name and in full, the network that their config means, else refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import specforge
from specforge.cli.main import main
from specforge.errors import UserError
from specforge.inference.target_head import TargetHead
from tests.lightning_modules import eagle3_reference, peagle_reference
from tests.lightning_modules.block_reference import BlockReference
from tests.lightning_modules.test_dflash2 import DFlash2Reference
from tests.lightning_modules.test_domino import DominoReference
from tests.lightning_modules.test_dspark import DSparkReference
from tests.modeling.draft import published
from tests.modeling.draft.published import FORMS, H, Published, V
from tests.tiny import recipe

TOKENS, ANCHOR = 7, 5


@pytest.fixture(scope="module")
def head() -> TargetHead:
    g = torch.Generator().manual_seed(1)
    return TargetHead(*(torch.randn(V, H, generator=g, dtype=torch.float64) for _ in range(2)), torch.float64)


@pytest.fixture(scope="module")
def text() -> tuple[Tensor, Tensor]:
    """Tokens, and captured layers of them."""
    g = torch.Generator().manual_seed(2)
    return torch.randint(0, V, (TOKENS,), generator=g), torch.randn(TOKENS, 3 * H, generator=g, dtype=torch.float64)


def weights(draft: Published) -> dict[str, Tensor]:
    ids = draft.target_ids()
    return {"d2t": ids - torch.arange(len(ids)), **{name: x.double() for name, x in draft.own.items()}}


def eagle3_logits(module, draft, head, tokens, aux) -> tuple[Tensor, Tensor]:
    decoder = module.draft.decoder(torch.float64)
    logits, _ = decoder.extend(decoder.fuse(aux[:-1]), head.embed(tokens[1:]))
    kind = eagle3_reference.LatentReference if hasattr(draft.network, "q_lora_rank") else eagle3_reference.Reference
    reference = kind(weights(draft), draft.network, head.embedding, head.lm_head)
    states = reference.states(tokens, aux, 1)[0]
    return logits, reference.w["lm_head.weight"] @ states[TOKENS - 2]


def peagle_logits(module, draft, head, tokens, aux) -> tuple[Tensor, Tensor]:
    logits = module.draft.decoder(torch.float64).draft_logits(aux[:-1], tokens[1:], head.embedding, 3)
    reference = peagle_reference.Reference(weights(draft), draft.network, head.embedding, head.lm_head)
    last = TOKENS - 2
    states = reference.states(tokens, aux, [(last, 1), (last, 2)])
    return logits, torch.stack([reference.w["lm_head.weight"] @ states[last, d] for d in range(3)])


@torch.no_grad()
def block_logits(module, draft, head, tokens, aux) -> tuple[Tensor, Tensor]:
    """Of every drafted token, given the true tokens before it."""
    kinds = {"dflash2": DFlash2Reference, "domino": DominoReference, "dspark": DSparkReference}
    shift = int(draft.algorithm in ("domino", "dspark"))
    reference = kinds.get(draft.algorithm, BlockReference)(
        weights(draft), draft.network, head.embedding, head.lm_head, shift
    )
    decoder, found, expected = module.draft.decoder(torch.float64), [], []
    decoder.extend(aux[:ANCHOR])
    block = torch.tensor([int(tokens[ANCHOR])] + [5] * (module.draft.block_size - 1))
    states = decoder.block(head.embed(block))[1 - shift :]
    corrector = module._corrector(head, torch.float64)
    for depth, (state, (ours, base, full)) in enumerate(
        zip(states, reference.logits(tokens, aux, ANCHOR), strict=True)
    ):
        if ANCHOR + depth >= TOKENS:
            break
        token = int(tokens[ANCHOR + depth])
        row = head.sliced(module.draft.target_ids).scores(state[None])[0]
        found.append(row if corrector is None else corrector(row, state, token))
        if draft.algorithm == "dflash2":
            full = torch.full_like(base, -torch.inf)
            for i in reference.candidates(base):
                full[i] = base[i] + reference.score(token, ours, i)
        expected.append(full)
    return torch.stack(found), torch.stack(expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_published_draft_is_the_network_that_its_config_means(form, target, tmp_path, head, text):
    draft = FORMS[form]()
    module = specforge.load_draft(draft.write(tmp_path / "draft", target), target)
    assert module.algorithm == draft.algorithm
    assert module.draft.layer_ids == draft.layers
    assert torch.equal(module.draft.target_ids, draft.target_ids())
    state = {name: x for name, x in module.draft.state_dict().items() if name not in ("d2t", "t2d")}
    assert state.keys() == draft.own.keys()
    assert all(torch.equal(state[name], x) for name, x in draft.own.items())
    module.draft.double()
    logits = {"eagle3": eagle3_logits, "peagle": peagle_logits}.get(draft.algorithm, block_logits)
    found, expected = logits(module, draft, head, *text)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_too_many_or_too_few_is_named(form, target, tmp_path):
    folder = FORMS[form]().write(tmp_path / "draft", target)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "layers.7.mlp.up_proj.weight": torch.ones(4, 4)}, path)
    with pytest.raises(UserError, match=r"has no tensor layers\.7\.mlp\.up_proj\.weight"):
        specforge.load_draft(folder, target)
    for name in ("fc.weight", next(name for name in tensors if name.endswith("mlp.down_proj.weight"))):
        save_file({n: x for n, x in tensors.items() if n != name}, path)
        with pytest.raises(UserError, match=r"tensor (fc|.*mlp\.down_proj)\.weight is missing"):
            specforge.load_draft(folder, target)


@pytest.mark.parametrize("form", FORMS)
def test_another_number_of_layers_is_named(form, target, tmp_path):
    draft = FORMS[form]()
    fields = draft.config.get("transformer_layer_config", draft.config)
    fields["num_hidden_layers"] += 1
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"] + ["full_attention"]
    with pytest.raises(UserError, match=r"an EAGLE-3 draft has one layer|tensor layers\.2\.\S+ is missing"):
        specforge.load_draft(draft.write(tmp_path / "draft", target), target)


LAYERS = "transformer_layer_config"
REFUSED = [
    # what neither server nor SpecForge would read alike
    (
        published.speculators_eagle3,
        {"norm_before_residual": None},
        "norm_before_residual is missing: speculators takes",
    ),
    (published.speculators_dflash2, {"sliding_window_non_causal": None}, "sliding_window_non_causal is missing"),
    (published.speculators_dspark, {"sample_from_anchor": None}, "sample_from_anchor is missing: speculators takes"),
    (published.speculators_dflash, {"block_size": None}, "block_size is missing: speculators takes that as 8"),
    (published.speculators_dflash, {"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids is missing"),
    (published.speculators_dflash, {"mask_token_id": None}, "mask_token_id is missing"),
    (published.speculators_peagle, {"mask_token_id": None}, "mask_token_id is missing"),
    # what SpecForge does not have
    (
        published.speculators_eagle3,
        {"speculators_model_type": "xpress"},
        "speculators_model_type is 'xpress'; SpecForge",
    ),
    (published.speculators_eagle3, {"speculators_model_type": ["eagle3"]}, r"speculators_model_type is \["),
    (published.speculators_eagle3, {LAYERS: None}, "transformer_layer_config is None, not an object"),
    (published.speculators_eagle3, {f"{LAYERS}.model_type": "gemma3"}, "model_type is 'gemma3'; SpecForge has llama"),
    (published.speculators_eagle3, {f"{LAYERS}.model_type": None}, "model_type is None; SpecForge has llama"),
    (published.speculators_eagle3, {f"{LAYERS}.mlp_bias": True}, "mlp_bias is True, which LlamaForCausalLMEagle3"),
    (published.speculators_eagle3, {"embed_requires_grad": True}, "embed_requires_grad is True, which Llama"),
    (published.speculators_eagle3, {published.IDS: [0, 4, 5]}, "drafts read outputs of layers, the inputs of layers"),
    (published.speculators_eagle3, {published.IDS: [2, 4, 9]}, "layer 8"),
    (published.speculators_dflash, {"sample_from_anchor": True}, "sample_from_anchor is True, which DFlashDraftModel"),
    (published.speculators_dspark, {"sample_from_anchor": False}, "sample_from_anchor is False; Qwen3DSparkModel"),
    (published.speculators_dspark, {"markov_rank": 0}, "markov_rank is 0; Qwen3DSparkModel expects"),
    (published.zlab_dflash2, {"dflash_config.final_logit_softcapping": 20.0}, "final_logit_softcapping is 20.0, which"),
    (published.zlab_dflash2, {"dflash_config.output_multiplier": 0.2}, "output_multiplier is 0.2, which DFlash2"),
    (published.zlab_dflash, {"is_causal": True}, "is_causal is True"),
    (published.modelopt_dflash, {"dflash_config.use_swa": True}, "use_swa is True"),
    (
        published.modelopt_dflash,
        {"dflash_config.attention_sink_bias": True},
        "attention_sink_bias is True, which DFlash",
    ),
    (published.modelopt_dflash, {"dflash_config.causal": True}, "causal is True"),
    (published.modelopt_eagle3, {"eagle_config.parallel_draft_step": 4}, "parallel_draft_step is 4"),
    (published.modelopt_eagle3, {"eagle_config.use_last_layernorm": False}, "use_last_layernorm is False"),
    (published.modelopt_eagle3, {"quantization_config": {"quant_algo": "FP8"}}, "quantization_config is"),
    (published.modelopt_dspark, {"dflash_config.shift_label": False}, "sample_from_anchor is False"),
    (published.modelopt_domino, {"emb_dim": 16}, "emb_dim is 16, but 8 in dflash_config"),
    (published.angelslim_eagle3, {published.IDS: [2, 3, 6]}, r"\[2, 3, 6\], but \[0, 2, 5\] in eagle_config"),
    (published.angelslim_eagle3, {"eagle_aux_injection_mode": "banded_mix_fc"}, "eagle_aux_injection_mode is 'banded"),
    (published.upstream_peagle, {"mask_token_id": None}, "mask_token_id is missing"),
]


@pytest.mark.parametrize(
    ("form", "change", "words"), REFUSED, ids=[f"{f.__name__}, {next(iter(c))}" for f, c, _ in REFUSED]
)
def test_what_would_be_misread_is_one_line_that_names_the_field(form, change, words, target, tmp_path):
    draft = form()
    for path, value in change.items():
        *parents, name = path.split(".")
        place = draft.config
        for parent in parents:
            place = place[parent]
        place.pop(name, None)
        if value is not None:
            place[name] = value
    with pytest.raises(UserError, match=words) as error:
        specforge.load_draft(draft.write(tmp_path / "draft", target), target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_a_copy_of_another_targets_tensor_is_refused(kind, target, tmp_path):
    """SpecForge would draft with this target's own."""
    draft, name = {
        "eagle3": (published.speculators_eagle3(), "embed_tokens.weight"),
        "dflash": (published.speculators_dflash(), "lm_head.weight"),
    }[kind]
    folder = draft.write(tmp_path / "draft", target)
    tensors = load_file(folder / "model.safetensors")
    rounded = {**tensors, name: tensors[name].bfloat16()}
    save_file(rounded, folder / "model.safetensors")
    specforge.load_draft(folder, target)
    tensors[name][3, 4] += 0.1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor {name} is not that of .*tiny"):
        specforge.load_draft(folder, target)


def test_a_map_that_contradicts_the_other_is_refused(target, tmp_path):
    draft = published.eagles_own()
    draft.maps, draft.more = ("d2t",), {"t2d": torch.zeros(V, dtype=torch.bool)}
    ids = torch.arange(published.D)
    draft.more["d2t"] = ids * 4 - ids
    with pytest.raises(UserError, match="t2d marks other tokens than d2t maps to"):
        specforge.load_draft(draft.write(tmp_path / "draft", target), target)


def test_a_tensor_under_two_names_is_refused(target, tmp_path):
    draft = published.eagles_own()
    draft.more = {"layers.0.mlp.up_proj.weight": torch.ones(published.FFN, H)}
    with pytest.raises(UserError, match="there twice, under two names"):
        specforge.load_draft(draft.write(tmp_path / "draft", target), target)


def test_drafts_of_eagle_1_are_not_read_as_language_models(target, tmp_path):
    draft = published.eagles_own()
    del draft.config["draft_vocab_size"]
    draft.own = {"fc.weight": torch.ones(H, 2 * H), "layers.0.mlp.up_proj.weight": torch.ones(published.FFN, H)}
    draft.maps = ()
    with pytest.raises(UserError, match="as in drafts of EAGLE-1 and EAGLE-2, which SpecForge does not have"):
        specforge.load_draft(draft.write(tmp_path / "draft", target), target)


def test_the_hint_for_a_pickle_makes_a_folder_that_is_read(target, tmp_path, monkeypatch):
    draft = published.eagles_own()
    folder = draft.write(tmp_path / "draft", target)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin: is a pickle, which SpecForge never loads") as error:
        specforge.load_draft(folder, target)
    monkeypatch.chdir(folder)
    import safetensors.torch

    eval(str(error.value).split("convert it once: ")[1], {"torch": torch, "safetensors": safetensors})
    module = specforge.load_draft(folder, target)
    assert torch.equal(module.draft.fc.weight, draft.own["fc.weight"])


@pytest.mark.parametrize("form", ["speculators, EAGLE-3", "EAGLE, EAGLE-3", "z-lab, DFlash"])
def test_a_published_draft_is_measured(form, target, prompts, tmp_path):
    folder = FORMS[form]().write(tmp_path / "draft", target)
    words = ["--prompts", prompts, "--target", target, "--num_prompts", 2, "--cache", tmp_path / "cache"]
    words += ["--max_new_tokens", 4, "--speed_prompts", 0, "--gamma", 3]
    result = tmp_path / "evaluation.json"
    assert main([str(w) for w in ["evaluate", "--draft", folder, *words, "--json", result]]) == 0
    methods = {m["method"]: m for m in json.loads(Path(result).read_text())["methods"]}
    assert methods[FORMS[form]().algorithm]["tau"] >= 1


def test_a_run_continues_with_a_published_draft(target, features, tmp_path):
    folder = published.speculators_eagle3().write(tmp_path / "draft", target)
    start = {"model__init_args__init_from": str(folder), "trainer__max_steps": 1}
    path = recipe(target, features, tmp_path, model__init_args__draft_config=None, **start)
    assert main(["fit", "--config", str(path)]) == 0
    module = specforge.load_draft(next((tmp_path / "run").rglob("last.ckpt")))
    assert module.draft.config.norm_before_residual is True
    assert module.draft.layer_ids == (1, 3, 4)
    moved = (module.draft.fc.weight - published.eagle()["fc.weight"]).abs().max()
    assert 0 < moved < 1e-2


def test_speculators_has_the_positions_of_sliding_layers_in_all_layers_of_a_block_drafter(target, tmp_path):
    draft = published.speculators_dflash()
    layers = draft.config[LAYERS]
    own = layers["rope_parameters"]
    layers["rope_parameters"] = {"full_attention": {**own, "rope_theta": 77.0}, "sliding_attention": own}
    module = specforge.load_draft(draft.write(tmp_path / "draft", target), target)
    assert module.draft.config.rope_parameters["rope_theta"] == own["rope_theta"]


def test_a_target_that_the_folder_does_not_name_is_used_with_a_warning(target, tmp_path, caplog):
    draft = published.speculators_dflash()
    folder = draft.write(tmp_path / "draft", target)
    specforge.load_draft(folder, target)
    assert caplog.messages == [f"{folder}: its config names the target org/target, not {target}"]
    draft.config["speculators_config"]["verifier"]["name_or_path"] = f"org/{target.name}"
    (folder / "config.json").write_text(json.dumps(draft.config))
    caplog.clear()
    specforge.load_draft(folder, target)
    assert not caplog.messages


def test_layers_that_a_folder_does_not_name_are_those_of_servers_with_a_warning(target, tmp_path, caplog):
    draft = published.angelslim_eagle3()
    specforge.load_draft(draft.write(tmp_path / "named", target), target)
    assert not caplog.messages
    del draft.config["aux_hidden_states_layer_ids"]
    folder = draft.write(tmp_path / "draft", target)
    assert specforge.load_draft(folder, target).draft.layer_ids == (1, 3, 4)  # of eight
    words = "names no captured layers; the draft reads [1, 3, 4], as in servers"
    assert caplog.messages == [f"{folder / 'config.json'} {words}"]


def test_tensors_of_the_eagle_code_may_have_a_prefix(target, tmp_path):
    draft = published.eagles_own()
    folder = draft.write(tmp_path / "draft", target)
    tensors = load_file(folder / "model.safetensors")
    save_file({f"model.{name}": x for name, x in tensors.items()}, folder / "model.safetensors")
    module = specforge.load_draft(folder, target)
    assert module.algorithm == "eagle3"
    assert torch.equal(module.draft.target_ids, draft.target_ids())
