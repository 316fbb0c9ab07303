"""The two matrices of the frozen target that training needs: its token embedding and its output head.

Neither is a parameter: they take no optimizer state, are not saved in checkpoints, and are read again
from the target (whose fingerprint the checkpoint keeps) when a run resumes.

Shape legend: N tokens, M rows, V vocabulary, D draft vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.errors import UserError
from specforge.target_files import TargetFiles

_SCALED_LOGITS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier")


def check_plain_logits(config: Mapping[str, Any], where: str) -> None:
    """Refuse a model whose logits are more than its head times its last state.

    Raises:
        UserError: names the field of the config.
    """
    scaled = [key for key in _SCALED_LOGITS if config.get(key) not in (None, 1, 1.0)]
    if scaled:
        raise UserError(f"{where}: its config sets {scaled[0]}; such logits are not supported")


class TargetRows(NamedTuple):
    """What the whole vocabulary says of M rows: ``log_sum [M]`` fp32, and the likeliest token ``[M]``."""

    log_sum: Tensor
    argmax: Tensor


class TargetHead:
    """Frozen embedding and ``lm_head`` of a target.

    Args:
        embedding: ``[V, H]``.
        lm_head: ``[V, H]``; the same tensor where they are tied.
        dtype: dtype to hold and multiply them in.
    """

    def __init__(self, embedding: Tensor, lm_head: Tensor, dtype: torch.dtype) -> None:
        tied = lm_head.data_ptr() == embedding.data_ptr()
        self.embedding = embedding.to(dtype)
        self.lm_head = self.embedding if tied else lm_head.to(dtype)
        self._sliced: tuple[Tensor, Tensor] | None = None

    @classmethod
    def load(cls, target: TargetFiles, dtype: torch.dtype) -> TargetHead:
        """Read the two matrices of a target.

        Raises:
            UserError: the target scales or caps its logits, which the loss would not see.
        """
        check_plain_logits(target.config, target.name)
        tied = bool(target.config.get("tie_word_embeddings"))
        embedding = target.embedding()
        return cls(embedding, embedding if tied else target.lm_head(), dtype)

    def to(self, device: torch.device) -> TargetHead:
        """Move both matrices, in place."""
        tied = self.lm_head is self.embedding
        self.embedding = self.embedding.to(device)
        self.lm_head = self.embedding if tied else self.lm_head.to(device)
        self._sliced = None
        return self

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings ``[N, H]`` of ``input_ids [N]``."""
        return F.embedding(input_ids, self.embedding)

    def sliced(self, target_ids: Tensor) -> Tensor:
        """Rows of the head for a draft vocabulary: ``[D, H]`` for ``target_ids [D]``; kept until they change."""
        if len(target_ids) == len(self.lm_head):
            return self.lm_head
        if self._sliced is None or self._sliced[0] is not target_ids:
            self._sliced = (target_ids, self.lm_head[target_ids])
        return self._sliced[1]

    @torch.no_grad()
    def rows(self, hidden: Tensor, chunk: int = 32768) -> TargetRows:
        """Log-sum-exp and argmax of the full-vocabulary logits, without holding ``[M, V]``.

        Args:
            hidden: ``[M, H]`` last hidden states.
            chunk: vocabulary entries at a time; ties go to the lowest id.
        """
        hidden = hidden.to(self.lm_head.dtype)
        log_sum = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        best, argmax = log_sum.clone(), log_sum.new_zeros(len(hidden), dtype=torch.int64)
        for start in range(0, len(self.lm_head), chunk):
            logits = F.linear(hidden, self.lm_head[start : start + chunk]).float()
            top, index = logits.max(-1)
            argmax = torch.where(top > best, index + start, argmax)
            best = torch.maximum(best, top)
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(-1))
        return TargetRows(log_sum, argmax)
