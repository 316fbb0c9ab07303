"""Sequences that grow by several tokens, some of which are taken back: the same logits in company and alone."""

from __future__ import annotations

import pytest
import torch

from specforge.contracts import AUX_HIDDEN_STATES, CapturePolicy
from specforge.decoding.decoder import decode
from specforge.decoding.drafters import NGramDrafter
from specforge.decoding.runners import CachedRunner, LockstepRunner, WholeTextRunner, make_runner, runs_in_lockstep
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles
from tests.families import write_family

POLICY = CapturePolicy((1, 4), last_hidden_states=True)
# Windows and chunks of 16 tokens; sinks, caps and experts; ordinary attention; learnt positions.
IN_LOCKSTEP = (
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "llama4_text",
    "cohere2",
    "exaone4",
    "gpt2",
    "opt",
    "phi",
)
# Positions that others' lengths change, or that are counted by places; states that cannot be taken back.
ALONE = ("phi3", "llama, dynamic", "bloom", "lfm2", "qwen3_next", "recurrent_gemma")


def model_of(name: str, folder) -> object:
    return HFTargetEngine(TargetFiles.find(str(write_family(name, folder / "t"))), "float32").model


def rounds(seed: int = 0, rows: int = 3, count: int = 16):
    """Tokens that are appended to each row, and how many of them stay."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=g))  # noqa: E731
    for number in range(count):
        tokens = [[draw(0, 256) for _ in range(draw(3, 20) if number == 0 else draw(1, 9))] for _ in range(rows)]
        yield tokens, [len(row) if number == 0 else draw(1, len(row) + 1) for row in tokens]


def whole_text(model, text: list[int], new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and third layer's features of the last tokens of a text, in one pass without a cache."""
    output = model(torch.tensor([text]), use_cache=False, output_hidden_states=True)
    return output.logits[0, -new:], output.hidden_states[2][0, -new:]


@pytest.mark.parametrize("name", IN_LOCKSTEP)
@torch.inference_mode()
def test_in_lockstep_a_sequence_is_what_it_is_alone(name, tmp_path):
    """Past every window and chunk, with what was taken back in the cache, and rows that leave."""
    model = model_of(name, tmp_path)
    assert runs_in_lockstep(model)
    runner, texts, rows = make_runner(model, POLICY, 3), [[], [], []], [0, 1, 2]
    assert isinstance(runner, LockstepRunner)
    for number, (tokens, stay) in enumerate(rounds()):
        if number == 8:
            runner.select([0, 2])
            rows = [0, 2]
        for row, (logits, features) in zip(rows, runner.forward([tokens[r] for r in rows]), strict=True):
            expected, states = whole_text(model, texts[row] + tokens[row], len(tokens[row]))
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(features[AUX_HIDDEN_STATES][:, :32], states, rtol=1e-3, atol=1e-3)
            texts[row] += tokens[row][: stay[row]]
        runner.keep([stay[r] for r in rows])
    assert max(map(len, texts)) > 32


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom", "lfm2", "qwen3_next", "recurrent_gemma"])
@torch.inference_mode()
def test_alone_a_sequence_is_what_it_is_in_one_pass(name, tmp_path):
    model = model_of(name, tmp_path)
    runner, text = make_runner(model, POLICY, 1), []
    assert isinstance(runner, WholeTextRunner if name in ("lfm2", "qwen3_next", "recurrent_gemma") else CachedRunner)
    for tokens, stay in rounds(rows=1):
        ((logits, features),) = runner.forward(tokens)
        expected, states = whole_text(model, text + tokens[0], len(tokens[0]))
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(features[AUX_HIDDEN_STATES][:, :32], states, rtol=1e-3, atol=1e-3)
        text += tokens[0][: stay[0]]
        runner.keep(stay)


@pytest.mark.parametrize("name", ALONE)
def test_targets_that_company_would_change_are_decoded_one_by_one(name, tmp_path):
    model = model_of(name, tmp_path)
    assert not runs_in_lockstep(model)
    prompts = [list(range(40, 50)), list(range(60, 90)), [7, 8, 9]]
    options = {"gamma": 3, "max_new_tokens": 12, "end_ids": [256]}
    together = decode(model, NGramDrafter, prompts, **options)
    for i, (prompt, found) in enumerate(zip(prompts, together, strict=True)):
        (alone,) = decode(model, NGramDrafter, [prompt], seed=i, **options)
        assert (found.tokens, found.rounds) == (alone.tokens, alone.rounds)


def test_masks_are_transformers_own_again_after_a_pass(tmp_path):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as makers

    before = dict(makers)
    model = model_of("mistral", tmp_path)
    decode(model, NGramDrafter, [[1, 2, 3], [4, 5]], gamma=2, max_new_tokens=4, end_ids=[])
    assert dict(makers) == before
