"""MTP written out from its definition: one document, one step, one row, one head at a time.

The oracle of the fast module: no packing, no plan, no fused kernels, no shared code with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.lightning_modules.eagle3_reference import rms_norm, rotate, rotate_pairs


def swiglu(y: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ ((gate @ y) * torch.sigmoid(gate @ y) * (up @ y))


class MTPReference:
    def __init__(self, weights: dict[str, Tensor], config, embedding: Tensor, lm_head: Tensor) -> None:
        self.w, self.config, self.embedding, self.lm_head = weights, config, embedding, lm_head
        self.target_ids = [i + int(weights["d2t"][i]) for i in range(len(weights["d2t"]))]

    def project(self, letter: str, x: Tensor, position: int) -> list[Tensor]:
        """Heads of the query, key or value of one row."""
        name = f"layer.self_attn.{letter}_proj."
        y = self.w[name + "weight"] @ x
        if name + "bias" in self.w:
            y = y + self.w[name + "bias"]
        heads = list(y.split(self.config.head_dim))
        if letter == "v":
            return heads
        norm = self.w.get(f"layer.self_attn.{letter}_norm.weight")
        if norm is not None:
            heads = [rms_norm(h, norm, self.config.rms_norm_eps) for h in heads]
        return [rotate(h, position, self.config.rope_parameters["rope_theta"]) for h in heads]

    def heads(self, x: Tensor, position: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Queries, keys and values of one row."""
        return (self.project("q", x, position), self.project("k", x, position), self.project("v", x, position))

    def mlp(self, y: Tensor) -> Tensor:
        """The MLP of one row."""
        names = ("gate_proj", "up_proj", "down_proj")
        return swiglu(y, *(self.w[f"layer.mlp.{n}.weight"] for n in names))

    def states(self, tokens: Tensor, last: Tensor, steps: int) -> list[dict[int, Tensor]]:
        """Normed state of every row at every step."""
        c, w, eps = self.config, self.w, self.config.rms_norm_eps
        hidden = {p: last[p] for p in range(len(tokens))}
        seen: dict[tuple[int, int], list[list[Tensor]]] = {}
        out: list[dict[int, Tensor]] = []
        group = c.num_attention_heads // c.num_key_value_heads
        for step in range(steps):
            inputs, queries = {}, {}
            for p in range(len(tokens) - 1 - step):
                embed = rms_norm(self.embedding[tokens[p + 1 + step]], w["embed_norm.weight"], eps)
                if getattr(c, "mask_first", False) and p + step == 0:
                    embed = torch.zeros_like(embed)
                inputs[p] = w["proj.weight"] @ torch.cat([embed, rms_norm(hidden[p], w["hidden_norm.weight"], eps)])
                x = rms_norm(inputs[p], w["layer.input_layernorm.weight"], eps)
                queries[p], *seen[step, p] = self.heads(x, p + step)
            out.append({})
            for p, x in inputs.items():
                rows = [seen[0, j] for j in range(p + 1)] + [seen[s, p] for s in range(1, step + 1)]
                heads = []
                for h in range(c.num_attention_heads):
                    scores = torch.stack([queries[p][h] @ key[h // group] for key, _ in rows])
                    probs = torch.softmax(scores / math.sqrt(len(queries[p][h])), 0)
                    heads.append(sum(a * value[h // group] for a, (_, value) in zip(probs, rows, strict=True)))
                x = x + w["layer.self_attn.o_proj.weight"] @ torch.cat(heads)
                y = rms_norm(x, w["layer.post_attention_layernorm.weight"], eps)
                x = x + self.mlp(y)
                out[step][p] = rms_norm(x, w["norm.weight"], eps)
                hidden[p] = out[step][p] if c.norm_output else x
        return out

    def document(
        self, tokens: Tensor, mask: Tensor, last: Tensor, *, steps: int, beta: float, loss: str, label: str
    ) -> tuple[Tensor, int, list[int], list[int]]:
        """Of one document: sum of the loss, supervised tokens, and of each step hits and rows."""
        states, total = self.states(tokens, last, steps), torch.zeros((), dtype=last.dtype)
        hits, rows = [0] * steps, [0] * steps
        ids = torch.tensor(self.target_ids)
        for step in range(steps):
            for p in range(len(tokens) - 2 - step):
                if not mask[p + 2 + step]:
                    continue
                rows[step] += 1
                target = torch.softmax(self.lm_head @ last[p + 1 + step], 0)
                right = int(target.argmax()) if label == "target" else int(tokens[p + 2 + step])
                if right not in self.target_ids:
                    continue
                logits = self.lm_head[ids] @ states[step][p]
                q = torch.softmax(logits, 0)
                hits[step] += self.target_ids[int(logits.argmax())] == right
                teacher = target[ids] / target[ids].sum()
                row = {
                    "ce": -q[self.target_ids.index(right)].log(),
                    "kl": (teacher * (teacher.log() - q.log())).sum(),
                    "lk_alpha": -torch.minimum(target[ids], q).sum().log(),
                }[loss]
                total = total + beta**step / sum(beta**j for j in range(steps)) * row
        return total, int(mask[2:].sum()), hits, rows


class LatentMTPReference(MTPReference):
    """With multi-head latent attention as arXiv 2405.04434, equations 37 to 47, has it."""

    def heads(self, x: Tensor, position: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        c, eps, theta = self.config, self.config.rms_norm_eps, self.config.rope_parameters["rope_theta"]
        w = {n.removeprefix("layer.self_attn."): t for n, t in self.w.items()}
        nope, rank = c.qk_nope_head_dim, c.kv_lora_rank
        latent_q = rms_norm(w["q_a_proj.weight"] @ x, w["q_a_layernorm.weight"], eps)
        compressed = w["kv_a_proj_with_mqa.weight"] @ x
        latent = rms_norm(compressed[:rank], w["kv_a_layernorm.weight"], eps)
        shared = rotate_pairs(compressed[rank:], position, theta)
        queries, keys, values = [], [], []
        for h in (w["q_b_proj.weight"] @ latent_q).chunk(c.num_attention_heads):
            queries.append(torch.cat([h[:nope], rotate_pairs(h[nope:], position, theta)]))
        for h in (w["kv_b_proj.weight"] @ latent).chunk(c.num_attention_heads):
            keys.append(torch.cat([h[:nope], shared]))
            values.append(h[nope:])
        return queries, keys, values

    def mlp(self, y: Tensor) -> Tensor:
        """A dense MLP, or the experts of arXiv 2412.19437, equations 12 to 16, in groups."""
        c, w = self.config, {n.removeprefix("layer.mlp."): t for n, t in self.w.items()}
        if not c.moe:
            return super().mlp(y)
        scores = [torch.sigmoid(row @ y) for row in w["gate.weight"]]
        choice = [s.item() + b.item() for s, b in zip(scores, w["gate.e_score_correction_bias"], strict=True)]
        size = c.n_routed_experts // c.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
        groups.sort(key=lambda g: sum(sorted(choice[i] for i in g)[-2:]), reverse=True)
        allowed = [i for g in groups[: c.topk_group] for i in g]
        chosen = sorted(allowed, key=lambda i: choice[i], reverse=True)[: c.num_experts_per_tok]
        total = sum(scores[i] for i in chosen) if c.norm_topk_prob else 1.0
        out = swiglu(y, *(w[f"shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down")))
        for i in chosen:
            gate, up = w["experts.gate_up_proj"][i].chunk(2)
            weight = c.routed_scaling_factor * scores[i] / total
            out = out + weight * swiglu(y, gate, up, w["experts.down_proj"][i])
        return out
