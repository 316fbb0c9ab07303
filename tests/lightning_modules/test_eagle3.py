"""Losses and gradients of the EAGLE-3 module against the definition written out in eagle3_reference.py."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.eagle3 import Eagle3Module
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, TrainBatch, mask_spans
from specforge.errors import UserError
from specforge.inference.target_head import TargetHead
from specforge.modeling.layers.attention import ttt_attention
from specforge.modeling.layers.packed_attention import Segment
from tests.lightning_modules.eagle3_reference import LatentReference, Reference
from tests.tiny import write_target

V, H, STEPS = 48, 16, 4
LATENT = {
    "architectures": ["Eagle3DeepseekV2ForCausalLM"],
    "q_lora_rank": 10,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 6,
    "v_head_dim": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


def make_module(
    target: Path, seed: int = 0, draft_vocab: int = 20, config: dict | None = None, **options
) -> Eagle3Module:
    torch.manual_seed(seed)
    fields = {
        "draft_vocab_size": draft_vocab,
        "head_dim": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }
    module = Eagle3Module(str(target), draft_config={**fields, **(config or {})}, steps=STEPS, **options)
    module.draft.double()
    for parameter in module.draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    if draft_vocab < V:
        module.draft.set_vocabulary(torch.randperm(V)[:draft_vocab].sort().values)
    return module


def make_head(seed: int = 1) -> TargetHead:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(V, H, generator=generator, dtype=torch.float64)  # noqa: E731
    return TargetHead(draw(), draw(), torch.float64)


def make_documents(lengths: tuple[int, ...], seed: int = 2, share: float = 0.6) -> list[TrainBatch]:
    """One batch a document, with masks of several runs; a share of 1 supervises everything."""
    g = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        mask = torch.rand(length, generator=g) < share
        features = {
            AUX_HIDDEN_STATES: torch.randn(length, 3 * H, generator=g, dtype=torch.float64),
            LAST_HIDDEN_STATES: torch.randn(length, H, generator=g, dtype=torch.float64),
        }
        ids = torch.randint(0, V, (length,), generator=g)
        documents.append(TrainBatch(ids, mask, features, (length,), mask_spans(mask, (length,))))
    return documents


def pack(documents: list[TrainBatch], padding: int = 0) -> TrainBatch:
    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat([*parts, parts[0].new_zeros(padding, *parts[0].shape[1:])])

    lengths = tuple(d.num_tokens for d in documents)
    mask = join([d.loss_mask for d in documents])
    names = documents[0].features
    features = {name: join([d.features[name] for d in documents]) for name in names}
    return TrainBatch(join([d.input_ids for d in documents]), mask, features, lengths, mask_spans(mask, lengths))


def run(module: Eagle3Module, head: TargetHead, batches: list[TrainBatch]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Summed loss, gradients and hits of some batches."""
    module.zero_grad()
    outputs = [module.training_loss(batch, head) for batch in batches]
    total = sum((o.loss for o in outputs), torch.zeros((), dtype=torch.float64))
    total.backward()
    gradients = {name: p.grad.clone() for name, p in module.draft.named_parameters() if p.grad is not None}
    return total.detach(), gradients, sum(o.hits for o in outputs)


def same(a: tuple, b: tuple, tolerance: float = 1e-6) -> None:
    """Equal up to the fp32 reductions of the loss."""
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=0, check_dtype=False)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        scale = b[1][name].norm().clamp(min=1e-9)
        assert (a[1][name] - b[1][name]).norm() / scale < tolerance, name
    assert a[2].tolist() == b[2].tolist()


