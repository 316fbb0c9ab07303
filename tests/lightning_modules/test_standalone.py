"""Losses and gradients of the stand-alone draft against its definition, one prefix at a time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.loading import load_module
from lightning_modules.standalone import StandaloneModule
from specforge.cli.main import main
from specforge.contracts import LAST_HIDDEN_STATES, TrainBatch
from specforge.decoding.decoder import decode
from specforge.decoding.verify import Sampling
from specforge.errors import UserError
from specforge.eval.cache import Reference
from specforge.eval.offline import draft_rounds
from specforge.eval.tau import jump
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles
from specforge.inference.target_head import TargetHead
from tests.families import BASE, LONGROPE, write_family
from tests.lightning_modules.test_eagle3 import make_documents, make_head, pack, same
from tests.tiny import recipe, write_target

V, H = 48, 16
SMALL = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


def make_module(target: Path, config: dict | None = None, **options) -> StandaloneModule:
    torch.manual_seed(0)
    module = StandaloneModule(str(target), draft_config={**SMALL, **(config or {})}, **options)
    module.draft.double()
    size = len(module.draft.d2t)
    if size < V:
        module.draft.set_vocabulary(torch.randperm(V)[:size].sort().values)
    return module


def documents(lengths: tuple[int, ...], share: float = 0.6, seed: int = 2) -> list[TrainBatch]:
    found = make_documents(lengths, seed=seed, share=share)
    for d in found:
        d.features = {LAST_HIDDEN_STATES: d.features[LAST_HIDDEN_STATES]}
    return found


def run(module, head: TargetHead, batches: list[TrainBatch]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    module.zero_grad()
    outputs = [module.training_loss(batch, head) for batch in batches]
    total = sum((o.loss for o in outputs), torch.zeros((), dtype=torch.float64))
    total.backward()
    gradients = {name: p.grad.clone() for name, p in module.draft.named_parameters() if p.grad is not None}
    return total.detach(), gradients, sum(o.hits for o in outputs)


def by_definition(module, head: TargetHead, batches: list[TrainBatch], loss: str, label: str):
    """Every supervised token from its prefix alone, without the first token: no padding, mask or packing."""
    ids = [i + int(offset) for i, offset in enumerate(module.draft.d2t)]
    total, count, hits = torch.zeros((), dtype=torch.float64), 0, 0
    for d in batches:
        for j in range(2, d.num_tokens):
            if not d.loss_mask[j]:
                continue
            count += 1
            z = module.draft.model(d.input_ids[None, 1:j]).logits[0, -1]
            p = torch.softmax(head.lm_head @ d.features[LAST_HIDDEN_STATES][j - 1], 0)
            right = int(p.argmax()) if label == "target" else int(d.input_ids[j])
            if right not in ids:
                continue
            q = torch.softmax(z, 0)
            hits += ids[int(q.argmax())] == right
            inside = p[ids] / p[ids].sum()
            total = (
                total
                + {
                    "kl": lambda q=q, r=inside: (r * (r.log() - q.log())).sum(),
                    "reverse_kl": lambda q=q, r=inside: (q * (q.log() - r.log())).sum(),
                    "ce": lambda q=q, right=right: -q[ids.index(right)].log(),
                    "tv": lambda q=q, p=p: 1 - torch.minimum(p[ids], q).sum(),
                }[loss]()
            )
    module.zero_grad()
    total.backward()
    gradients = {name: p.grad.clone() for name, p in module.draft.named_parameters() if p.grad is not None}
    return (total.detach(), gradients, torch.tensor([hits])), count


@pytest.mark.parametrize(
    ("config", "options", "share"),
    [
        ({}, {"loss": "kl"}, 0.6),
        ({"tie_word_embeddings": True}, {"loss": "kl", "label": "data"}, 0.6),
        ({"draft_vocab_size": 20}, {"loss": "kl"}, 1.0),
        ({"draft_vocab_size": 20, "tie_word_embeddings": True}, {"loss": "tv", "chunk": 2}, 0.6),
        ({"draft_vocab_size": 20}, {"loss": "ce", "label": "data"}, 0.3),
        ({}, {"loss": "reverse_kl", "chunk": 1}, 0.6),
        ({"draft_vocab_size": 20}, {"loss": "kl", "train_embedding": False}, 0.6),
        ({"tie_word_embeddings": True}, {"loss": "kl", "train_embedding": False}, 0.6),
        ({"model_type": "qwen3", "head_dim": 8}, {"loss": "ce"}, 0.6),
    ],
)
def test_loss_gradients_and_hits_are_those_of_the_definition(small_target, config, options, share):
    module, head = make_module(small_target, config, **options), make_head()
    some = documents((9, 12, 3, 7, 1, 2), share)
    slow, count = by_definition(module, head, some, options["loss"], options.get("label", "target"))
    batch = pack(some, padding=5)
    same(run(module, head, [batch]), slow)
    assert module.training_loss(batch, head).num_supervised == count
    frozen = not options.get("train_embedding", True)
    assert ("model.model.embed_tokens.weight" in slow[1]) is not frozen


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_packed_is_one_by_one_in_any_order(small_target, share):
    module, head = make_module(small_target), make_head()
    some = documents((8, 3, 11, 5), share)
    expected = run(module, head, some)
    same(run(module, head, [pack(some)]), expected)
    same(run(module, head, [pack(some[::-1], padding=9)]), expected)


def test_nothing_leaks_across_documents(small_target):
    module, head = make_module(small_target), make_head()
    first, second = documents((8, 9))
    alone = run(module, head, [second])
    first.input_ids = first.input_ids.flip(0)
    first.features = {name: x * 100 for name, x in first.features.items()}
    both, other = run(module, head, [pack([first, second])]), run(module, head, [first])
    torch.testing.assert_close(both[0] - other[0], alone[0], rtol=1e-6, atol=1e-6, check_dtype=False)


def test_without_supervised_tokens_every_parameter_still_has_a_gradient(small_target):
    module, head = make_module(small_target), make_head()
    (single,) = documents((1,), share=1.0)
    nothing = TrainBatch(single.input_ids[:0], single.loss_mask[:0], {LAST_HIDDEN_STATES: torch.zeros(0, H)}, (), ())
    for batch in (single, nothing):
        module.zero_grad()
        output = module.training_loss(batch, head)
        output.loss.backward()
        assert output.num_supervised == 0
        assert all(p.grad is not None and not p.grad.any() for p in module.draft.parameters())
        assert module.validation_chains(batch, head, 3)[:2] == (0.0, 0)


def test_bf16_keeps_fp32_masters_and_close_gradients(small_target):
    head, module = make_head(), make_module(small_target)
    batch = pack(documents((30, 40)))
    _, exact, _ = run(module, head, [batch])
    module.draft.float()
    batch.features = {name: x.float() for name, x in batch.features.items()}
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        module.training_loss(batch, TargetHead(head.embedding, head.lm_head, torch.bfloat16)).loss.backward()
    for name, parameter in module.draft.named_parameters():
        assert parameter.dtype == torch.float32
        assert (parameter.grad.double() - exact[name]).norm() / exact[name].norm() < 0.1, name


def test_start_from_target_takes_layers_from_the_first_to_the_last(target):
    module = StandaloneModule(str(target), init_from="target", draft_config={"num_hidden_layers": 3})
    module.draft.start_from_target(module.target)
    files, state = module.target, module.draft.state_dict()
    for mine, theirs in enumerate((0, 4, 7)):
        name = "mlp.down_proj.weight"
        assert torch.equal(state[f"model.model.layers.{mine}.{name}"], files.layer_tensor(theirs, name))
    assert torch.equal(module.draft.head_weight, files.lm_head())
    small = StandaloneModule(
        str(target), init_from="target", draft_config={"num_hidden_layers": 8, "draft_vocab_size": 64}
    )
    small.draft.set_vocabulary(torch.arange(0, 256, 4))
    small.draft.start_from_target(small.target)
    assert torch.equal(small.draft.head_weight, files.lm_head()[::4][:64])


@pytest.fixture(scope="module")
def engine(target) -> HFTargetEngine:
    return HFTargetEngine(TargetFiles.find(str(target)), "float32")


def half_the_target(target: Path, **config) -> StandaloneModule:
    """Five of eight layers: right now and then."""
    module = StandaloneModule(str(target), init_from="target", draft_config={"num_hidden_layers": 5, **config}).eval()
    if config:
        module.draft.set_vocabulary(torch.arange(0, 264, 264 // config["draft_vocab_size"]))
    module.draft.start_from_target(module.target)
    return module


PROMPTS = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 11, 6, 20, 1)]


@pytest.mark.parametrize("config", [{}, {"draft_vocab_size": 132}], ids=["whole", "reduced"])
@pytest.mark.parametrize("gamma", [1, 4])
def test_greedy_output_is_the_targets_own_and_offline_rounds_are_the_decoded_ones(engine, target, config, gamma):
    module = half_the_target(target, **config)
    head = module.target_head(torch.device("cpu"))
    plain = engine.generate(PROMPTS, max_new_tokens=40, end_ids=[256])
    make = lambda: module.drafter(head, torch.float32)  # noqa: E731
    options = {"gamma": gamma, "max_new_tokens": 40, "end_ids": (256,)}
    together = decode(engine.model, make, PROMPTS, **options)
    alone = [decode(engine.model, make, [p], **options)[0] for p in PROMPTS[1::2]]
    assert [d.tokens for d in together] == plain
    assert [d.tokens for d in alone] == plain[1::2]
    features = engine.capture([[*p, *a] for p, a in zip(PROMPTS, plain, strict=True)], module.spec.capture)
    offline = [
        draft_rounds(module, head, Reference(p, a, f), gamma, Sampling())
        for p, a, f in zip(PROMPTS, plain, features, strict=True)
    ]
    assert [(d.counted, d.rounds) for d in together] == offline
    assert [(d.counted, d.rounds) for d in alone] == offline[1::2]
    assert sum(r.tokens for r in offline) > sum(r.rounds for r in offline)
    for prompt, answer, tensors, rounds in zip(PROMPTS, plain, features, offline, strict=True):
        (chains,) = module.validation_chains(Reference(prompt, answer, tensors).batch(), head, gamma).chains
        assert jump(chains)[0] == rounds


def test_the_target_itself_drafts_what_it_would_say_without_the_first_token(engine, target):
    module = StandaloneModule(str(target), draft=str(target)).eval()
    for text in PROMPTS[:4]:
        drafter = module.drafter(module.target_head(torch.device("cpu")), torch.float32)
        drafter.observe(text, {})
        (expected,) = engine.generate([text[1:]], max_new_tokens=4, end_ids=[256])
        assert list(drafter.propose(4, Sampling()).tokens)[: len(expected)] == expected


def test_the_cache_holds_what_a_fresh_reading_would(target):
    """After any rejections, drafting goes on as if the committed text had been read at once."""
    module = half_the_target(target)
    drafter = module.drafter(module.target_head(torch.device("cpu")), torch.float32)
    text = PROMPTS[3]
    drafter.observe(text[:4], {})
    at = 4
    for accepted in (0, 2, 3, 0, 4, 1):
        proposal = drafter.propose(4, Sampling())
        fresh = module.drafter(module.target_head(torch.device("cpu")), torch.float32)
        fresh.observe(text[:at] if at <= 4 else [text[0], *drafter._tokens], {})
        assert proposal.tokens == fresh.propose(4, Sampling()).tokens
        drafter.observe([*proposal.tokens[:accepted], text[at]], {})
        at += 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_sampled_output_has_the_targets_distribution(engine, target, deterministic):
    """Chi-square of four tokens of 500 decoded answers against the target's exact joint distribution."""
    module = StandaloneModule(str(target), draft=str(target)).eval()
    g = torch.Generator().manual_seed(0)
    for parameter in module.draft.parameters():  # near the target, but not it
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=g)
    head, sampling, rounds = module.target_head(torch.device("cpu")), Sampling(1.0, top_k=2), 500

    def make():
        drafter = module.drafter(head, torch.float32)
        drafter.deterministic = deterministic
        return drafter

    decoded = decode(
        engine.model, make, [PROMPTS[2]] * rounds, gamma=2, max_new_tokens=4, end_ids=(), sampling=sampling
    )
    expected = {(): float(rounds)}
    for _ in range(4):
        step = {}
        for tokens, share in expected.items():
            probs = sampling.probs(engine.model(torch.tensor([[*PROMPTS[2], *tokens]])).logits[0, -1:])[0]
            step |= {(*tokens, t): share * float(probs[t]) for t in probs.nonzero().flatten().tolist()}
        expected = step
    found = Counter(tuple(d.tokens) for d in decoded)
    assert set(found) <= set(expected)
    chi = sum((found[tokens] - share) ** 2 / share for tokens, share in expected.items())
    assert chi < 50  # 15 degrees of freedom: one in a hundred thousand
    share = sum(sum(d.accepted) for d in decoded) / sum(sum(d.drafted) for d in decoded)
    assert 0.05 < share < 0.95


