"""The two matrices of the frozen target that training needs: its token embedding and its output head.

Neither is a parameter: they have no optimizer state, are not saved in checkpoints, and are read from the target again
when a run resumes. The checkpoint stores the target's fingerprint.

Shape legend: N tokens, M rows, V vocabulary, D draft vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.fusion import fused
from specforge.inference.target_files import TargetFiles


@dataclass(frozen=True)
class OutputHead:
    """Logits from states, ``cap tanh((states @ weightᵀ + bias) / cap)``; most targets have only the matrix.

    ``F.linear(states, head)`` accepts it in place of a matrix, so that no product can omit bias or cap. Every other
    function of torch rejects it.
    """

    weight: Tensor  # [D, H] or [V, H]; it includes a target's factor of the logits
    bias: Tensor | None = None  # [D] or [V]
    softcap: float | None = None  # c of c tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2)

    def logits(self, states: Tensor) -> Tensor:
        """The target's logits ``[..., D]`` of its last hidden states ``[..., H]``; in fp32 or wider if capped."""
        scores = self.scores(states)
        if self.softcap is None:
            return scores
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return torch.tanh(wide / self.softcap) * self.softcap

    def scores(self, states: Tensor) -> Tensor:
        """The logits before the cap, which does not change their order. Drafts use these for their own states."""
        return F.linear(states, self.weight, self.bias)

    def to(self, place: torch.dtype | torch.device) -> OutputHead:
        """The head in another dtype or on another device."""
        return OutputHead(self.weight.to(place), None if self.bias is None else self.bias.to(place), self.softcap)

    def __getitem__(self, rows: Any) -> OutputHead:
        """The head for some tokens: ids ``[D]``, or a slice."""
        return OutputHead(self.weight[rows], None if self.bias is None else self.bias[rows], self.softcap)

    def __len__(self) -> int:
        return len(self.weight)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is F.linear and len(args) == 2 and not kwargs and isinstance(args[1], cls):
            return args[1].logits(args[0])
        return NotImplemented


def distance(logits: Tensor, others: Tensor) -> float:
    """Largest difference of log-probabilities between two models' logits ``[..., V]``; inf if any is not finite."""
    apart = (logits.double().log_softmax(-1) - others.double().log_softmax(-1)).abs().max()
    return float(apart.nan_to_num(nan=torch.inf, posinf=torch.inf))


class TargetRows(NamedTuple):
    """Log-sum-exp ``[M]`` (fp32) and argmax ``[M]`` of M rows' logits over the whole vocabulary."""

    log_sum: Tensor
    argmax: Tensor


class TargetHead:
    """Frozen embedding and output head of a target.

    Args:
        embedding: ``[V, H]``.
        lm_head: the head, or only its matrix ``[V, H]``; the same tensor as the embedding if they are tied.
        dtype: dtype of storage and products.
    """

    def __init__(self, embedding: Tensor, lm_head: Tensor | OutputHead, dtype: torch.dtype) -> None:
        head = lm_head if isinstance(lm_head, OutputHead) else OutputHead(lm_head)
        self._tied = head.weight.data_ptr() == embedding.data_ptr()
        self.embedding, self.head = embedding, head
        self._place(dtype)

    @classmethod
    def load(cls, target: TargetFiles, dtype: torch.dtype) -> TargetHead:
        """Read embedding and head of a target.

        Raises:
            UserError: the target lacks one of them, or the embedding's width differs from the states'.
        """
        embedding = target.embedding()
        matrix = target.lm_head() if target.has_own_head() else embedding
        return cls(embedding, OutputHead(matrix, target.lm_head_bias(), target.softcap), dtype)

    @property
    def lm_head(self) -> Tensor | OutputHead:
        """The weight with which ``F.linear`` gives the target's logits: the matrix ``[V, H]`` if that is enough."""
        plain = self.head.bias is None and self.head.softcap is None
        return self.head.weight if plain else self.head

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrices."""
        return self.embedding.dtype

    def to(self, device: torch.device) -> TargetHead:
        """Move both, in place."""
        self._place(device)
        return self

    def _place(self, place: torch.dtype | torch.device) -> None:
        self.embedding = self.embedding.to(place)
        head = OutputHead(self.embedding, self.head.bias, self.head.softcap) if self._tied else self.head
        self.head = head.to(place)
        self._sliced: tuple[Tensor, OutputHead] | None = None

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings ``[N, H]`` of ``input_ids [N]``."""
        return F.embedding(input_ids, self.embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """The target's logits ``[M, V]`` of its last hidden states ``[M, H]``."""
        return self.head.logits(hidden.to(self.dtype))

    def sliced(self, target_ids: Tensor) -> OutputHead:
        """The head of a draft vocabulary ``target_ids [D]``; kept as long as the same tensor is given."""
        if len(target_ids) == len(self.head):
            return self.head
        if self._sliced is None or self._sliced[0] is not target_ids:
            self._sliced = (target_ids, self.head[target_ids])
        return self._sliced[1]

    @torch.no_grad()
    def rows(self, hidden: Tensor, chunk: int = 32768) -> TargetRows:
        """Log-sum-exp and argmax of the full-vocabulary logits, without storing ``[M, V]``.

        Args:
            hidden: ``[M, H]`` last hidden states.
            chunk: vocabulary entries per product; ties go to the lowest id.
        """
        hidden = hidden.to(self.dtype)
        log_sum = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        best, argmax = log_sum.clone(), log_sum.new_zeros(len(hidden), dtype=torch.int64)
        for start in range(0, len(self.head), chunk):
            top, index, part = _best(self.head[start : start + chunk].logits(hidden))
            argmax = torch.where(top > best, index + start, argmax)
            best = torch.maximum(best, top)
            log_sum = torch.logaddexp(log_sum, part)
        return TargetRows(log_sum, argmax)


@fused(logits=(0,))
def _best(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, its index, and log-sum-exp of each row, ``[M]`` in fp32."""
    wide = logits.float()
    return *wide.max(-1), wide.logsumexp(-1)
