"""The Domino draft: the DFlash backbone, and a GRU over the preceding tokens of the block (arXiv 2605.29707).

The backbone drafts all tokens in parallel, with base logits U_d. A GRU reads the tokens of the block one by one; g_d is
its state after the anchor and the d tokens after it. The final logits of draft d are U_d + W2 SiLU(W1 [z_d; g_d]), with
z the backbone's states, from draft ``pure_draft_prefix_len`` on; earlier drafts keep the base logits. With
``shift_label`` slot 0, the anchor, predicts a token, too.

Shape legend: M drafts, n blocks, T drafts of a block, H hidden size, G hidden size of the GRU, r width of the
correction, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config

from specforge.modeling.draft.dflash.network import DFlash
from specforge.modeling.draft.fields import FLAG, SIZE, Fields, by_default, move_fields, only, required, whole
from specforge.modeling.draft.registry import register_draft


class PrefixGRU(nn.Module):
    """A GRU without biases, with the parameter names and layout of ``torch.nn.GRU``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * hidden, width))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * hidden, hidden))
        for weight in (self.weight_ih_l0, self.weight_hh_l0):
            nn.init.uniform_(weight, -(hidden**-0.5), hidden**-0.5)

    def read(self, inputs: Tensor) -> Tensor:
        """The inputs' part ``[..., 3 G]`` of all gates, which does not depend on the state, for ``inputs [..., H]``."""
        return F.linear(inputs, self.weight_ih_l0.to(inputs.dtype))

    def step(self, gates: Tensor, state: Tensor) -> Tensor:
        """Next state ``[n, G]``, from the input's part of the gates ``[n, 3 G]`` (:meth:`read`) and the previous state.

        r, u = σ(..), c = tanh(W x + r ⊙ V h), h' = (1 - u) ⊙ c + u ⊙ h.
        """
        own = F.linear(state, self.weight_hh_l0.to(state.dtype))
        size = self.hidden
        reset, update = (gates[:, : 2 * size] + own[:, : 2 * size]).sigmoid().chunk(2, -1)
        candidate = (gates[:, 2 * size :] + reset * own[:, 2 * size :]).tanh()
        return torch.lerp(candidate, state, update)


_KIND = only("domino")
_NESTED: Fields = {
    "projector_type": _KIND,
    "shift_label": by_default(True, FLAG),
    "pure_draft_prefix_len": by_default(1, whole(0, 4096)),
    "gru_hidden_dim": required(SIZE),
    "emb_dim": required(SIZE),
}