def test_export_is_a_folder_that_transformers_loads_and_specforge_reads_back(target, features, tmp_path):
    from transformers import AutoModelForCausalLM

    for tied in (True, False):
        module = half_the_target(target)
        if not tied:
            config = {"num_hidden_layers": 2, "tie_word_embeddings": False}
            module = StandaloneModule(str(target), draft_config=config).eval()
        for parameter in module.draft.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape)
        for form in ("sglang", "vllm", "hf"):
            folder = tmp_path / f"{form}-{tied}"
            getattr(module.export_format, f"to_{form}")(module.draft, module.target, folder, "float32")
            model = AutoModelForCausalLM.from_pretrained(folder)
            ids = torch.tensor([PROMPTS[3]])
            assert torch.equal(model(ids).logits, module.draft.model(ids).logits)
            again = load_module(folder, str(target))
            assert torch.equal(again.draft.model(ids).logits, module.draft.model(ids).logits)
            again = StandaloneModule(str(target), draft=str(folder))
            assert torch.equal(again.draft.model(ids).logits, module.draft.model(ids).logits)
    reduced = StandaloneModule(str(target), draft_config={"draft_vocab_size": 64})
    for parameter in reduced.draft.parameters():
        parameter.data += 0.01
    with pytest.raises(UserError, match="train it without draft_vocab_size"):
        reduced.export_format.to_sglang(reduced.draft, reduced.target, tmp_path / "x", "float32")