@pytest.mark.parametrize(
    ("options", "draft_vocab", "config", "share"),
    [
        ({"loss": "kl", "label": "target"}, 20, {}, 0.6),
        ({"loss": "kl", "label": "data"}, 20, {}, 0.6),
        ({"loss": "kl"}, V, {}, 1.0),
        ({"loss": "ce"}, 20, {}, 1.0),
        ({"loss": "ce", "label": "data", "chunk": 1}, 20, {}, 0.3),
        ({"loss": "lk_alpha", "chunk": 3}, 20, {}, 0.6),
        ({"loss": "lk_lambda"}, 20, {}, 0.6),
        ({"loss": "reverse_kl"}, 20, {}, 0.6),
        ({"loss": "js", "chunk": 2}, 20, {}, 0.6),
        ({"loss": "tv"}, 20, {}, 0.6),
        ({"loss": "topk", "topk": 3, "chunk": 2}, 20, {}, 0.6),
        ({"loss": "topk"}, 5, {}, 1.0),
        ({"loss": "topk", "topk": 4, "feature_weight": 0.7}, 20, {}, 0.6),
        ({"loss": "kl"}, 20, {"fc_norm": True, "norm_output": True}, 0.6),
        ({"loss": "kl"}, 20, {"norm_before_fc": True}, 0.6),
        ({"loss": "kl"}, 20, {"norm_before_residual": True, "norm_output": True}, 0.6),
        ({"loss": "kl"}, 20, {"attention_bias": True, "partial_rotary_factor": 0.5}, 0.6),
        ({"loss": "kl"}, 20, {"qk_norm": True, "norm_before_residual": True}, 0.6),
        ({"loss": "kl"}, 20, LATENT, 0.6),
        ({"loss": "ce"}, 20, {**LATENT, "v_head_dim": 11, "fc_norm": True, "norm_output": True}, 1.0),
    ],
)
def test_loss_gradients_and_hits_are_those_of_the_definition(small_target, options, draft_vocab, config, share):
    module, head = make_module(small_target, draft_vocab=draft_vocab, config=config, **options), make_head()
    documents = make_documents((9, 12, 3, 7, 1, 2), share=share)
    documents[1].loss_mask[:5] = False
    documents[1].spans = mask_spans(documents[1].loss_mask, (12,))
    weights = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in module.draft.state_dict().items()
    }
    oracle = LatentReference if "q_lora_rank" in config else Reference
    reference = oracle(weights, module.draft.config, head.embedding, head.lm_head)
    loss, count, hits = torch.zeros((), dtype=torch.float64), 0, torch.zeros(STEPS)
    for d in documents:
        part, rows, right = reference.document(
            d.input_ids,
            d.loss_mask,
            d.features[AUX_HIDDEN_STATES],
            d.features[LAST_HIDDEN_STATES],
            steps=STEPS,
            decay=0.8,
            loss=options["loss"],
            label=options.get("label", "target"),
            topk=options.get("topk", 10),
            feature_weight=options.get("feature_weight", 0.0),
        )
        loss, count, hits = loss + part, count + rows, hits + torch.tensor(right)
    loss.backward()
    slow = (loss.detach(), {n: weights[n].grad for n, _ in module.draft.named_parameters()}, hits.long())
    batch = pack(documents)
    same(run(module, head, [batch]), slow)
    assert module.training_loss(batch, head).num_supervised == count


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("config", [{}, LATENT], ids=["llama", "latent"])
def test_packed_is_one_by_one(small_target, share, config):
    module, head = make_module(small_target, config=config), make_head()
    documents = make_documents((8, 3, 11, 5), share=share)
    same(run(module, head, [pack(documents)]), run(module, head, documents))


def test_padding_chunks_and_order_change_nothing(small_target):
    head = make_head()
    documents = make_documents((8, 3, 11, 5))
    expected = run(make_module(small_target), head, [pack(documents)])
    same(run(make_module(small_target), head, [pack(documents, padding=13)]), expected)
    same(run(make_module(small_target), head, [pack(documents[::-1])]), expected)
    for chunk in (1, 4, 100):
        same(run(make_module(small_target, chunk=chunk), head, [pack(documents)]), expected)


def test_nothing_leaks_across_documents(small_target):
    module, head = make_module(small_target), make_head()
    first, second = make_documents((8, 9))
    alone = run(module, head, [second])
    for name, values in first.features.items():
        first.features[name] = values * 100
    first.input_ids = first.input_ids.flip(0)
    both, other = run(module, head, [pack([first, second])]), run(module, head, [first])
    torch.testing.assert_close(both[0] - other[0], alone[0], rtol=1e-6, atol=1e-6, check_dtype=False)


def test_a_document_too_short_to_draft_for_gives_nothing(small_target):
    module, head = make_module(small_target), make_head()
    output = module.training_loss(pack(make_documents((2, 1), share=1.0)), head)
    assert output.num_supervised == 0
    assert float(output.loss) == 0.0


