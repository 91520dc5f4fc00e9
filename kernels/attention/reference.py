"""Softmax attention in plain PyTorch.

The forward gives the very bits of transformers: `scaled_dot_product_attention`, called as its "sdpa" interface calls it, or
the eager formula where a softcap or sinks rule that out. The backward recomputes the probabilities a block of queries at a
time, so that it holds O(block * S) numbers and never O(T * S).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hydrasurgery.kernels.attention.reach import densely

# Scores held at once, over batch and heads. Backward: 4 MB of fp32 stay in a CPU's cache, an accelerator wants larger products.
# Eager forward: high enough that whatever transformers itself could run is one block, for a block may round differently.
BACKWARD_SCORES_CPU = 1 << 20
BACKWARD_SCORES = 1 << 25
EAGER_SCORES = 1 << 28


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """softmax(softcap(scale q k^T) + mask, with sinks) v; shapes as in `hydrasurgery.ops.attention`.

    A query that may attend to nothing gives 0, except under an additive mask of finite numbers, which the softmax cannot
    tell from a shift of the row.
    """
    queries, keys = q.shape[2], k.shape[2]
    mask = densely(mask, queries)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    fast = softcap is None and sinks is None
    # SDPA's own flag aligns the triangle top-left, which is the same only for a square one.
    flag = fast and mask is None and causal and 1 < queries == keys and not _bites(window, keys)
    if mask is None and not flag:
        mask = visible_keys(queries, keys, causal, window, q.device)
    if fast:
        return _sdpa(q, k, v, mask, scale, flag)
    return _eager(q, k, v, mask, sinks, q.shape[-1] ** -0.5 if scale is None else scale, softcap)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks for `grad` [B, T, H, Dv]. A query that may attend to nothing passes none.

    With p the probabilities, dp = grad v^T and delta = sum_j p_j dp_j: ds = p (dp - delta), d sink = -p_sink delta,
    and through the softcap ds *= 1 - tanh^2. Query heads of one group add up in dk and dv.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, queries, _ = q.shape
    mask = densely(mask, queries)
    groups = k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_all, keys, values = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    grad_all = grad.to(dtype).transpose(1, 2)
    dq, dk, dv = torch.zeros_like(q_all), torch.zeros_like(keys), torch.zeros_like(values)
    dsinks = None if sinks is None else sinks.new_zeros(heads, dtype=dtype)
    budget = BACKWARD_SCORES_CPU if q.device.type == "cpu" else BACKWARD_SCORES
    for rows, cols in blocks(q, k, mask, causal, window, budget):
        # Heads of a group stacked along the queries: one product a group, and dk, dv are summed over its heads by it.
        stack = (batch, groups, heads // groups * (rows.stop - rows.start))
        q_rows = q_all[:, :, rows].reshape(*stack, q.shape[-1])
        grad_rows = grad_all[:, :, rows].reshape(*stack, v.shape[-1])
        k_cols, v_cols = keys[:, :, cols], values[:, :, cols]
        shape = (batch, heads, rows.stop - rows.start, cols.stop - cols.start)
        seen = block_mask(rows, cols, q, k, mask, causal, window)
        p, p_sink, slope = _probabilities((q_rows @ k_cols.mT).view(shape), seen, sinks, softcap)
        dp = (grad_rows @ v_cols.mT).view(shape)
        delta = (p * dp).sum(-1, keepdim=True)
        ds = dp.sub_(delta).mul_(p)
        if slope is not None:
            ds.mul_(slope)
        if dsinks is not None and p_sink is not None:
            dsinks -= (p_sink * delta).sum((0, 2, 3))
        ds, p = ds.view(*stack, shape[-1]), p.reshape(*stack, shape[-1])
        dq[:, :, rows] = (ds @ k_cols).view(*shape[:3], q.shape[-1])
        dk[:, :, cols] += ds.mT @ q_rows
        dv[:, :, cols] += p.mT @ grad_rows
    if sinks is not None and dsinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    return dq.mul_(scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


def visible_keys(
    queries: int, keys: int, causal: bool, window: int | None, device: torch.device | str
) -> Tensor | None:
    """The bool mask [1, 1, T, S] of a causal and/or window attention, its last query on its last key; None if all True."""
    if not _bites(window, keys) and not (causal and queries > 1):
        return None
    return _visible(slice(0, queries), slice(0, keys), keys - queries, causal, window, device)[None, None]


def _bites(window: int | None, keys: int) -> bool:
    return window is not None and window < keys


def _visible(
    rows: slice, cols: slice, offset: int, causal: bool, window: int | None, device: torch.device | str
) -> Tensor:
    place = torch.arange(rows.start, rows.stop, device=device)[:, None] + offset
    key = torch.arange(cols.start, cols.stop, device=device)[None, :]
    seen = key <= place if causal else torch.ones_like(place + key, dtype=torch.bool)
    return seen if window is None else seen & (key > place - window)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    # Expanded and not `repeat_interleave`d: of a single head this is a view, and products of it round as transformers' do.
    return x if times == 1 else x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, flag: bool) -> Tensor:
    """SDPA with the choices of transformers' interface: which kernel runs, and so the bits, depends on them."""
    batch, heads, queries, _ = q.shape
    times, grouped = heads // k.shape[1], False
    if times > 1:
        if mask is None and k.shape[-1] == v.shape[-1] <= 256:
            grouped = True
        elif queries == 1:
            # One query a head: the heads of a group take the place of queries, and no key is copied.
            q = q.reshape(batch, heads // times, times, q.shape[-1])
            if mask is not None and mask.shape[1] > 1:
                mask = mask.reshape(mask.shape[0], heads // times, times, mask.shape[-1])
        else:
            k, v = repeat_heads(k, times), repeat_heads(v, times)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=flag, scale=scale, enable_gqa=grouped)
    return out.reshape(batch, heads, queries, v.shape[-1]).transpose(1, 2).contiguous()


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    batch, heads, queries, _ = q.shape
    k, v = repeat_heads(k, heads // k.shape[1]), repeat_heads(v, heads // v.shape[1])
    out = q.new_empty(batch, queries, heads, v.shape[-1])
    step = max(1, EAGER_SCORES // max(1, batch * heads * k.shape[2]))
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        part = None if mask is None else mask[:, :, rows]
        weights = _eager_weights(q[:, :, rows], k, part, sinks, scale, softcap)
        out[:, rows] = (weights.to(v.dtype) @ v).transpose(1, 2)
    return out


def _eager_weights(
    q: Tensor, k: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Probabilities in the order of operations of the eager models: rounding included."""
    logits = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if sinks is None:
        weights = F.softmax(logits, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return weights if mask is None else weights.masked_fill(logits.amax(-1, keepdim=True) == -torch.inf, 0)
    extra = sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    logits = torch.cat([logits, extra], dim=-1)
    logits = logits - logits.amax(-1, keepdim=True)
    return F.softmax(logits, dim=-1)[..., :-1]


def blocks(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, window: int | None, budget: int
) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, of at most `budget` scores, with the span of keys that any of them may see."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    step, offset = max(1, budget // max(1, batch * heads * keys)), keys - queries
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        low, high = 0, keys
        if mask is None and causal:
            high = min(keys, stop + offset)
        if mask is None and window is not None:
            low = max(0, start + offset - window + 1)
        if low < high:
            yield slice(start, stop), slice(low, high)


def block_mask(
    rows: slice, cols: slice, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, window: int | None
) -> Tensor | None:
    if mask is not None:
        return mask[:, :, rows, cols]
    if not causal and window is None:
        return None
    return _visible(rows, cols, k.shape[2] - q.shape[2], causal, window, q.device)


def _probabilities(
    scores: Tensor, mask: Tensor | None, sinks: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(p, p of the sink, slope of the softcap) of one block; p is 0 where a query may attend to nothing. `scores` is used up."""
    slope, p_sink = None, None
    if softcap is not None:
        bent = scores.div_(softcap).tanh_()
        scores, slope = bent * softcap, 1 - bent * bent
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores.add_(mask)
        mask = mask > torch.finfo(mask.dtype).min / 2
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    p = scores.softmax(-1)
    if mask is not None:
        p.masked_fill_(~mask.any(-1, keepdim=True), 0)
    if sinks is not None:
        p, p_sink = p[..., :-1], p[..., -1:]
    return p, p_sink, slope