def test_the_served_command_names_the_algorithm(tmp_path):
    form = StandaloneModule.export_format
    assert "--speculative-algorithm STANDALONE" in form.sglang.command("t", tmp_path, 4)
    assert '"method": "draft_model"' in form.vllm.command("t", tmp_path, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_config": {"vocab_size": 100}}, "vocab_size is 100, but the target"),
        ({"draft_config": {"draft_vocab_size": 999}}, "draft_vocab_size is 999"),
        ({"draft_config": {"model_type": "llamma", "vocab_size": 264}}, "no model_type 'llamma'"),
        (
            {"draft_config": {**BASE, "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.1}},
            "logits of Gemma2ForCausalLM are not its output head times its last states",
        ),
        ({"draft_config": {"num_hidden_layers": 2, "num_attention_heads": 5}}, "model.draft_config"),
        ({"draft": "no/such-model-here"}, "draft 'no/such-model-here'"),
    ],
)
def test_bad_options_are_refused_by_name(target, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        StandaloneModule(str(target), **options)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layer": 2}, "num_hidden_layer is 2, but model_type 'llama' has no such field"),
        ({"norm_output": True}, "norm_output is True, but model_type 'llama'"),
        ({"num_hidden_layers": 9}, "num_hidden_layers is 9, but .* has 8"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, but .* has 8"),
        ({"draft_vocab_size": -1}, "draft_vocab_size is -1, but"),
        ({"draft_vocab_size": "64"}, "draft_vocab_size is '64', but"),
        ({"intermediate_size": 10**12}, "such a draft needs .* GB, but only"),
        ({**BASE, "model_type": "gemma2", "head_dim": 8}, "logits of Gemma2ForCausalLM are not its output head times"),
        ({**BASE, "model_type": "granite", "logits_scaling": 2.0}, "logits of GraniteForCausalLM are not"),
        ({**BASE, "model_type": "phi"}, "output head of PhiForCausalLM has a bias"),
    ],
    ids=str,
)
def test_fields_that_its_model_does_not_have_or_cannot_be_trained_with_are_refused(target, config, words):
    with pytest.raises(UserError, match=words):
        StandaloneModule(str(target), draft_config=config)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "seed_oss", "gemma3_text"])
