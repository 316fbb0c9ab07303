"""Offline rounds of a draft that drafts its likeliest tokens are the decoded ones, sampled answers included."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.eagle3 import Eagle3Module
from specforge.decoding.decoder import decode
from specforge.decoding.verify import Sampling
from specforge.eval.cache import Reference
from specforge.eval.offline import draft_rounds
from specforge.inference.target_engine import HFTargetEngine
from specforge.inference.target_files import TargetFiles


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_deterministic_drafts_are_replayed_exactly(target, temperature):
    engine = HFTargetEngine(TargetFiles.find(str(target)), "float32")
    torch.manual_seed(0)
    module = Eagle3Module(str(target), init_from="target", draft_config={"draft_vocab_size": 264}).eval()
    module.draft.start_from_target(module.target)
    head = module.target_head(torch.device("cpu"))

    def make():
        drafter = module.drafter(head, torch.float32)
        drafter.deterministic = True
        return drafter

    prompts = [torch.arange(5, 9 + n).tolist() for n in range(4)]
    sampling = Sampling(temperature)
    decoded = decode(engine.model, make, prompts, gamma=3, max_new_tokens=40, end_ids=(), sampling=sampling)
    assert sum(sum(d.accepted) for d in decoded) > 2
    answers = [[*p, *d.tokens] for p, d in zip(prompts, decoded, strict=True)]
    for prompt, d, features in zip(prompts, decoded, engine.capture(answers, module.spec.capture), strict=True):
        reference = Reference(prompt, d.tokens, features)
        assert draft_rounds(module, head, reference, 3, sampling, deterministic=True) == (d.counted, d.rounds)
