"""Drafts with independent or sequential heads on the target's last hidden state: Medusa and Hydra.

Position k (from 0) predicts token p+2+k from the last hidden state h of token p. Medusa (arXiv 2401.10774) applies
``x = h + SiLU(W h)`` once or more, then a linear head per position. Hydra (arXiv 2402.05109) also reads the embeddings
of the tokens p+1 .. p+1+k in the first block, ``x = h + SiLU(W [h; e; ...; e])``. With every W at zero and the target's
own rows in the linear heads, every position starts as the target's next-token head.

Shape legend: R rows, T positions, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from specforge.errors import UserError
from specforge.inference.target_files import TargetFiles
from specforge.modeling.draft.fields import (
    ANYTHING,
    DEPTH,
    NO_MATRICES,
    SIZE,
    VOCABULARY,
    Fields,
    by_default,
    only,
    quoted,
    required,
)
from specforge.modeling.draft.registry import Draft, register_draft
from specforge.modeling.draft.starting import copy_into
from specforge.modeling.layers.decoder_layer import compute_dtype

_Head = tuple[list[Tensor], Tensor]


class DraftHead(nn.Module):
    """Residual blocks and a linear head; the first block also reads the embeddings of ``tokens`` tokens."""

    def __init__(self, hidden: int, vocabulary: int, blocks: int, tokens: int) -> None:
        super().__init__()
        widths = [hidden * (1 + tokens), *[hidden] * (blocks - 1)]
        self.blocks = nn.ModuleList(nn.Linear(width, hidden, bias=False) for width in widths)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)

    def weights(self, dtype: torch.dtype) -> _Head:
        """The blocks' matrices and the linear head's in ``dtype``."""
        return [matrix.to(dtype) for matrix in self.matrices], self.lm_head.weight.to(dtype)

    @property
    def matrices(self) -> list[Tensor]:
        """The blocks' matrices."""
        return [cast(nn.Linear, block).weight for block in self.blocks]


def _apply_blocks(blocks: Sequence[Tensor], hidden: Tensor, embeds: Sequence[Tensor]) -> Tensor:
    """State ``[R, H]`` of one head, from ``hidden [R, H]`` and the embeddings that it reads, each ``[R, H]``."""
    hidden = hidden + F.silu(F.linear(torch.cat([hidden, *embeds], -1), blocks[0]))
    for block in blocks[1:]:
        hidden = hidden + F.silu(F.linear(hidden, block))
    return hidden


VLLM_NAMES = {"num_heads": "num_draft_heads", "num_hidden_layers": "num_head_blocks"}


class HeadsDraft(Draft):
    """Base of drafts with K heads.

    Args:
        config: ``hidden_size``, ``vocab_size``, ``num_draft_heads`` (K), ``num_head_blocks`` (default 1) and
            ``draft_vocab_size``.
    """

    fields: ClassVar[Fields] = {
        **VOCABULARY,
        **NO_MATRICES,
        "target_hidden_size": SIZE,
        "num_draft_heads": required(DEPTH),
        "num_head_blocks": by_default(1, DEPTH),
        "attn_implementation": ANYTHING,
    }
    sequential: bool  # whether head k also reads the k+1 tokens between the hidden state's token and its own

    @staticmethod
    def translate(config: dict[str, Any]) -> None:
        """Rename vLLM's fields for the number of heads and blocks."""
        for theirs, mine in VLLM_NAMES.items():
            value = config.pop(theirs, None)
            if value is not None and config.setdefault(mine, value) != value:
                raise ValueError(f"{theirs} is {quoted(value)}, but {mine} is {quoted(config[mine])}")

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        count, blocks = config.num_draft_heads, getattr(config, "num_head_blocks", 1)
        self.heads = nn.ModuleList(
            DraftHead(config.hidden_size, config.draft_vocab_size, blocks, (k + 1) * self.sequential)
            for k in range(count)
        )

    def checkpoint_activations(self, what: Literal["none", "mlp", "layer"]) -> None:
        """As in :class:`Draft`.

        Raises:
            UserError: layers are to be computed again, but the draft has none.
        """
        if what == "layer":
            raise UserError("model.checkpoint_activations is layer, but a draft of heads has no layers; leave it out")

    @property
    def each(self) -> list[DraftHead]:
        """The heads, in order."""
        return cast(list[DraftHead], list(self.heads))

    @torch.no_grad()
    def start_from_target(self, target: TargetFiles) -> None:
        """Set every block to zero and copy the target's rows into every linear head: Medusa's own initialisation.

        Raises:
            UserError: the target's head has another width.
        """
        rows = target.lm_head()[self.target_ids.cpu()]
        for head in self.each:
            copy_into(head.lm_head.weight, rows, f"{target.name}: its lm_head")
            for matrix in head.matrices:
                matrix.zero_()

    def forward(self, hidden: Tensor, embeds: Sequence[Tensor]) -> Tensor:
        """States of the first T heads.

        Args:
            hidden: ``[R, H]`` the target's last hidden states.
            embeds: T tensors ``[R, H]``: embeddings of the first, second, ... token after each row's.

        Returns:
            ``[T, R, H]``; the k-th state is the input of the linear head of ``heads[k]``.
        """
        dtype = compute_dtype(self.each[0].lm_head.weight)
        hidden, embeds = hidden.to(dtype), [x.to(dtype) for x in embeds]
        states = []
        for k, head in enumerate(self.each[: len(embeds)]):
            blocks = [matrix.to(dtype) for matrix in head.matrices]
            states.append(_apply_blocks(blocks, hidden, embeds[: k + 1] if self.sequential else ()))
        return torch.stack(states)

    def decoder(self, dtype: torch.dtype) -> HeadsDecoder:
        """A snapshot of the draft for decoding in ``dtype``."""
        return HeadsDecoder(self, dtype)


@register_draft("MedusaDraft", config_class=PretrainedConfig)
class MedusaDraft(HeadsDraft):
    """Heads that read only the hidden state (arXiv 2401.10774)."""

    fields: ClassVar[Fields] = {**HeadsDraft.fields, "medusa_fc_bias": only(False)}
    sequential = False

    @classmethod
    def is_described_by(cls, config: Mapping[str, Any]) -> bool:
        """VLLM uses another name for the architecture."""
        return "MedusaModel" in config.get("architectures", ())


@register_draft("HydraDraft", config_class=PretrainedConfig)
class HydraDraft(HeadsDraft):
    """Heads that also read the tokens drafted before theirs (arXiv 2402.05109)."""

    sequential = True


class HeadsDecoder:
    """Logits of one row at a time."""

    def __init__(self, draft: HeadsDraft, dtype: torch.dtype) -> None:
        self.dtype, self.sequential = dtype, draft.sequential
        self._heads: list[_Head] = [head.weights(dtype) for head in draft.each]

    @property
    def positions(self) -> int:
        """K, the maximum number of tokens drafted per round."""
        return len(self._heads)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, embeds: Sequence[Tensor]) -> Tensor:
        """Logits of the next position.

        Args:
            hidden: ``[1, H]`` the target's last hidden state of the last token that it processed.
            embeds: embeddings ``[1, H]`` of the last committed token and of the tokens drafted since.

        Returns:
            ``[D]``.
        """
        blocks, lm_head = self._heads[len(embeds) - 1]
        read = [x.to(self.dtype) for x in embeds] if self.sequential else ()
        return F.linear(_apply_blocks(blocks, hidden.to(self.dtype), read), lm_head)[0]