def test_any_model_whose_logits_are_its_head_times_its_state_can_be_a_draft(target, kind):
    """Also with dropout, which is off during the check."""
    fields = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}
    module = StandaloneModule(str(target), draft_config={**BASE, "model_type": kind, **fields.get(kind, {})})
    assert module.draft.training


def test_fields_with_an_entry_per_layer_follow_the_layers_that_are_kept(tmp_path):
    target = write_family("smollm3", tmp_path / "target")
    module = StandaloneModule(str(target), init_from="target", draft_config={"num_hidden_layers": 3})
    files = module.target
    assert files.config["no_rope_layers"] == [1, 1, 1, 0, 1, 1, 1, 0]
    assert module.draft.config.no_rope_layers == [1, 1, 0]
    module.start(files)


def test_a_class_may_have_its_own_names_for_common_fields(tmp_path):
    target = write_family("gpt2", tmp_path / "target")
    for fields in ({"num_hidden_layers": 3}, {"n_layer": 3}):
        config = StandaloneModule(str(target), draft_config=fields).draft.config
        assert (config.n_layer, config.num_hidden_layers) == (3, 3)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "max_position_embeddings": 20}, 20),
        ({"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 20}, 20),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 20,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
            20,
        ),
        ({"model_type": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 400}, 400),
        ({"model_type": "llama", "max_position_embeddings": 20}, None),
    ],
    ids=str,
)
def test_the_longest_text_of_a_draft(target, config, limit):
    assert StandaloneModule(str(target), draft_config={**BASE, "num_hidden_layers": 1, **config}).draft.longest == limit