@register_draft("DominoDraftModel", config_class=Qwen3Config)
class Domino(DFlash):
    """Domino.

    Args:
        config: as for :class:`DFlash`, with ``gru_hidden_dim``, ``emb_dim``, ``pure_draft_prefix_len`` (1) and
            ``shift_label`` (true) in ``dflash_config``.

    Attributes:
        prefix: number of drafts at the start of a block that keep their base logits.
    """

    fields: ClassVar[Fields] = {**DFlash.fields, "dflash_config": {**DFlash.nested, **_NESTED}}

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        fields = config.dflash_config
        hidden, rank = fields["gru_hidden_dim"], fields["emb_dim"]
        self.prefix = fields.get("pure_draft_prefix_len", 1)
        if self.prefix >= self.drafts:
            raise ValueError(
                f"pure_draft_prefix_len is {self.prefix}; it must be below the {self.drafts} tokens that a block drafts"
            )
        self.prefix_gru = PrefixGRU(config.hidden_size, hidden)
        self.embed_proj = nn.Sequential(
            nn.Linear(config.hidden_size + hidden, rank, bias=False),
            nn.SiLU(),
            nn.Linear(rank, config.draft_vocab_size, bias=False),
        )

    @classmethod
    def is_described_by(cls, config: Mapping[str, Any]) -> bool:
        """Other projects use the name of DFlash's architecture and set ``projector_type``."""
        nested = config.get("dflash_config")
        return isinstance(nested, Mapping) and _KIND.allows(nested.get("projector_type"))

    @staticmethod
    def translate(config: dict[str, Any]) -> None:
        """As in :class:`DFlash`; other projects also write ``emb_dim`` at the top level.

        Raises:
            ValueError: one of theirs lacks a field whose default is another one there.
        """
        DFlash.translate(config)
        nested = config.get("dflash_config")
        move_fields(config, nested, {"emb_dim": "emb_dim"}, "in dflash_config")
        if Domino.architecture not in config.get("architectures", [Domino.architecture]):
            for name in ("shift_label", "pure_draft_prefix_len"):
                if isinstance(nested, Mapping) and name not in nested:
                    raise ValueError(f"dflash_config.{name} is missing: its default differs between projects")

    @property
    def shift(self) -> int:
        """1 with ``shift_label``."""
        return int(self.config.dflash_config.get("shift_label", True))

    def mix(self, states: Tensor, memory: Tensor) -> Tensor:
        """The input ``[M, r]`` of W2: SiLU(W1 [z; g]) of ``states [M, H]`` and ``memory [M, G]``."""
        matrix = self.embed_proj.get_parameter("0.weight").to(states.dtype)
        return F.silu(F.linear(torch.cat([states, memory.to(states.dtype)], -1), matrix))

    @property
    def matrix(self) -> Tensor:
        """``[D, r]`` W2."""
        return self.embed_proj.get_parameter("2.weight")

    def corrections(self, embeds: Tensor, tokens: Tensor, states: Tensor, block: Tensor, depth: Tensor) -> Tensor:
        """The input of W2 for every draft; 0 for drafts that keep their base logits.

        Args:
            embeds: ``[K, H]`` embeddings of some tokens.
            tokens: ``[n, T]`` index of each token of the blocks among them: the anchor and the tokens after it.
            states: ``[M, H]`` the drafts' states.
            block: ``[M]`` block of each draft.
            depth: ``[M]`` index of the draft in its block.

        Returns:
            ``[M, r]``.
        """
        gates = self.prefix_gru.read(embeds.to(states.dtype))
        memory = [gates.new_zeros(len(tokens), self.prefix_gru.hidden)]
        for column in tokens.unbind(1):
            memory.append(self.prefix_gru.step(gates[column], memory[-1]))
        found = torch.stack(memory[1:])
        if states.is_cuda:  # the host does not know the number of rows, and waiting for it takes longer than a few more
            return self.mix(states, found[depth, block]) * (depth >= self.prefix).unsqueeze(1)
        rows = (depth >= self.prefix).nonzero().flatten()
        mixed = self.mix(states[rows], found[depth[rows], block[rows]])
        return mixed.new_zeros(len(states), mixed.shape[1]).index_copy(0, rows, mixed)


class DominoCorrector:
    """Corrects the logits token by token when decoding.

    Args:
        draft: the network.
        embed: maps token ids ``[n]`` to embeddings ``[n, H]``.
        dtype: compute dtype.
    """

    def __init__(self, draft: Domino, embed: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        self.draft, self.embed, self.dtype = draft, embed, dtype
        self._matrix = draft.matrix.to(dtype)
        self.reset()

    def reset(self) -> None:
        """Start a new block."""
        self._memory = self._matrix.new_zeros(1, self.draft.prefix_gru.hidden)
        self._depth = 0

    def __call__(self, logits: Tensor, state: Tensor, token: int) -> Tensor:
        """The corrected logits ``[D]`` of the draft after ``token``."""
        embeds = self.embed(torch.tensor([token], device=state.device)).to(self.dtype)
        gru = self.draft.prefix_gru
        self._memory = gru.step(gru.read(embeds), self._memory)
        self._depth += 1
        if self._depth <= self.draft.prefix:
            return logits
        return logits + F.linear(self.draft.mix(state.unsqueeze(0), self._memory), self._matrix)[0]
