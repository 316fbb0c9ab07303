"""Whatever the documents, the padding and the micro-batches: the loss and its gradient are those of one by one."""

from __future__ import annotations

import random
from itertools import accumulate
from pathlib import Path

import pytest
import torch

import lightning_modules
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, TrainBatch, mask_spans
from specforge.inference.target_head import TargetHead
from tests.lightning_modules.test_eagle3 import run, same
from tests.tiny import write_target

V, H = 48, 16
LAYERS = {"layer_ids": [1, 3, 4]}
BLOCKS = {"num_hidden_layers": 1, "block_size": 5, "draft_vocab_size": 20}
LATENT = {
    "architectures": ["Eagle3DeepseekV2ForCausalLM"],
    "q_lora_rank": 10,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 6,
    "v_head_dim": 3,
    "num_key_value_heads": 4,
}
# A name: the algorithm, fields of its draft config, and options.
FORMS: dict[str, tuple[str, dict, dict]] = {
    "eagle3": ("eagle3", {}, LAYERS),
    "eagle3.1": ("eagle3", {"fc_norm": True, "norm_output": True}, LAYERS),
    "latent": ("eagle3", LATENT, LAYERS),
    "hass": ("eagle3", {}, {**LAYERS, "loss": {"kl": 1.0, "topk": 1.0}, "feature_weight": 0.5}),
    "peagle": ("peagle", {"num_hidden_layers": 2}, LAYERS),
    "mtp": ("mtp", {}, {}),
    "medusa": ("medusa", {}, {}),
    "hydra": ("hydra", {}, {}),
    "dflash": ("dflash", BLOCKS, LAYERS),
    "dpace": ("dflash", BLOCKS, {**LAYERS, "weights": "dpace"}),
    "few anchors": ("dflash", BLOCKS, {**LAYERS, "anchors": 3}),
    "dspark": ("dspark", {**BLOCKS, "markov_rank": 8}, LAYERS),
    "dflash2": ("dflash2", {**BLOCKS, "dflash_config": {"selector_rank": 8}}, LAYERS),
    "domino": ("domino", {**BLOCKS, "dflash_config": {"gru_hidden_dim": 16, "emb_dim": 8}}, LAYERS),
    "standalone": ("standalone", {"num_hidden_layers": 1}, {}),
}


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("small") / "target", hidden=H, vocab_size=V, heads=4)


def make_module(form: str, target: Path):
    algorithm, config, options = FORMS[form]
    torch.manual_seed(0)
    module = lightning_modules.algorithms()[algorithm](
        str(target), draft_config={"draft_vocab_size": 20, **config}, gamma=3, **options
    )
    module.draft.double()
    for parameter in module.draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.draft.set_vocabulary(torch.randperm(V)[:20].sort().values)
    return module


def draw_mask(rng: random.Random, length: int) -> list[bool]:
    """All tokens, none, the first, the last, or some runs."""
    kind, everything = rng.choice(["all", "none", "first", "last", "some", "some"]), range(length)
    if kind == "some":
        return [rng.random() < 0.6 for _ in everything]
    learnt = {"all": everything, "none": (), "first": (0,), "last": (length - 1,)}[kind]
    return [token in learnt for token in everything]


def draw_documents(rng: random.Random) -> list[TrainBatch]:
    """Documents of one token and more."""
    documents = []
    for number in range(rng.randrange(1, 9)):
        length = rng.choice([1, 2, 3, 4, 5, 9, 30])
        documents.append(document(rng, draw_mask(rng, length), number))
    return documents


def document(rng: random.Random, learnt: list[bool], number: int) -> TrainBatch:
    """A document of random tokens and features."""
    mask, seed = torch.tensor(learnt), torch.Generator().manual_seed(rng.randrange(1 << 30))
    length = len(mask)
    features = {
        name: torch.randn(length, width, generator=seed, dtype=torch.float64)
        for name, width in ((AUX_HIDDEN_STATES, 3 * H), (LAST_HIDDEN_STATES, H))
    }
    ids, spans = torch.randint(0, V, (length,), generator=seed), mask_spans(mask, (length,))
    return TrainBatch(ids, mask, features, (length,), spans, (f"sample-{number}",))


def pack(documents: list[TrainBatch], padding: int) -> TrainBatch:
    empty = TrainBatch(
        torch.zeros(padding, dtype=torch.int64),
        torch.zeros(padding, dtype=torch.bool),
        {AUX_HIDDEN_STATES: torch.zeros(padding, 3 * H).double(), LAST_HIDDEN_STATES: torch.zeros(padding, H).double()},
        (),
        (),
    )
    parts = [*documents, empty]
    lengths = tuple(d.num_tokens for d in documents)
    mask = torch.cat([d.loss_mask for d in parts])
    return TrainBatch(
        torch.cat([d.input_ids for d in parts]),
        mask,
        {name: torch.cat([d.features[name] for d in parts]) for name in empty.features},
        lengths,
        mask_spans(mask, lengths),
        tuple(name for d in documents for name in d.sample_ids),
    )


def cut(documents: list[TrainBatch], rng: random.Random) -> list[TrainBatch]:
    """The documents in another order, in micro-batches, some of them empty, each with some padding."""
    documents = rng.sample(documents, len(documents))
    sizes = [rng.randrange(0, 4) for _ in documents]
    ends = [*(min(end, len(documents)) for end in accumulate(sizes)), len(documents)]
    return [
        pack(documents[start:end], rng.choice([0, 1, 17, 100]))
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_are_those_of_one_by_one(form, small_target):
    rng, module = random.Random(form), make_module(form, small_target)
    head = TargetHead(*(torch.randn(V, H, dtype=torch.float64) for _ in range(2)), torch.float64)
    for _ in range(6):
        documents = draw_documents(rng)
        alone = run(module, head, documents)
        same(run(module, head, cut(documents, rng)), alone, tolerance=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_only_padding_has_no_loss_and_a_zero_gradient(form, small_target):
    module = make_module(form, small_target)
    head = TargetHead(*(torch.randn(V, H, dtype=torch.float64) for _ in range(2)), torch.float64)
    for size in (0, 1, 64):
        loss, gradients, hits = run(module, head, [pack([], size)])
        assert float(loss) == 0.0
        assert not any(hits.tolist())
        assert set(gradients) == {name for name, p in module.draft.named_parameters() if p.requires_grad}
        assert not any(bool(gradient.any()) for gradient in gradients.values())
