"""The DSpark draft: the DFlash backbone, a Markov head and a confidence head (arXiv 2607.05147).

Slot 0, the anchor, predicts a token, too, so a block of b slots drafts b tokens. The logits of draft d are U_d + B_d. U
is the target's head on the backbone's states. B is low-rank and depends on the preceding token (``vanilla``), on it
and the state (``gated``), or on all preceding tokens of the block (``rnn``). The confidence estimates the probability
that the draft is accepted.

Shape legend: M drafts, n blocks, T drafts of a block, H hidden size, r Markov rank, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config

from specforge.modeling.draft.dflash.network import DFlash
from specforge.modeling.draft.fields import FLAG, SIZE, Fields, by_default, move_fields, only
from specforge.modeling.draft.registry import register_draft

KINDS = ("vanilla", "gated", "rnn")
_PROJECTOR = "dspark"  # other projects' projector_type


class MarkovHead(nn.Module):
    """Low-rank correction of the logits given the preceding tokens.

    Args:
        vocab_size: V, of the preceding tokens.
        draft_vocab_size: D.
        hidden_size: H.
        rank: r.
        kind: ``vanilla``, ``gated`` or ``rnn``.
    """

    def __init__(self, vocab_size: int, draft_vocab_size: int, hidden_size: int, rank: int, kind: str) -> None:
        super().__init__()
        self.kind, self.rank = kind, rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden_size + rank, rank)
        elif kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``[M, r]`` of the first matrix for ``tokens [M]``."""
        return F.embedding(tokens, self.markov_w1.weight).to(dtype)

    def forward(self, before: Tensor, states: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The input of ``markov_w2``.

        Args:
            before: ``[M, r]`` embedding of the token before each draft.
            states: ``[M, H]`` the drafts' states.
            memory: ``[M, r]`` state of ``rnn`` after the preceding drafts; None at the first.

        Returns:
            ``[M, r]``, and the memory after these drafts (``rnn`` only).
        """
        if self.kind == "vanilla":
            return before, None
        if self.kind == "gated":
            gate = _linear(self.gate_proj, torch.cat([states, before], -1))
            return gate.sigmoid() * before, None
        memory = torch.zeros_like(before) if memory is None else memory
        gate, candidate, out = _linear(self.joint_proj, torch.cat([memory, before, states], -1)).chunk(3, -1)
        gate = gate.sigmoid()
        return out.tanh(), gate * memory + (1 - gate) * candidate.tanh()


class ConfidenceHead(nn.Module):
    """Estimates, as a logit, the probability that a draft is accepted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[M]`` of ``x [M, width]``."""
        return _linear(self.proj, x).squeeze(-1)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


# Names of the heads' fields inside dflash_config, where other projects write them.
_ELSEWHERE = {
    "markov_rank": "markov_rank",
    "markov_head_type": "markov_head_type",
    "enable_confidence_head": "enable_confidence_head",
    "use_confidence_head": "enable_confidence_head",
    "confidence_head_with_markov": "confidence_head_with_markov",
    "shift_label": "sample_from_anchor",
}


@register_draft("Qwen3DSparkModel", Qwen3Config, other_names=("DSparkDraftModel",))
class DSpark(DFlash):
    """DSpark.

    Args:
        config: as for :class:`DFlash`, with ``markov_rank``, ``markov_head_type`` (``vanilla``, ``gated``, ``rnn``),
            ``enable_confidence_head`` and ``confidence_head_with_markov``.
    """

    fields: ClassVar[Fields] = {
        **DFlash.fields,
        "markov_rank": by_default(256, SIZE),
        "sample_from_anchor": only(True),
        "markov_head_type": by_default("vanilla", only(*KINDS)),
        "enable_confidence_head": by_default(True, FLAG),
        "confidence_head_with_markov": by_default(True, FLAG),
    }

    @classmethod
    def is_described_by(cls, config: Mapping[str, Any]) -> bool:
        """Other projects use the name of DFlash's architecture and set ``projector_type``."""
        nested = config.get("dflash_config")
        named = isinstance(nested, Mapping) and nested.get("projector_type") == _PROJECTOR
        return named or super().is_described_by(config)

    @staticmethod
    def translate(config: dict[str, Any]) -> None:
        """As in :class:`DFlash`, and move the heads' fields to the top level."""
        DFlash.translate(config)
        nested = config.get("dflash_config")
        move_fields(nested, config, _ELSEWHERE, "at the top level")
        if isinstance(nested, dict):
            nested.pop("projector_type", None)
            nested.pop("confidence_head_alpha", None)  # a weight of the loss

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        rank, kind = getattr(config, "markov_rank", 256), getattr(config, "markov_head_type", "vanilla")
        self.markov_head = MarkovHead(config.vocab_size, config.draft_vocab_size, config.hidden_size, rank, kind)
        self.with_markov = bool(getattr(config, "confidence_head_with_markov", True))
        width = config.hidden_size + (rank if self.with_markov else 0)
        self.confidence_head = ConfidenceHead(width) if getattr(config, "enable_confidence_head", True) else None

    @property
    def shift(self) -> int:
        """1: the anchor's slot predicts, too."""
        return 1

    def corrections(self, before: Tensor, states: Tensor, block: Tensor, depth: Tensor) -> Tensor:
        """The input of the Markov head's second matrix for every draft.

        Args:
            before: ``[M, r]`` embedding of the token before each draft.
            states: ``[M, H]`` their states.
            block: ``[M]`` block of each draft, ascending.
            depth: ``[M]`` index of the draft in its block; 0, 1, ... without gaps.

        Returns:
            ``[M, r]``.
        """
        if self.markov_head.kind != "rnn":
            return self.markov_head(before, states)[0]
        found, at = [], []
        memory = states.new_zeros(int(block[-1]) + 1, self.markov_head.rank)
        for step in range(int(depth.max()) + 1):
            rows = (depth == step).nonzero().flatten()
            own = block[rows]
            out, new = self.markov_head(before[rows], states[rows], memory[own])
            memory = memory.index_copy(0, own, new)
            found.append(out)
            at.append(rows)
        return torch.cat(found)[torch.cat(at).argsort()]

    def confidence(self, before: Tensor, states: Tensor) -> Tensor | None:
        """Logits ``[M]`` of the drafts' acceptance; None without a confidence head."""
        if self.confidence_head is None:
            return None
        return self.confidence_head(torch.cat([states, before], -1) if self.with_markov else states)


class MarkovCorrector:
    """Corrects the logits token by token when decoding."""

    def __init__(self, draft: DSpark, dtype: torch.dtype) -> None:
        self.head, self.dtype = draft.markov_head, dtype
        self._matrix = draft.markov_head.markov_w2.weight.to(dtype)
        self.reset()

    def reset(self) -> None:
        """Start a new block."""
        self._memory: Tensor | None = None

    def __call__(self, logits: Tensor, state: Tensor, token: int) -> Tensor:
        """The corrected logits ``[D]`` of the draft after ``token``."""
        before = self.head.embed(torch.tensor([token], device=state.device), self.dtype)
        out, self._memory = self.head(before, state.unsqueeze(0), self._memory)
        return logits + F.linear(out, self._matrix)[0]
