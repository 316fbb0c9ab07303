"""A stand-in for SGLang's compiled kernels, for tests on a CPU without AMX: what a chain of drafts needs, in torch.

Written from what the call sites of SGLang 0.5.23 ask for. Every tensor that a function fills is an argument, and
nothing is returned, as in the kernels. Draft trees (``topk`` above one) are refused. A name that is not here can be
imported, as SGLang imports many that it never calls, and fails when called.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the stand-in for sgl_kernel has no {name}")

    return missing


def _chain_only(topk: int) -> None:
    if topk != 1:
        raise NotImplementedError(f"the stand-in for sgl_kernel drafts chains, not trees of topk {topk}")


def build_tree_kernel_efficient_cpu(
    parent_list,
    selected_index,
    seq_lens,
    tree_mask,
    positions,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    topk,
    depth,
    draft_tokens,
    tree_mask_mode,
) -> None:
    """A chain needs no mask: attention is causal by itself."""
    _chain_only(topk)
    chain = torch.arange(draft_tokens)
    positions.copy_((seq_lens[:, None] + chain).flatten())
    retrieve_index.copy_(torch.arange(len(seq_lens))[:, None] * draft_tokens + chain)
    retrieve_next_token.copy_(torch.where(chain + 1 < draft_tokens, chain + 1, -1).expand_as(retrieve_index))
    retrieve_next_sibling.fill_(-1)


def verify_tree_greedy_cpu(
    *,
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
) -> None:
    """Accept drafts as long as they are what the target says after the last accepted one."""
    target = target_predict.flatten()
    for row in range(len(candidates)):
        last, place, accepted = int(retrive_index[row, 0]), 0, 0
        accept_index[row, 0] = last
        for slot in range(1, accept_index.shape[1]):
            place = int(retrive_next_token[row, place])
            while place != -1 and candidates[row, place] != target[last]:
                place = int(retrive_next_sibling[row, place])
            if place == -1:
                break
            predicts[last] = target[last]
            last, accepted = int(retrive_index[row, place]), slot
            accept_index[row, slot] = last
        accept_token_num[row] = accepted
        predicts[last] = target[last]


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, stride) -> None:
    """The last accepted token of each request."""
    rows = torch.arange(len(accept_lens))
    bonus_tokens.copy_(accept_tokens.flatten()[rows * stride + accept_lens - 1])


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc) -> None:
    """The cache slots of the accepted tokens, packed."""
    kept = accept_index.flatten()
    kept = kept[kept > -1]
    accept_out_cache_loc[: len(kept)] = out_cache_loc[kept]


def assign_extend_cache_locs_cpu(rows, req_to_token, start, end, out_cache_loc, pool_len) -> None:
    """The cache slots of positions ``start`` to ``end`` of each request, packed."""
    slots = torch.cat([req_to_token[r, a:b] for r, a, b in zip(rows, start, end, strict=True)])
    out_cache_loc[: len(slots)] = slots


def assign_draft_cache_locs_contiguous_cpu(
    rows, req_to_token, seq_lens, out_cache_loc, pool_len, topk, columns
) -> None:
    """The cache slots behind each request's committed tokens."""
    assign_extend_cache_locs_cpu(rows, req_to_token, seq_lens, seq_lens + topk * columns, out_cache_loc, pool_len)


def assign_req_to_token_pool_cpu(rows, req_to_token, start, end, out_cache_loc, pool_len) -> None:
    """Note the cache slots of positions ``start`` to ``end`` of each request."""
    first = 0
    for r, a, b in zip(rows, start.tolist(), end.tolist(), strict=True):
        req_to_token[r, a:b] = out_cache_loc[first : first + b - a].to(req_to_token.dtype)
        first += b - a


def rotate_input_ids_cpu(input_ids, start, lens, new_tokens, select_index) -> None:
    """Shift each request's tokens by one to the left, and put its new token behind."""
    for i, (a, n) in enumerate(zip(start.tolist(), lens.tolist(), strict=True)):
        input_ids[a : a + n - 1] = input_ids[a + 1 : a + n].clone()
        input_ids[int(select_index[i]) if select_index is not None else a + n - 1] = new_tokens.flatten()[i]


def copy_all_layer_kv_cache_cpu(pointers, strides, target_slots, source_slots) -> None:
    """Move cache slots, in every buffer that is given by its address and the bytes of a slot."""
    for pointer, size in zip(pointers.tolist(), strides.tolist(), strict=True):
        contents = [ctypes.string_at(pointer + slot * size, size) for slot in source_slots.tolist()]
        for slot, content in zip(target_slots.tolist(), contents, strict=True):
            ctypes.memmove(pointer + slot * size, content, size)


def build_draft_decode_metadata_cpu(req_to_token, rows, seq_lens, topk, steps, pool_len) -> Tensor:
    """The requests' cache slots; a chain's drafts lie behind the committed tokens already."""
    _chain_only(topk)
    return req_to_token[rows]


def _attend(query, keys, values, scale, cap, window, visible) -> Tensor:
    """Attention of ``[n, h, d]`` queries over ``[s, k, d]`` keys; query i sees the first ``visible[i]`` of them."""
    if cap:
        raise NotImplementedError("the stand-in for sgl_kernel caps no logits")
    place = torch.arange(len(keys))
    mask = place < visible[:, None]
    if window > 0:
        mask &= place >= visible[:, None] - window
    heads = (x.to(query.dtype).transpose(0, 1)[None] for x in (query, keys, values))
    return scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def _extend_attention(
    q,
    k,
    v,
    out,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    req_to_token,
    rows,
    seq_lens,
    extend_lens,
    extend_start,
    longest,
    scale,
    cap,
    cross,
    window,
    encoder_lens,
    sinks,
    tree_mask,
    causal,
) -> None:
    """New tokens' attention; the cache has their keys and values, too, though of latent attention in another form."""
    if sinks is not None or tree_mask is not None or cross:
        raise NotImplementedError("the stand-in for sgl_kernel has no sinks, trees or cross-attention")
    places = zip(rows, seq_lens.tolist(), extend_lens.tolist(), extend_start.tolist(), strict=True)
    for row, length, new, first in places:
        slots, own = req_to_token[row, :length].long(), slice(first, first + new)
        keys, values = (k[own], v[own]) if new == length else (key_cache[slots], value_cache[slots])
        visible = torch.arange(length - new, length) + 1 if causal else torch.full((new,), length)
        out[own] = _attend(q[own], keys, values, scale, cap, window, visible)


def _decode_attention(
    q,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    out,
    k,
    v,
    slots,
    buffer,
    req_to_token,
    rows,
    seq_lens,
    scale,
    cap,
    cross,
    window,
    encoder_lens,
    sinks,
) -> None:
    """One new token a request; this kernel also writes its key and value to the cache."""
    if sinks is not None or cross:
        raise NotImplementedError("the stand-in for sgl_kernel has no sinks or cross-attention")
    if k is not None:
        key_cache[slots] = k.view(-1, *key_cache.shape[1:]).to(key_cache.dtype)
        value_cache[slots] = v.view(-1, *value_cache.shape[1:]).to(value_cache.dtype)
    for i, (row, length) in enumerate(zip(rows, seq_lens.tolist(), strict=True)):
        seen = req_to_token[row, :length].long()
        out[i] = _attend(q[i : i + 1], key_cache[seen], value_cache[seen], scale, cap, window, torch.tensor([length]))[
            0
        ]


torch.ops.sgl_kernel.extend_attention_cpu = _extend_attention
torch.ops.sgl_kernel.decode_attention_cpu = _decode_attention
