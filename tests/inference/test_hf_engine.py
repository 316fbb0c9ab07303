"""What the engine captures is what transformers computes, one sample at a time."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from specforge.cli.main import main
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy
from specforge.errors import UserError
from specforge.inference.float8_blocks import quantise
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_engine.hf import FeatureTap
from specforge.inference.target_files import TargetFiles
from tests.families import write_family

POLICY = CapturePolicy((1, 3, 4))


@pytest.fixture(scope="module")
def engine(target) -> HFTargetEngine:
    return HFTargetEngine(TargetFiles.find(str(target)), "float32")


def sequences() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in (5, 17, 1, 9)]


def test_captured_layers_and_last_states_are_those_of_transformers(engine, target):
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    for ids, found in zip(sequences(), engine.capture(sequences(), POLICY), strict=True):
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        layers = torch.cat([output.hidden_states[i + 1][0] for i in POLICY.layer_ids], -1)
        torch.testing.assert_close(found[AUX_HIDDEN_STATES], layers, rtol=1e-4, atol=1e-5)
        logits = found[LAST_HIDDEN_STATES] @ model.lm_head.weight.detach().T
        torch.testing.assert_close(logits, output.logits[0], rtol=1e-4, atol=1e-4)


def test_batching_changes_nothing(engine):
    together = engine.capture(sequences(), POLICY)
    for ids, found in zip(sequences(), together, strict=True):
        (alone,) = engine.capture([ids], POLICY)
        for name in alone:
            torch.testing.assert_close(found[name], alone[name], rtol=1e-4, atol=1e-5)


def test_features_come_in_the_dtype_of_the_target(target):
    engine = HFTargetEngine(TargetFiles.find(str(target)), "bfloat16")
    (found,) = engine.capture([[1, 2, 3]], POLICY)
    assert {x.dtype for x in found.values()} == {torch.bfloat16}


def test_a_cpu_without_bf16_multiplies_in_fp32_and_rounds_the_features(target, engine, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    narrow = HFTargetEngine(TargetFiles.find(str(target)), "bfloat16")
    narrow.check(POLICY)
    for found, exact in zip(narrow.capture(sequences(), POLICY), engine.capture(sequences(), POLICY), strict=True):
        for name in exact:
            assert torch.equal(found[name], exact[name].bfloat16())
    assert narrow.dtype == "bfloat16"
    # Layers that may be on GPUs, whatever the CPU beside them can multiply, keep the dtype.
    for gpus, kept in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda found=gpus: found)
        spread = HFTargetEngine(TargetFiles.find(str(target)), "bfloat16", device_map={"": "cpu"})
        assert {x.dtype for x in spread.model.parameters()} == {kept}


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers computes in float8 there")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_target_in_float8_computes_in_the_dtype_that_is_asked_for(target, tmp_path, dtype):
    folder, block = shutil.copytree(target, tmp_path / "float8"), (128, 128)
    tensors = {}
    for name, x in load_file(target / "model.safetensors").items():
        tensors[name] = x.bfloat16()
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(x, block)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))

    engine = HFTargetEngine(TargetFiles.find(str(folder)), dtype)
    engine.check(POLICY)
    (found,) = engine.capture([[1, 2, 3]], POLICY)
    assert {str(x.dtype) for x in found.values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize(("layers", "words"), [((1, 99), "99"), ((-1, 2), "-1"), ((2, 2), "twice")])
def test_a_wrong_layer_is_refused_by_name(engine, layers, words):
    with pytest.raises(UserError, match=words):
        engine.check(CapturePolicy(layers))


def test_batched_generation_is_greedy_decoding_one_at_a_time(engine, target):
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    answers = engine.generate(sequences(), max_new_tokens=12, end_ids=[256, 40])
    for ids, answer in zip(sequences(), answers, strict=True):
        plain = list(ids)
        while len(plain) < len(ids) + 12 and (len(plain) == len(ids) or plain[-1] not in (256, 40)):
            with torch.no_grad():
                plain.append(int(model(torch.tensor([plain])).logits[0, -1].argmax()))
        assert answer == plain[len(ids) :]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2", "phi", "minicpm3", "gpt_neox"])
def test_the_head_of_a_known_class_passes(name, dtype, tmp_path):
    HFTargetEngine(TargetFiles.find(str(write_family(name, tmp_path / "t"))), dtype).check(POLICY)


def test_logits_that_are_not_the_heads_are_refused(target, monkeypatch):
    """Whatever a class does to its logits: two tokens show it, in every dtype that a target may run in."""
    kind = type(HFTargetEngine(TargetFiles.find(str(target)), "float32").model)
    plain = kind.forward

    def forward(change):
        def changed(self, *args, **options):
            output = plain(self, *args, **options)
            output.logits = change(output.logits)
            return output

        return changed

    changes = {
        "scaled": lambda x: x / 4,
        "capped": lambda x: 2 * torch.tanh(x / 2),
        "biased": lambda x: x + torch.arange(264) / 99,
        "cut": lambda x: x[..., :260],
        "banned": lambda x: x.index_fill(-1, torch.tensor([7]), -torch.inf),
    }
    for dtype in ("float32", "bfloat16"):
        for name, change in changes.items():
            engine = HFTargetEngine(TargetFiles.find(str(target)), dtype)
            monkeypatch.setattr(kind, "forward", forward(change))
            with pytest.raises(UserError, match="its logits are not its output head times its last states"):
                engine.check(POLICY)
            monkeypatch.undo()
            assert engine.check(POLICY) is None, name


def test_files_that_lack_tensors_are_refused(target, tmp_path):
    """Transformers would draw them at random and say so in a warning."""
    folder = shutil.copytree(target, tmp_path / "t")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"lack 1 tensors of LlamaForCausalLM, such as model.layers.3.mlp.up_proj.weight"
    ):
        HFTargetEngine(TargetFiles.find(str(folder)), "float32")


def test_whatever_a_folder_asks_of_generation_answers_are_the_targets_own(target, engine, tmp_path):
    folder = shutil.copytree(target, tmp_path / "t")
    asked = {
        "eos_token_id": 256,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "num_beams": 3,
        "do_sample": True,
        "temperature": 5.0,
        "suppress_tokens": list(range(40, 90)),
        "forced_eos_token_id": 3,
        "min_length": 30,
        "begin_suppress_tokens": [1, 2],
        "bad_words_ids": [[5]],
        "exponential_decay_length_penalty": [1, 2.0],
        "sequence_bias": [[[9], 50.0]],
        "guidance_scale": 2.0,
        "max_length": 3,
        "stop_strings": ["a"],
        "prompt_lookup_num_tokens": 3,
        "cache_implementation": "static",
        "num_return_sequences": 2,
        "watermarking_config": {"bias": 9.0},
    }
    (folder / "generation_config.json").write_text(json.dumps(asked))
    other = HFTargetEngine(TargetFiles.find(str(folder)), "float32")
    options = {"max_new_tokens": 12, "end_ids": [256]}
    assert other.generate(sequences(), **options) == engine.generate(sequences(), **options)


def test_answers_without_a_token_that_ends_them_are_as_long_as_they_may_be(engine):
    assert [len(x) for x in engine.generate(sequences(), max_new_tokens=7, end_ids=[])] == [7] * 4


@pytest.mark.parametrize("name", ["phi3", "llama, dynamic"])
def test_features_of_a_text_do_not_depend_on_longer_ones_read_with_it_or_before_it(name, tmp_path):
    """Positions of the types longrope and dynamic change with the longest text of a pass, and dynamic remembers it."""
    engine = HFTargetEngine(TargetFiles.find(str(write_family(name, tmp_path / "t"))), "float32")
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 256, (n,), generator=g).tolist() for n in (30, 600, 520, 400, 700)]
    together = engine.capture(texts, POLICY)
    for ids, found in zip(texts, together, strict=True):
        alone = HFTargetEngine(engine.target, "float32").capture([ids], POLICY)[0]
        for feature in alone:
            torch.testing.assert_close(found[feature], alone[feature], rtol=1e-4, atol=1e-4)


def test_a_target_with_as_many_vision_as_text_layers_gives_those_of_its_text(tmp_path):
    from transformers import AutoConfig

    from tests.families import BASE
    from tests.tiny import write_tokenizer

    write_tokenizer(tmp_path)
    text = {k: v for k, v in BASE.items() if k != "bos_token_id"} | {"model_type": "gemma3_text", "head_dim": 8}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    files = TargetFiles.find(str(tmp_path))
    assert (files.num_layers, files.hidden_size, files.vocab_size) == (8, 32, 264)
    engine = HFTargetEngine(files, "float32")
    engine.check(POLICY)
    ids = sequences()[1]
    (found,) = engine.capture([ids], POLICY)
    with torch.no_grad():
        states = engine.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    layers = torch.cat([states[i + 1][0] for i in POLICY.layer_ids], -1)
    torch.testing.assert_close(found[AUX_HIDDEN_STATES], layers, rtol=1e-4, atol=1e-5)


def test_regenerate_goes_on_where_it_was_cut_and_keeps_the_order(target, conversations, tmp_path):
    def run(output) -> int:
        words = [
            "regenerate",
            "--data",
            conversations,
            "--target",
            target,
            "--output",
            output,
            "--max_new_tokens",
            8,
            "--batch_size",
            4,
            "--dtype",
            "float32",
        ]
        return main([str(word) for word in words])

    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run(whole) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == [f"c{i}" for i in range(40)]
    cut.write_bytes(b"".join(lines[3:17]) + lines[20][:25])
    assert run(cut) == 0
    assert cut.read_bytes() == whole.read_bytes()


# Several devices, attention, dtype and quantisation.

ON_DISK = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
ON_DISK |= {f"model.layers.{i}": "disk" if i in (1, 4) else "cpu" for i in range(8)}


@pytest.mark.parametrize("device_map", ["auto", ON_DISK], ids=["auto", "disk"])
def test_a_target_that_is_spread_out_computes_the_same(engine, target, device_map):
    """Captured layers 1 and 4 are on the disk, layer 3 is in memory; accelerate moves inputs and outputs about."""
    spread = HFTargetEngine(TargetFiles.find(str(target)), "float32", device_map=device_map)
    spread.check(POLICY)
    assert spread.description == ""
    for found, own in zip(spread.capture(sequences(), POLICY), engine.capture(sequences(), POLICY), strict=True):
        assert all(torch.equal(found[name], own[name]) for name in own)
    asked = {"max_new_tokens": 6, "end_ids": []}
    assert spread.generate(sequences(), **asked) == engine.generate(sequences(), **asked)


def test_layers_on_different_devices_are_joined_in_the_order_of_the_policy():
    """A tensor on ``meta`` stands for one on another GPU: torch refuses to join it with one in memory."""
    layers = nn.ModuleList(nn.Identity() for _ in range(2))
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = layers
    text = SimpleNamespace(num_hidden_layers=2)
    model.config = SimpleNamespace(get_text_config=lambda decoder: text)
    model.get_decoder = lambda: model.model
    tap = FeatureTap(model, CapturePolicy((0, 1), last_hidden_states=False))
    layers[0](torch.ones(1, 3, 4))
    layers[1](torch.ones(1, 3, 5, device="meta"))
    joined = tap.features()[AUX_HIDDEN_STATES]
    assert (joined.shape, joined.device.type) == ((1, 3, 9), "meta")
    tap.close()


def test_another_attention_is_named_in_the_provenance(engine, target):
    eager = HFTargetEngine(TargetFiles.find(str(target)), "float32", attention="eager")
    eager.check(POLICY)
    assert eager.model.config._attn_implementation == "eager"
    assert eager.description == f"transformers {transformers.__version__}, eager attention"
    assert engine.description == ""
    with pytest.raises(UserError, match=r"transformers cannot load it .*nonsense"):
        HFTargetEngine(TargetFiles.find(str(target)), "float32", attention="nonsense")


@pytest.mark.parametrize("written", [True, False])
def test_the_dtype_of_the_checkpoint(target, tmp_path, written):
    """It is the config's, or where that has none the one of the embedding."""
    folder = shutil.copytree(target, tmp_path / "half")
    tensors = {name: x.half() for name, x in load_file(target / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | ({"dtype": "float16"} if written else {})))
    engine = HFTargetEngine(TargetFiles.find(str(folder)), "auto")
    assert engine.dtype == "float16"
    (found,) = engine.capture([[1, 2, 3]], POLICY)
    assert {x.dtype for x in found.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("compressed-tensors", "compressed-tensors"),
        ("bitsandbytes", "bitsandbytes"),
        ("unheard-of", "so the quantisation unheard-of of its weights would be ignored"),
    ],
)
def test_quantised_weights_are_read_or_refused(target, tmp_path, method, message):
    """Never taken without their scales; the line names the package that is missing."""
    folder = shutil.copytree(target, tmp_path / "quantised")
    tensors = {}
    for name, x in load_file(target / "model.safetensors").items():
        tensors[name] = x
        if "_proj" in name:
            scale = x.abs().amax(1, keepdim=True) / 448
            tensors[name], tensors[f"{name}_scale"] = (x / scale).to(torch.float8_e4m3fn), scale.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    form = {"quant_method": method, "format": "float-quantized", "config_groups": groups, "ignore": ["lm_head"]}
    form |= {"load_in_8bit": True} if method == "bitsandbytes" else {"quantization_status": "compressed"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": form}))
    if method == "unheard-of" or find_spec(method.replace("-", "_")) is None:
        with pytest.raises(UserError, match=message):
            HFTargetEngine(TargetFiles.find(str(folder)), "float32")
        return
    own = HFTargetEngine(TargetFiles.find(str(target)), "float32").capture([[1, 2, 3]], POLICY)[0]
    found = HFTargetEngine(TargetFiles.find(str(folder)), "float32").capture([[1, 2, 3]], POLICY)[0]
    for name, x in own.items():
        assert (found[name] - x).norm() < 0.1 * x.norm()
