"""Block drafters written out from their definition: one document, one block, one slot, one head at a time.

The oracle of the fast modules: no packing, no chunking, no fused kernels, no shared code with them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.lightning_modules.eagle3_reference import rms_norm, rotate


class BlockReference:
    """The backbone; ``shift`` is 1 where slot k predicts the token after its own position."""

    def __init__(self, weights: dict[str, Tensor], config, embedding: Tensor, lm_head: Tensor, shift: int = 0) -> None:
        self.w, self.config, self.embedding, self.lm_head, self.shift = (weights, config, embedding, lm_head, shift)
        self.ids = [i + int(weights["d2t"][i]) for i in range(len(weights["d2t"]))]
        self.size = config.block_size
        self.drafts = self.size - 1 + shift

    def heads(self, x: Tensor, layer: int, letter: str) -> list[Tensor]:
        """One vector through a projection, split into normed heads."""
        attn = f"layers.{layer}.self_attn."
        parts = (self.w[f"{attn}{letter}_proj.weight"] @ x).split(self.config.head_dim)
        norm = self.w.get(f"{attn}{letter}_norm.weight")
        return [p if norm is None else rms_norm(p, norm, self.config.rms_norm_eps) for p in parts]

    def states(self, tokens: Tensor, aux: Tensor, anchor: int) -> list[Tensor]:
        """Normed states of the block's slots."""
        c, w, eps = self.config, self.w, self.config.rms_norm_eps
        theta = c.rope_parameters["rope_theta"]
        context = [rms_norm(w["fc.weight"] @ aux[j], w["hidden_norm.weight"], eps) for j in range(anchor)]
        hidden = [self.embedding[int(tokens[anchor])]]
        hidden += [self.embedding[c.dflash_config["mask_token_id"]]] * (self.size - 1)
        group = c.num_attention_heads // c.num_key_value_heads
        for n, kind in enumerate(c.layer_types):
            norm = w[f"layers.{n}.input_layernorm.weight"]
            normed = [rms_norm(x, norm, eps) for x in hidden]
            inputs = self.around(normed, normed, f"layers.{n}.attention_conv.", 0)
            places = list(range(anchor)) + [anchor + k for k in range(self.size)]
            sources = context + inputs
            keys = [[rotate(h, p, theta) for h in self.heads(x, n, "k")] for p, x in zip(places, sources, strict=True)]
            values = [(w[f"layers.{n}.self_attn.v_proj.weight"] @ x).split(c.head_dim) for x in sources]
            attended = []
            for k in range(self.size):
                queries = [rotate(h, anchor + k, theta) for h in self.heads(inputs[k], n, "q")]
                seen = range(len(places))
                if kind == "sliding_attention":
                    last = anchor + (k if getattr(c, "is_causal", None) is None else self.size)
                    seen = [i for i in seen if anchor + k - c.sliding_window < places[i] <= last]
                out = []
                for h, query in enumerate(queries):
                    scores = torch.stack([query @ keys[i][h // group] for i in seen]) / math.sqrt(c.head_dim)
                    out.append(sum(a * values[i][h // group] for a, i in zip(scores.softmax(0), seen, strict=True)))
                attended.append(w[f"layers.{n}.self_attn.o_proj.weight"] @ torch.cat(out))
            attended = self.around(attended, normed, f"layers.{n}.attention_conv.", 1)
            hidden = [x + y for x, y in zip(hidden, attended, strict=True)]
            normed = [rms_norm(x, w[f"layers.{n}.post_attention_layernorm.weight"], eps) for x in hidden]
            read, mlp = self.around(normed, normed, f"layers.{n}.mlp_conv.", 0), f"layers.{n}.mlp."
            out = []
            for y in read:
                gate, up = w[mlp + "gate_proj.weight"] @ y, w[mlp + "up_proj.weight"] @ y
                out.append(w[mlp + "down_proj.weight"] @ (gate * torch.sigmoid(gate) * up))
            out = self.around(out, normed, f"layers.{n}.mlp_conv.", 1)
            hidden = [x + y for x, y in zip(hidden, out, strict=True)]
        return [rms_norm(x, w["norm.weight"], eps) for x in hidden]

    def around(self, xs: list[Tensor], normed: list[Tensor], name: str, side: int) -> list[Tensor]:
        """What is done before (0) and behind (1) a sublayer whose normed inputs are these."""
        return xs

    def logits(self, tokens: Tensor, aux: Tensor, anchor: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each draft its state, the head's logits, and those with the correction."""
        states = self.states(tokens, aux, anchor)[1 - self.shift :]
        base = [self.lm_head[self.ids] @ x for x in states]
        extra = self.corrections(tokens, anchor, states)
        return [(x, b, b + e) for x, b, e in zip(states, base, extra, strict=True)]

    def corrections(self, tokens: Tensor, anchor: int, states: list[Tensor]) -> list[Tensor | float]:
        return [0.0] * len(states)

    def blocks(self, tokens: Tensor, mask: Tensor, aux: Tensor, *, contiguous: bool = False):
        """Every possible anchor with its supervised drafts: ``{depth: (label, state, base logits, logits)}``."""
        for anchor in range(len(tokens) - 1):
            if not (mask[anchor] and mask[anchor + 1]):
                continue
            rows = {}
            for depth, found in enumerate(self.logits(tokens, aux, anchor)):
                label = anchor + 1 + depth
                if label < len(tokens) and mask[label]:
                    rows[depth] = (label, *found)
                elif contiguous:
                    break
            yield rows


def dpace(q: dict[int, Tensor], drafts: int, alpha: float, form: str) -> dict[int, float]:
    """D-PACE's weights of the supervised drafts, given the draft's probability of each label."""
    prefix, total = {}, 1.0
    for k in range(drafts):
        total *= ((1 - alpha) * float(q[k]) + alpha) if k in q else 1.0
        prefix[k] = total
    following = {k: sum(prefix[j] for j in q if j >= k) for k in q}
    return {k: {"dpace": following[k], "prefix": prefix[k], "continuation": following[k] / prefix[k]}[form] for k in q}


def dflash_document(
    reference: BlockReference,
    tokens: Tensor,
    mask: Tensor,
    aux: Tensor,
    last: Tensor,
    *,
    weights: str = "decay",
    decay: float = 4.0,
    alpha: float = 0.5,
    label: str = "data",
) -> tuple[Tensor, int, list[int]]:
    """Sum of the loss, number of supervised drafts, and hits by depth, of one document."""
    total, count, hits = aux.new_zeros(()), 0, [0] * reference.drafts
    for rows in reference.blocks(tokens, mask, aux):
        right, q = {}, {}
        for depth, (at, _, _, logits) in rows.items():
            token = int(tokens[at]) if label == "data" else int((reference.lm_head @ last[at - 1]).argmax())
            right[depth] = token
            known = token in reference.ids
            q[depth] = logits.softmax(0)[reference.ids.index(token)].detach() if known else 0.0
        factors = dpace(q, reference.drafts, alpha, weights) if weights != "decay" else {}
        for depth, (_, _, _, logits) in rows.items():
            count += 1
            if right[depth] not in reference.ids:
                continue
            weight = factors[depth] if factors else math.exp(-depth / decay)
            index = reference.ids.index(right[depth])
            total = total - weight * logits.log_softmax(0)[index]
            hits[depth] += int(logits.argmax()) == index
    return total, count, hits
