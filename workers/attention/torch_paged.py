"""The reference attention: plain torch, CPU and CUDA."""

import torch
import torch.nn.functional as F

from pdserve.core.types import BLOCK_TOKENS
from pdserve.workers.attention.base import AttentionRule
from pdserve.workers.attention.batch import DecodeGroup, PrefillSpan, StepBatch

_QUERY_TILE = 128
"""Rows of a prefill attended at once: keys after a tile's last row are never touched, so about half of a
whole prompt's square is skipped, and the mask stays small. On two cores 128 beats 256 and 512 by 5-15 %."""


class TorchPagedAttention:
    """Gathers blocks into contiguous K and V, then calls torch's fused attention.

    The query heads of a group are folded into the query rows ([kv heads, group x rows, head_dim]), which is
    4-9 times as fast on CPU as `enable_gqa`. Single tokens run as one padded batch, longer chunks one by one.
    """

    def write(self, kv_layer: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: StepBatch) -> None:
        slots = (batch.block_ids, batch.offsets)
        kv_layer[:, 0].transpose(1, 2)[slots] = k
        kv_layer[:, 1].transpose(1, 2)[slots] = v

    def attend(
        self, q: torch.Tensor, kv_layer: torch.Tensor, batch: StepBatch, rule: AttentionRule
    ) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if batch.decode is not None:
            out[batch.decode.rows] = _attend_decode(q[batch.decode.rows], kv_layer, batch.decode, rule)
        for span in batch.prefills:
            rows = slice(span.first_row, span.first_row + span.rows)
            _attend_prefill(q[rows], kv_layer, span, rule, out[rows])
        return out


def _attend_decode(
    q: torch.Tensor, kv_layer: torch.Tensor, group: DecodeGroup, rule: AttentionRule
) -> torch.Tensor:
    """q [S1, heads, head_dim] -> the same shape."""
    k, v = _gather(kv_layer, group.block_table)
    # What lies past a context may be NaN: masked scores alone would still meet it as 0 x NaN.
    stale = ~group.valid[:, None, group.shortest_full :, None]
    k[:, :, group.shortest_full :].masked_fill_(stale, 0)
    v[:, :, group.shortest_full :].masked_fill_(stale, 0)
    seen = group.valid
    if rule.window is not None:
        ahead = seen.sum(dim=1, keepdim=True) - torch.arange(seen.shape[1], device=seen.device)
        seen = seen & (ahead <= rule.window)
    sequences, heads, head_dim = q.shape
    kv_heads = kv_layer.shape[2]
    grouped = q.view(sequences, kv_heads, heads // kv_heads, head_dim)
    return _weigh(grouped, k, v, seen[:, None, None, :], rule).reshape(sequences, heads, head_dim)


def _attend_prefill(
    q: torch.Tensor, kv_layer: torch.Tensor, span: PrefillSpan, rule: AttentionRule, out: torch.Tensor
) -> None:
    """q [rows, heads, head_dim]; writes `out` of the same shape."""
    k, v = _gather(kv_layer, span.block_table[None])
    rows, heads, head_dim = q.shape
    kv_heads = kv_layer.shape[2]
    group = heads // kv_heads
    by_head = q.view(rows, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    for first in range(0, rows, _QUERY_TILE):
        last = min(first + _QUERY_TILE, rows)
        tile = last - first
        context = span.start + last
        # Keys before the first row's window are nobody's in this tile.
        lowest = 0 if rule.window is None else max(0, span.start + first + 1 - rule.window)
        folded = by_head[:, :, first:last].reshape(1, kv_heads, group * tile, head_dim)
        seen = torch.ones(tile, context - lowest, dtype=torch.bool, device=q.device)
        seen = seen.tril(span.start + first - lowest)
        if rule.window is not None:
            seen = seen.triu(span.start + first - lowest - rule.window + 1)
        attended = _weigh(
            folded, k[:, :, lowest:context], v[:, :, lowest:context], seen.repeat(group, 1), rule
        )
        unfolded = attended.view(kv_heads, group, tile, head_dim).permute(2, 0, 1, 3)
        out[first:last] = unfolded.reshape(tile, heads, head_dim)


def _weigh(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, rule: AttentionRule
) -> torch.Tensor:
    """softmax(scores) v over the keys that `seen` (broadcast to [.., rows, keys]) allows: one at least."""
    if rule.soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=rule.scale)
    # The fused kernel cannot bend scores: as transformers' eager attention, softmax in float32.
    scores = torch.matmul(q, k.transpose(-1, -2)) * rule.scale
    scores = (scores / rule.soft_cap).tanh_() * rule.soft_cap
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def _gather(kv_layer: torch.Tensor, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy K and V of block_table [S, n] to two contiguous tensors [S, kv heads, 16 n, head_dim].

    One index_select over (block, K|V, head) rows of 16 x head_dim values: indexing whole blocks and moving
    the head dimension forward afterwards copies everything twice.
    """
    blocks, _, kv_heads, _, head_dim = kv_layer.shape
    row = BLOCK_TOKENS * head_dim
    rows_per_block = kv_layer.stride(0) // row
    flat = kv_layer.as_strided(
        ((blocks - 1) * rows_per_block + 2 * kv_heads, row), (row, 1), kv_layer.storage_offset()
    )
    sequences, table_len = block_table.shape
    heads = torch.arange(kv_heads, device=block_table.device)[None, :, None]
    k_rows = (block_table[:, None, :] * rows_per_block + heads).reshape(-1)
    shape = (sequences, kv_heads, table_len * BLOCK_TOKENS, head_dim)
    return flat.index_select(0, k_rows).view(shape), flat.index_select(0, k_rows + kv_heads).view(shape)
