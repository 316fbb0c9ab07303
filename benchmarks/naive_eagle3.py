"""Straightforward implementation of EAGLE-3's training-time test, for comparison with the fast one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, TrainBatch
from specforge.modeling.draft.eagle3.network import LlamaEagle3
from specforge.modeling.layers.decoder_layer import apply_rope


def shift(x: Tensor, by: int) -> Tensor:
    """Row p becomes row p + by of each document ``[B, S, ...]``; zeros past the end."""
    return torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], 1) if by else x


def naive_loss(
    draft: LlamaEagle3, batch: TrainBatch, embedding: Tensor, lm_head: Tensor, *, steps: int, length: int, decay: float
) -> Tensor:
    """Sum of the weighted KL losses of equally long documents; label `data`, teacher on the draft vocabulary."""
    dtype = draft.fc.weight.dtype
    documents = batch.num_tokens // length
    ids, mask = batch.input_ids.view(documents, length), batch.loss_mask.view(documents, length)
    aux = batch.features[AUX_HIDDEN_STATES].to(dtype).view(documents, length, -1)
    last = batch.features[LAST_HIDDEN_STATES].to(dtype).view(documents, length, -1)
    layer, attn = draft.midlayer, draft.midlayer.self_attn
    cos, sin = (x.to(dtype) for x in draft.rotary(length + steps, aux.device))
    rows, causal = torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril()
    hidden = draft.fc(aux)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    masks: list[Tensor] = []
    total = hidden.new_zeros(())
    for step in range(steps):
        embeds = F.embedding(shift(ids, 1 + step), embedding)
        x = torch.cat([plain_norm(layer.input_layernorm, embeds), plain_norm(layer.hidden_norm, hidden)], -1)
        angles = cos[rows + step], sin[rows + step]
        query, key, value = (
            proj(x).view(documents, length, -1, attn.head_dim) for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        query, key = (torch.stack([apply_rope(y, *angles) for y in z]) for z in (query, key))
        keys.append(key)
        values.append(value)
        masks.append(causal if step == 0 else torch.eye(length, dtype=torch.bool))
        attention = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            torch.cat(keys, 1).transpose(1, 2),
            torch.cat(values, 1).transpose(1, 2),
            attn_mask=torch.cat(masks, 1),
            enable_gqa=True,
        )
        hidden = hidden + attn.o_proj(attention.transpose(1, 2).flatten(2))
        y = plain_norm(layer.post_attention_layernorm, hidden)
        hidden = hidden + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
        logits = draft.lm_head(plain_norm(draft.norm, hidden))
        teacher = F.linear(shift(last, 1 + step), lm_head)[..., draft.target_ids].softmax(-1)
        divergence = (teacher * (teacher.clamp(min=1e-30).log() - logits.log_softmax(-1))).sum(-1)
        supervised = shift(mask, 2 + step) & (draft.draft_ids(shift(ids, 2 + step)) >= 0)
        total = total + decay**step * (divergence * supervised).sum()
    return total


def plain_norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    """RMSNorm in ordinary autograd."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
