"""P-EAGLE written out from its definition: one document, one layer, one element, one head at a time.

Elements are pairs (anchor, depth); which of the deep ones there are is given. Every element looks at every other
and asks whether it may see it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.lightning_modules.eagle3_reference import norm_heads, rms_norm, rotate


def may_see(query: tuple[int, int], key: tuple[int, int]) -> bool:
    (a, d), (b, e) = query, key
    return (e == 0 and b <= a) or (a == b and e <= d)


class Reference:
    def __init__(self, weights: dict[str, Tensor], config, embedding: Tensor, lm_head: Tensor) -> None:
        self.w, self.config, self.embedding, self.lm_head = weights, config, embedding, lm_head
        self.target_ids = [i + int(weights["d2t"][i]) for i in range(len(weights["d2t"]))]
        self.embedding = weights.get("embed_tokens.weight", embedding)

    def states(self, tokens: Tensor, aux: Tensor, deep: list[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
        """Normed state of every element; depth 0 has one a token, the last of which reads no following token."""
        c, w = self.config, self.w
        eps, theta = c.rms_norm_eps, c.rope_parameters["rope_theta"]
        group = c.num_attention_heads // c.num_key_value_heads
        elements = [(a, 0) for a in range(len(tokens) - 1)] + deep
        hidden, embeds = {}, {}
        for a, d in elements:
            features = aux[a] if d == 0 else w["mask_hidden"].flatten()
            if "fc_norm.0.weight" in w:
                parts = features.chunk(3)
                features = torch.cat([rms_norm(x, w[f"fc_norm.{i}.weight"], eps) for i, x in enumerate(parts)])
            hidden[a, d] = w["fc.weight"] @ features
            embeds[a, d] = self.embedding[tokens[a + 1] if d == 0 else c.mask_token_id]
        for layer in range(c.num_hidden_layers):
            name = f"layers.{layer}."
            queries, keys, values = {}, {}, {}
            for a, d in elements:
                if layer == 0:
                    x = torch.cat(
                        [
                            rms_norm(embeds[a, d], w[name + "input_layernorm.weight"], eps),
                            rms_norm(hidden[a, d], w[name + "hidden_norm.weight"], eps),
                        ]
                    )
                else:
                    x = rms_norm(hidden[a, d], w[name + "input_layernorm.weight"], eps)
                attn = f"{name}self_attn."
                q, k, v = (
                    (w[f"{attn}{n}_proj.weight"] @ x + w.get(f"{attn}{n}_proj.bias", 0)).split(c.head_dim)
                    for n in "qkv"
                )
                q, k = (norm_heads(h, w.get(f"{attn}{n}_norm.weight"), eps) for n, h in (("q", q), ("k", k)))
                queries[a, d] = [rotate(h, a + d, theta) for h in q]
                keys[a, d] = [rotate(h, a + d, theta) for h in k]
                values[a, d] = v
            after = {}
            for element in elements:
                seen = [other for other in elements if may_see(element, other)]
                heads = []
                for h in range(c.num_attention_heads):
                    scores = torch.stack([queries[element][h] @ keys[o][h // group] for o in seen])
                    probs = torch.softmax(scores / math.sqrt(c.head_dim), 0)
                    heads.append(sum(p * values[o][h // group] for p, o in zip(probs, seen, strict=True)))
                x = hidden[element]
                if layer == 0 and getattr(c, "norm_before_residual", False):
                    x = rms_norm(x, w[name + "hidden_norm.weight"], eps)
                x = x + w[name + "self_attn.o_proj.weight"] @ torch.cat(heads)
                x = x + w.get(name + "self_attn.o_proj.bias", 0)
                y = rms_norm(x, w[name + "post_attention_layernorm.weight"], eps)
                gate, up = w[name + "mlp.gate_proj.weight"] @ y, w[name + "mlp.up_proj.weight"] @ y
                after[element] = x + w[name + "mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
            hidden = after
        return {element: rms_norm(x, w["norm.weight"], eps) for element, x in hidden.items()}

    def document(
        self,
        tokens: Tensor,
        mask: Tensor,
        aux: Tensor,
        last: Tensor,
        deep: list[tuple[int, int]],
        *,
        depths: int,
        loss: str,
        label: str,
    ) -> tuple[Tensor, int, list[int]]:
        """Sum of the loss, elements that predict a supervised token, and hits of each depth."""
        states = self.states(tokens, aux, deep)
        total, count, hits = torch.zeros((), dtype=aux.dtype), 0, [0] * depths
        ids = torch.tensor(self.target_ids)
        for (a, d), state in states.items():
            if a + d + 2 >= len(tokens) or not mask[a + d + 2]:
                assert d == 0
                continue
            count += 1
            target = torch.softmax(self.lm_head @ last[a + d + 1], 0)
            right = int(target.argmax()) if label == "target" else int(tokens[a + d + 2])
            if right not in self.target_ids:
                continue
            q = torch.softmax(self.w["lm_head.weight"] @ state, 0)
            hits[d] += int(self.target_ids[int(q.argmax())] == right)
            if loss == "ce":
                total = total - q[self.target_ids.index(right)].log()
            else:
                p = target[ids] / target[ids].sum()
                total = total + sum(x * (x.log() - y.log()) for x, y in zip(p, q, strict=True))
        return total, count, hits
