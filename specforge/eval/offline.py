"""Offline τ: the rounds of a drafter, replayed over answers of the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specforge.decoding.drafters import Drafter
from specforge.decoding.verify import Sampling
from specforge.eval.cache import Reference
from specforge.eval.tau import Rounds, chains, expected_rounds, jump
from specforge.inference.target_head import TargetHead


@torch.inference_mode()
def draft_rounds(
    module: Any, head: TargetHead, reference: Reference, gamma: int, sampling: Sampling, deterministic: bool = False
) -> Rounds:
    """Rounds that a trained draft needs for one answer, by teacher forcing.

    Args:
        module: a draft module with ``draft_logits``.
        head: the target's head.
        reference: the answer and its features.
        gamma: tokens drafted per round.
        sampling: the sampler that wrote the answer. Rounds are replayed if it is greedy, and expected if it samples.
        deterministic: draft the most likely token even if the target samples. It is accepted if and only if the answer
            contains it, so the rounds are replayed as well.
    """
    replay = sampling.greedy or deterministic
    batch = reference.batch().to(head.embedding.device)
    ids = module.draft.draft_ids(batch.input_ids)
    labels: list[int] = []
    rows: list[Tensor] = []
    for tile in module.draft_logits(batch, head, gamma):
        labels += tile.labels.tolist()
        if replay:
            rows.append((tile.logits.argmax(-1) == ids[tile.labels].unsqueeze(1)).double().cpu())
            continue
        q = sampling.probs(tile.logits.flatten(0, 1)).unflatten(0, tile.logits.shape[:2])
        known = ids[tile.labels].clamp(min=0).view(-1, 1, 1).expand(-1, gamma, 1)
        drafted = q.gather(-1, known).squeeze(-1) * (ids[tile.labels] >= 0).unsqueeze(1)
        p = sampling.probs(head.logits(tile.target_hidden))
        emitted = p.gather(-1, batch.input_ids[tile.labels].unsqueeze(1)).double()
        rows.append((drafted.double() / emitted.clamp(min=1e-30)).clamp(max=1).cpu())
    accept = torch.cat(rows).numpy() if rows else np.zeros((0, gamma))
    tables = chains(accept, labels, batch.spans)
    parts = [jump(table > 0.5)[0] if replay else expected_rounds(table) for table in tables]
    return Rounds(sum(p.tokens for p in parts), sum(p.rounds for p in parts))


def text_rounds(make: Callable[[], Drafter], reference: Reference, gamma: int) -> Rounds:
    """Rounds that a text-only drafter needs for one answer; exact, because its drafts depend on nothing else."""
    return Rounds(len(reference.answer) - 1, len(replay(make(), reference, gamma)))


def replay(drafter: Drafter, reference: Reference, gamma: int) -> list[int]:
    """Draft along an existing answer, as greedy decoding would have.

    Args:
        drafter: follows the answer; it has seen no tokens yet.
        reference: the answer, with the features that the drafter reads.
        gamma: tokens drafted per round.

    Returns:
        Number of the answer's tokens that each round commits; their sum is the length of the answer - 1.
    """
    answer, prompt = reference.answer, len(reference.prompt)
    drafter.observe([*reference.prompt, answer[0]], {n: x[:prompt] for n, x in reference.features.items()})
    position, steps = 1, []
    while position < len(answer):
        proposal = drafter.propose(min(gamma, len(answer) - position), Sampling())
        accepted = 0
        for token in proposal.tokens:
            if token != answer[position + accepted]:
                break
            accepted += 1
        step = min(accepted + 1, len(answer) - position)
        rows = slice(prompt + position - 1, prompt + position - 1 + step)
        drafter.observe(answer[position : position + step], {n: x[rows] for n, x in reference.features.items()})
        position += step
        steps.append(step)
    return steps