def test_bf16_gradients_are_close_to_fp32(small_target):
    head = make_head()
    module = make_module(small_target)
    documents = make_documents((30, 40))
    _, exact, _ = run(module, head, [pack(documents)])
    module.draft.float()
    batch = pack(documents)
    batch.features = {name: x.float() for name, x in batch.features.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_loss(batch, TargetHead(head.embedding, head.lm_head, torch.bfloat16)).loss
    module.zero_grad()
    loss.backward()
    for name, parameter in module.draft.named_parameters():
        error = (parameter.grad.double() - exact[name]).norm() / exact[name].norm()
        assert error < 0.1, (name, float(error))
        assert parameter.dtype == torch.float32  # masters stay fp32


def test_validation_chains_are_the_draft_greedy_choices(small_target):
    """``chains[span][i, k]`` says whether the k-th token drafted from start i is the token of the text."""
    module, head = make_module(small_target), make_head()
    (document,) = make_documents((12,), share=1.0)
    chains = module.validation_chains(document, head, 3).chains
    reference = Reference(
        {n: x.detach() for n, x in module.draft.state_dict().items()}, module.draft.config, head.embedding, head.lm_head
    )
    states = reference.states(document.input_ids, document.features[AUX_HIDDEN_STATES], 3)
    right = torch.zeros(12, 3, dtype=torch.bool)  # by first drafted token
    for step in range(3):
        for p in range(12 - 2 - step):
            choice = int((module.draft.lm_head.weight @ states[step][p]).argmax())
            right[p + 2, step] = reference.target_ids[choice] == int(document.input_ids[p + 2 + step])
    found = torch.as_tensor(chains[0])
    rows = right[12 - len(found) :]
    assert found.tolist() == rows.tolist()


def test_start_from_target_copies_its_last_layer_and_head(small_target):
    module = make_module(small_target, init_from="target")
    module.draft.start_from_target(module.target)
    files, draft = module.target, module.draft
    last = files.num_layers - 1
    assert torch.equal(draft.lm_head.weight, files.lm_head()[draft.target_ids].double())
    assert torch.equal(
        draft.midlayer.self_attn.k_proj.weight[:, H:], files.layer_tensor(last, "self_attn.k_proj.weight").double()
    )
    assert torch.equal(draft.midlayer.mlp.down_proj.weight, files.layer_tensor(last, "mlp.down_proj.weight").double())


def test_latent_attention_is_that_of_transformers(small_target):
    """The layer's attention at step 0, YaRN included, is DeepSeek's own on a doubled input."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    rope = {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    }
    module = make_module(small_target, config={**LATENT, "rope_parameters": rope, "max_position_embeddings": 64})
    ours, config = module.draft.midlayer.self_attn, copy.deepcopy(module.draft.config)
    config.hidden_size, config._attn_implementation = 2 * H, "eager"
    theirs = DeepseekV3Attention(config, 0).double()
    theirs.o_proj = torch.nn.Linear(4 * 3, H, bias=False)
    theirs.load_state_dict({n: x.double() for n, x in ours.state_dict().items()})
    theirs.double()
    x, length = torch.randn(11, 2 * H, dtype=torch.float64), 11
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    positions = torch.arange(length)
    angles = DeepseekV3RotaryEmbedding(config)(x[None].float(), positions[None])
    expected = theirs(x[None], tuple(a.double() for a in angles), mask)[0][0]
    weights = module.draft.midlayer.weights(torch.float64)
    product = x @ torch.cat([weights.embed, weights.hidden], 1).t()
    angles = tuple(a.double() for a in module.draft.rotary(length, x.device))
    query = ours.queries(product[:, : ours.query_width], angles, weights.more)
    key, value = ours.keys_values(product[:, ours.query_width :], angles, weights.more)
    found = ttt_attention(query, key, value, (Segment(0, 0, length, 0),), [])
    torch.testing.assert_close(
        ours.o_proj(found.flatten(1)), expected, rtol=1e-4, atol=1e-6
    )  # theirs has an fp32 softmax


@pytest.mark.parametrize(("size", "steps"), [(3, 0), (3, 2), (8, 2)])
def test_values_may_be_narrower_than_keys(size, steps):
    """Output and gradients of the fused attention against one softmax over an explicit mask."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)  # noqa: E731
    rows, heads, kv_heads, width = 9, 4, 2, 8
    query, key, value = draw(rows, heads, width), draw(rows, kv_heads, width), draw(rows, kv_heads, size)
    own = [(draw(rows, kv_heads, width), draw(rows, kv_heads, size)) for _ in range(steps)]
    segments = (Segment(0, 0, 5, 0), Segment(5, 5, 9, 5))
    weight = torch.randn(rows, heads, size, generator=g, dtype=torch.float64)
    tensors = [query, key, value, *(x for pair in own for x in pair)]
    found = ttt_attention(query, key, value, segments, own)
    grads = torch.autograd.grad((found * weight).sum(), tensors)

    document = torch.tensor([0] * 5 + [1] * 4)
    seen = (document[:, None] == document) & torch.ones(rows, rows).tril().bool()
    seen = torch.cat([seen, *[torch.eye(rows).bool()] * steps], 1)
    keys = torch.cat([key, *(k for k, _ in own)]).repeat_interleave(2, 1)
    values = torch.cat([value, *(v for _, v in own)]).repeat_interleave(2, 1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) / width**0.5
    expected = torch.einsum("hqk,khv->qhv", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    torch.testing.assert_close(found, expected)
    for a, b in zip(grads, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_lora_rank": None}, "q_lora_rank is missing"),
        ({"v_head_dim": 12}, "v_head_dim is 12, larger than the size of a key head, 11"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"vocab_size": 5}, "vocab_size is 5"),
    ],
)
def test_bad_latent_configs_are_refused(small_target, changes, message):
    with pytest.raises(UserError, match=message):
        Eagle3Module(str(small_target), {**LATENT, **changes})


def test_a_target_without_latent_attention_cannot_be_started_from(small_target):
    module = make_module(small_target, config=LATENT)
    with pytest.raises(UserError, match="q_a_proj"):
        module.draft.start_from_target(module.target)