def test_texts_that_are_too_long_for_the_draft_are_refused_before_training(target, features, tmp_path, capsys):
    config = {"model_type": "gpt2", "vocab_size": 264, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 20}
    model = {"class_path": "StandaloneModule", "init_args": {"target": str(target), "draft_config": config}}
    assert main(["fit", "--config", str(recipe(target, features, tmp_path, model=model))]) == 2
    assert "tokens, but the draft supports texts of up to 20" in capsys.readouterr().err


def test_a_draft_with_another_vocabulary_is_refused_by_name(target, tmp_path):
    from tokenizers import Tokenizer

    other = write_target(tmp_path / "other", vocab_size=300)
    with pytest.raises(UserError, match=r"other: vocab_size is 300, but the target .* has 264"):
        StandaloneModule(str(target), draft=str(other))
    same_size = write_target(tmp_path / "same")
    tokenizer = Tokenizer.from_file(str(same_size / "tokenizer.json"))
    tokenizer.add_tokens(["zebra"])
    tokenizer.save(str(same_size / "tokenizer.json"))
    with pytest.raises(UserError, match="token 'zebra' is 259, not None"):
        StandaloneModule(str(target), draft=str(same_size))
    with pytest.raises(UserError, match="leave draft_vocab_size out"):
        StandaloneModule(str(target), draft=str(target), draft_config={"draft_vocab_size": 64})
    with pytest.raises(UserError, match="either draft or init_from"):
        StandaloneModule(str(target), draft=str(target), init_from="target")


def test_init_from_target_refuses_what_does_not_fit(target):
    module = StandaloneModule(str(target), init_from="target", draft_config={"intermediate_size": 32})
    with pytest.raises(UserError, match="cannot start from it"):
        module.draft.start_from_target(module.target)


def test_it_is_captured_trained_resumed_and_evaluated(target, prompts, tmp_path):
    run, features = tmp_path / "run", tmp_path / "features"
    words = ["capture", "--algorithm", "standalone", "--target", target, "--prompts", prompts, "--output", features]
    assert main([str(w) for w in words]) == 0
    words = [
        "fit",
        "--config",
        "standalone-smollm2.yaml",
        "--model.target",
        target,
        "--trainer.accelerator",
        "cpu",
        "--trainer.precision",
        "32-true",
        "--data.features",
        features,
        "--trainer.default_root_dir",
        run,
        "--trainer.val_check_interval",
        4,
        "--model.draft_config",
        '{"num_hidden_layers": 4, "draft_vocab_size": 128}',
    ]
    assert main([str(w) for w in (*words, "--trainer.max_steps", 8)]) == 0
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert main([str(w) for w in (*words, "--trainer.max_steps", 12, "--ckpt_path", checkpoint)]) == 0
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history if "val/tau" in row] == [4, 8, 12]
    words = [
        "evaluate",
        "--draft",
        checkpoint,
        "--prompts",
        prompts,
        "--json",
        tmp_path / "e.json",
        "--cache",
        tmp_path / "cache",
        "--max_new_tokens",
        20,
        "--speed_prompts",
        1,
    ]
    assert main([str(w) for w in words]) == 0
    row = json.loads((tmp_path / "e.json").read_text())["methods"][-1]
    assert row["method"] == "standalone"
    assert row["lossless"] is True
    assert row["tau"] == row["offline_tau"]
