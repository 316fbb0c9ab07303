"""Medusa and Hydra written out from their definitions: one document, one head, one row at a time.

The oracle of the fast modules: no packing, no plan, no chunking, no shared code with them.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HeadsReference:
    def __init__(self, weights: dict[str, Tensor], sequential: bool, embedding: Tensor, lm_head: Tensor) -> None:
        self.w, self.sequential, self.embedding, self.lm_head = weights, sequential, embedding, lm_head
        self.target_ids = [i + int(weights["d2t"][i]) for i in range(len(weights["d2t"]))]

    def logits(self, tokens: Tensor, hidden: Tensor, p: int, k: int) -> Tensor:
        """Head k at token p, which predicts token p + 2 + k; it may know the tokens up to p + 1 + k."""
        x, read = hidden, [hidden]
        if self.sequential:
            read += [self.embedding[tokens[p + 1 + i]] for i in range(k + 1)]
        for j in range(9):
            name = f"heads.{k}.blocks.{j}.weight"
            if name not in self.w:
                break
            y = self.w[name] @ (torch.cat(read) if j == 0 else x)
            x = x + y * torch.sigmoid(y)
        return self.w[f"heads.{k}.lm_head.weight"] @ x

    def document(
        self, tokens: Tensor, mask: Tensor, last: Tensor, *, heads: int, decay: float, loss: str, label: str
    ) -> tuple[Tensor, int, list[float], list[int], list[int]]:
        """Of one document: sum of the loss, supervised tokens, and of each head losses, hits and rows."""
        total = torch.zeros((), dtype=last.dtype)
        losses, hits, rows = [0.0] * heads, [0] * heads, [0] * heads
        for k in range(heads):
            for p in range(len(tokens) - 2 - k):
                if not mask[p + 2 + k]:
                    continue
                rows[k] += 1
                target = torch.softmax(self.lm_head @ last[p + 1 + k], 0)
                right = int(target.argmax()) if label == "target" else int(tokens[p + 2 + k])
                if right not in self.target_ids:
                    continue
                logits = self.logits(tokens, last[p], p, k)
                q = torch.softmax(logits, 0)
                hits[k] += self.target_ids[int(logits.argmax())] == right
                on_draft = target[torch.tensor(self.target_ids)]
                teacher = on_draft / on_draft.sum()
                row = {
                    "ce": -q[self.target_ids.index(right)].log(),
                    "kl": (teacher * (teacher.log() - q.log())).sum(),
                    "tv": 1 - torch.minimum(on_draft, q).sum(),
                }[loss]
                losses[k] += float(row.detach())
                total = total + decay**k * row
        return total, int(mask[2:].sum()), losses, hits, rows
