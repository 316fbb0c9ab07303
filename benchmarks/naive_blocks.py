"""Straightforward implementation of the block drafters' losses, for comparison with the fast one.

It uses one dense mask over all tokens and all blocks, the logits of every slot, and ordinary autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.naive_eagle3 import plain_norm
from specforge.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, TrainBatch
from specforge.modeling.draft.dflash.network import DFlash
from specforge.modeling.layers.decoder_layer import apply_rope


def document_ids(batch: TrainBatch) -> Tensor:
    """``[N]`` index of each token's document, -1 for padding."""
    lengths = torch.tensor(batch.lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return F.pad(ids, (0, batch.num_tokens - len(ids)), value=-1)


def block_states(draft: DFlash, batch: TrainBatch, embedding: Tensor, anchors: Tensor) -> Tensor:
    """Normed states ``[n, b, H]`` of the blocks at some anchors; full layers only."""
    dtype, size = draft.fc.weight.dtype, draft.block_size
    documents = document_ids(batch)
    starts = F.pad(torch.tensor(batch.lengths).cumsum(0), (1, 0))
    positions = torch.arange(batch.num_tokens) - starts[documents]
    context = plain_norm(draft.hidden_norm, draft.fc(batch.features[AUX_HIDDEN_STATES].to(dtype)))
    ids = torch.full((len(anchors), size), draft.mask_token_id)
    ids[:, 0] = batch.input_ids[anchors]
    hidden = F.embedding(ids.flatten(), embedding)
    slot_positions = (positions[anchors].unsqueeze(1) + torch.arange(size)).flatten()
    block = torch.arange(len(anchors)).repeat_interleave(size)
    at = anchors[block].unsqueeze(1)
    seen = (torch.arange(batch.num_tokens) < at) & (documents == documents[at])
    mask = torch.cat([seen, block.unsqueeze(1) == block], 1)
    cos, sin = (x.to(dtype) for x in draft.rotary(max(batch.lengths) + size, at.device))
    for layer in draft.layers:
        attn = layer.self_attn
        x = plain_norm(layer.input_layernorm, hidden)
        source = torch.cat([context, x])
        query, key, value = (
            proj(y).unflatten(1, (-1, attn.head_dim))
            for proj, y in ((attn.q_proj, x), (attn.k_proj, source), (attn.v_proj, source))
        )
        both = torch.cat([positions, slot_positions])
        query = apply_rope(plain_norm(attn.q_norm, query), cos[slot_positions], sin[slot_positions])
        key = apply_rope(plain_norm(attn.k_norm, key), cos[both], sin[both])
        heads = (y.transpose(0, 1)[None] for y in (query, key, value))
        attention = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        hidden = hidden + attn.o_proj(attention.flatten(1))
        y = plain_norm(layer.post_attention_layernorm, hidden)
        hidden = hidden + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
    return plain_norm(draft.norm, hidden).unflatten(0, (-1, size))


def naive_loss(module: Any, batch: TrainBatch, embedding: Tensor, lm_head: Tensor) -> Tensor:
    """Sum of the weighted losses, labels from the data, the whole vocabulary."""
    draft = module.draft
    plan = module.training_plan(batch)
    anchors = plan.anchors[: plan.blocks]
    states = block_states(draft, batch, embedding, anchors)[:, 1 - draft.shift :]
    labels = anchors.unsqueeze(1) + 1 + torch.arange(draft.drafts)
    inside = labels < batch.num_tokens
    labels = labels.clamp(max=batch.num_tokens - 1)
    documents = document_ids(batch)
    valid = inside & batch.loss_mask[labels] & (documents[labels] == documents[anchors].unsqueeze(1))
    logits = F.linear(states, lm_head)
    weights = torch.exp(-torch.arange(draft.drafts) / module.decay) * valid
    if module.algorithm == "dspark":
        return _dspark(module, batch, states, logits, labels, weights, lm_head)
    entropy = F.cross_entropy(logits.flatten(0, 1), batch.input_ids[labels].flatten(), reduction="none").view(
        labels.shape
    )
    if module.algorithm == "domino":
        logits = logits + _domino(draft, F.embedding(batch.input_ids[labels - 1], embedding), states)
        final = F.cross_entropy(logits.flatten(0, 1), batch.input_ids[labels].flatten(), reduction="none").view(
            labels.shape
        )
        entropy = torch.lerp(final, entropy, module.base_share)
    if module.algorithm == "dflash" and module.weights == "dpace":
        smooth = torch.where(valid, (1 - module.alpha) * (-entropy.detach()).exp() + module.alpha, 1.0)
        weights = (smooth.cumprod(1) * valid).flip(1).cumsum(1).flip(1) * valid
    return (entropy * weights).sum()


def _domino(draft: Any, embeds: Tensor, states: Tensor) -> Tensor:
    """The correction of every draft."""
    source = draft.prefix_gru
    gru = torch.nn.GRU(embeds.shape[-1], source.hidden, bias=False, batch_first=True)
    memory, _ = torch.func.functional_call(gru, dict(source.named_parameters()), (embeds,))
    correction = draft.embed_proj(torch.cat([states, memory], -1))
    return F.pad(correction[:, draft.prefix :], (0, 0, draft.prefix, 0))


def _dspark(
    module: Any, batch: TrainBatch, states: Tensor, logits: Tensor, labels: Tensor, weights: Tensor, lm_head: Tensor
) -> Tensor:
    draft = module.draft
    before = draft.markov_head.markov_w1(batch.input_ids[labels - 1])
    logits = logits + draft.markov_head.markov_w2(before)
    teacher = F.linear(batch.features[LAST_HIDDEN_STATES].to(states.dtype)[labels - 1], lm_head).softmax(-1)
    distance = (logits.softmax(-1) - teacher).abs().sum(-1)
    entropy = F.cross_entropy(logits.flatten(0, 1), batch.input_ids[labels].flatten(), reduction="none").view(
        labels.shape
    )
    guess = draft.confidence_head.proj(torch.cat([states, before], -1)).squeeze(-1)
    aim = 1 - distance.detach() / 2
    sure = F.binary_cross_entropy_with_logits(guess, aim.clamp(0, 1), reduction="none")
    return ((module.ce * entropy + module.l1 * distance + module.confidence * sure) * weights).sum()
