"""What the engine captures is what transformers computes, one sample at a time."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from specforge.cli import main
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CapturePolicy
from specforge.errors import UserError
from specforge.inference.target_engine import HFTargetEngine
from specforge.target_files import TargetFiles

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


def test_regenerate_goes_on_where_it_was_cut_and_keeps_the_order(target, conversations, tmp_path):
    def run(output) -> int:
        words = ["regenerate", "--data", conversations, "--target", target, "--output", output, "--max_new_tokens", 8,
                 "--batch_size", 4, "--dtype", "float32"]  # fmt: skip
        return main([str(word) for word in words])

    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run(whole) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == [f"c{i}" for i in range(40)]
    cut.write_bytes(b"".join(lines[3:17]) + lines[20][:25])
    assert run(cut) == 0
    assert cut.read_bytes() == whole.read_bytes()
