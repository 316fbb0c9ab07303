"""EAGLE-3 written out from its definition: one document, one step, one row, one head at a time, in the dtype given.

The oracle of the fast module: no packing, no chunking, no fused kernels, no shared code with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def norm_heads(heads: Sequence[Tensor], weight: Tensor | None, eps: float) -> list[Tensor]:
    """Every head normed, if there is a norm (Qwen3)."""
    return [h if weight is None else rms_norm(h, weight, eps) for h in heads]


def rotate(x: Tensor, position: int, theta: float, share: float = 1.0) -> Tensor:
    """Rotate a share of one head ``[d]``: of d dimensions, i pairs with i + d/2."""
    if share < 1:
        size = int(len(x) * share)
        return torch.cat([rotate(x[:size], position, theta), x[size:]])
    half = len(x) // 2
    out = []
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out.append(x[i] * math.cos(angle) - x[i + half] * math.sin(angle))
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out.append(x[i + half] * math.cos(angle) + x[i] * math.sin(angle))
    return torch.stack(out)


class Reference:
    def __init__(self, weights: dict[str, Tensor], config, embedding: Tensor, lm_head: Tensor) -> None:
        self.w, self.config, self.embedding, self.lm_head = weights, config, embedding, lm_head
        self.target_ids = [i + int(weights["d2t"][i]) for i in range(len(weights["d2t"]))]

    def project(self, x: Tensor, position: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Queries, keys and values of one row, by head."""
        c, attn = self.config, "midlayer.self_attn."
        theta, share = c.rope_parameters["rope_theta"], c.rope_parameters.get("partial_rotary_factor", 1.0)
        q, k, v = (
            (self.w[f"{attn}{n}_proj.weight"] @ x + self.w.get(f"{attn}{n}_proj.bias", 0)).split(c.head_dim)
            for n in "qkv"
        )
        norms = (self.w.get(f"{attn}{n}_norm.weight") for n in "qk")
        q, k = (norm_heads(heads, norm, c.rms_norm_eps) for heads, norm in zip((q, k), norms, strict=True))
        return ([rotate(h, position, theta, share) for h in q], [rotate(h, position, theta, share) for h in k], list(v))

    def scale(self) -> float:
        """What scores are multiplied by."""
        return 1 / math.sqrt(self.config.head_dim)

    def states(self, tokens: Tensor, aux: Tensor, steps: int) -> list[list[Tensor | None]]:
        """Normed state of every row at every step; None where the row's next token would be past the end."""
        c, w = self.config, self.w
        length, eps = len(tokens), c.rms_norm_eps
        hidden = []
        for p in range(length):
            x = aux[p]
            if "input_norm.weight" in w:
                x = rms_norm(x, w["input_norm.weight"], eps)
            if "fc_norm.0.weight" in w:
                parts = x.chunk(len(c.eagle_config["eagle_aux_hidden_state_layer_ids"]))
                x = torch.cat([rms_norm(part, w[f"fc_norm.{i}.weight"], eps) for i, part in enumerate(parts)])
            hidden.append(w["fc.weight"] @ x)
        keys: list[list] = []
        values: list[list] = []
        out: list[list[Tensor | None]] = []
        for step in range(steps):
            keys.append([None] * length)
            values.append([None] * length)
            normed: list[Tensor | None] = [None] * length
            queries: list = [None] * length
            for p in range(length - 1 - step):
                embed = rms_norm(self.embedding[tokens[p + 1 + step]], w["midlayer.input_layernorm.weight"], eps)
                state = rms_norm(hidden[p], w["midlayer.hidden_norm.weight"], eps)
                heads = self.project(torch.cat([embed, state]), p + step)
                queries[p], keys[step][p], values[step][p] = heads
            for p in range(length - 1 - step):
                seen = [(0, j) for j in range(p + 1)] + [(s, p) for s in range(1, step + 1)]
                heads = []
                for h in range(c.num_attention_heads):
                    group = c.num_attention_heads // len(keys[0][0])
                    scores = torch.stack([queries[p][h] @ keys[s][j][h // group] for s, j in seen])
                    probs = torch.softmax(scores * self.scale(), 0)
                    heads.append(sum(a * values[s][j][h // group] for a, (s, j) in zip(probs, seen, strict=True)))
                x = hidden[p]
                if getattr(c, "norm_before_residual", False):
                    x = rms_norm(x, w["midlayer.hidden_norm.weight"], eps)
                x = x + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(heads)
                x = x + w.get("midlayer.self_attn.o_proj.bias", 0)
                y = rms_norm(x, w["midlayer.post_attention_layernorm.weight"], eps)
                gate, up = w["midlayer.mlp.gate_proj.weight"] @ y, w["midlayer.mlp.up_proj.weight"] @ y
                x = x + w["midlayer.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
                normed[p] = rms_norm(x, w["norm.weight"], eps)
                hidden[p] = normed[p] if getattr(c, "norm_output", False) else x
            out.append(normed)
        return out

    def document(
        self,
        tokens: Tensor,
        mask: Tensor,
        aux: Tensor,
        last: Tensor,
        *,
        steps: int,
        decay: float,
        loss: str,
        label: str,
        eta: float = 3.0,
        topk: int = 10,
        feature_weight: float = 0.0,
    ) -> tuple[Tensor, int, list[int]]:
        """Sum of the loss, number of supervised tokens, and hits of each step, of one document."""
        states = self.states(tokens, aux, steps)
        total = torch.zeros((), dtype=aux.dtype)
        hits = [0] * steps
        ids = torch.tensor(self.target_ids)
        for step in range(steps):
            for p in range(len(tokens) - 2 - step):
                if not mask[p + 2 + step]:
                    continue
                target = torch.softmax(self.lm_head @ last[p + 1 + step], 0)
                right = int(target.argmax()) if label == "target" else int(tokens[p + 2 + step])
                logits = self.w["lm_head.weight"] @ states[step][p]
                if right not in self.target_ids:
                    continue
                hits[step] += int(self.target_ids[int(logits.argmax())] == right)
                q = torch.softmax(logits, 0)
                on_draft = target[ids]
                renormalised = on_draft / on_draft.sum()
                kl = sum(a * (a.log() - b.log()) for a, b in zip(renormalised, q, strict=True))
                accept = sum(torch.minimum(a, b) for a, b in zip(on_draft, q, strict=True))
                row = {
                    "kl": lambda kl=kl: kl,
                    "reverse_kl": lambda q=q, r=renormalised: sum(
                        b * (b.log() - a.log()) for a, b in zip(r, q, strict=True)
                    ),
                    "js": lambda q=q, r=renormalised: sum(
                        (a * (2 * a / (a + b)).log() + b * (2 * b / (a + b)).log()) / 2
                        for a, b in zip(r, q, strict=True)
                    ),
                    "tv": lambda q=q, target=target: (
                        sum(
                            abs(target[v] - (q[self.target_ids.index(v)] if v in self.target_ids else 0))
                            for v in range(len(target))
                        )
                        / 2
                    ),
                    "ce": lambda q=q, right=right: -q[self.target_ids.index(right)].log(),
                    "topk": lambda q=q, r=renormalised: (
                        -sum(r[i] * q[i].log() for i in sorted(range(len(r)), key=lambda i: -float(r[i]))[:topk])
                    ),
                    "lk_alpha": lambda accept=accept: -accept.log(),
                    "lk_lambda": lambda kl=kl, accept=accept: (
                        torch.exp(-eta * accept.detach()) * kl + (1 - torch.exp(-eta * accept.detach())) * (1 - accept)
                    ),
                }[loss]()
                apart = 0.0
                for a, b in zip(states[step][p], last[p + 1 + step], strict=True):
                    apart = apart + ((a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5) / len(last[p])
                total = total + decay**step * (row + feature_weight * apart)
        count = int(mask[2:].sum())
        return total, count, hits


def rotate_pairs(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate one head ``[d]``: dimension 2i pairs with 2i + 1."""
    out = []
    for i in range(len(x) // 2):
        angle = position * theta ** (-2 * i / len(x))
        out.append(x[2 * i] * math.cos(angle) - x[2 * i + 1] * math.sin(angle))
        out.append(x[2 * i + 1] * math.cos(angle) + x[2 * i] * math.sin(angle))
    return torch.stack(out)


class LatentReference(Reference):
    """Multi-head latent attention as arXiv 2405.04434, equations 37 to 47, has it."""

    def project(self, x: Tensor, position: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        c, eps = self.config, self.config.rms_norm_eps
        w = {n.removeprefix("midlayer.self_attn."): x for n, x in self.w.items() if ".self_attn." in n}
        theta, nope = c.rope_parameters["rope_theta"], c.qk_nope_head_dim
        latent_q = rms_norm(w["q_a_proj.weight"] @ x, w["q_a_layernorm.weight"], eps)
        compressed = w["kv_a_proj_with_mqa.weight"] @ x
        latent = rms_norm(compressed[: c.kv_lora_rank], w["kv_a_layernorm.weight"], eps)
        shared = rotate_pairs(compressed[c.kv_lora_rank :], position, theta)
        queries, keys, values = [], [], []
        for h in (w["q_b_proj.weight"] @ latent_q).chunk(c.num_attention_heads):
            queries.append(torch.cat([h[:nope], rotate_pairs(h[nope:], position, theta)]))
        for h in (w["kv_b_proj.weight"] @ latent).chunk(c.num_attention_heads):
            keys.append(torch.cat([h[:nope], shared]))
            values.append(h[nope:])
        return queries, keys, values

    def scale(self) -> float:
        return 1 / math.sqrt(self.config.qk_nope_head_dim + self.config.qk_rope_head_dim)
