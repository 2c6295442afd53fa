"""The tokens of one engine step, as tensors that every layer shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pdserve.core.errors import InternalError
from pdserve.core.types import BLOCK_TOKENS, blocks_for


class SequenceChunk(NamedTuple):
    """What one sequence runs in a step."""

    token_ids: Sequence[int]
    """Consecutive tokens, at least one."""
    start: int
    """Position of the first of them; KV of all positions before it is in the blocks."""
    block_table: Sequence[int]
    """Blocks of positions 0 … at least start + len(token_ids) - 1."""
    wants_logits: bool
    """Whether the logits of the chunk's last token are asked for."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """The S1 sequences that run one token, attended together, padded to the longest."""

    rows: torch.Tensor
    """int64 [S1]: their rows among the step's tokens."""
    block_table: torch.Tensor
    """int64 [S1, blocks of the longest]; padded with block 0."""
    valid: torch.Tensor
    """bool [S1, 16 x blocks of the longest]: positions inside each sequence's context."""
    shortest_full: int
    """Tokens in the full blocks of the shortest: every position before it is valid in all rows."""


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """A sequence that runs more than one token."""

    first_row: int
    rows: int
    start: int
    """Position of the first row; the context ends at start + rows."""
    block_table: torch.Tensor
    """int64 [blocks of the context]."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """T tokens of S sequences, back to back. Built once per step, read by every layer; owns no KV."""

    token_ids: torch.Tensor
    """int64 [T]"""
    positions: torch.Tensor
    """int64 [T]"""
    block_ids: torch.Tensor
    """int64 [T]: the block that takes each token's K and V."""
    offsets: torch.Tensor
    """int64 [T]: the slot in that block, 0 … 15."""
    query_start: tuple[int, ...]
    """S + 1 row numbers: sequence s has rows query_start[s] … query_start[s + 1] - 1."""
    context_lens: tuple[int, ...]
    """Tokens in the KV of each sequence once this step's are written."""
    block_tables: torch.Tensor
    """int64 [S, blocks of the longest context], padded with block 0."""
    logit_rows: torch.Tensor
    """int64 [R]: rows whose logits are asked for, in the order of the sequences."""
    decode: DecodeGroup | None
    prefills: tuple[PrefillSpan, ...]

    @property
    def num_tokens(self) -> int:
        return self.query_start[-1]

    @staticmethod
    def build(chunks: Sequence[SequenceChunk], device: torch.device | str = "cpu") -> "StepBatch":
        """Lay out one step on `device`.

        Raises:
            InternalError: no chunk, an empty chunk, or a block table that does not cover its chunk.
        """
        _check(chunks)
        lens = [len(chunk.token_ids) for chunk in chunks]
        query_start = tuple(accumulate(lens, initial=0))
        context_lens = tuple(chunk.start + n for chunk, n in zip(chunks, lens, strict=True))
        tables = _padded_tables(chunks, context_lens)
        positions = np.concatenate(
            [np.arange(c.start, end, dtype=np.int64) for c, end in zip(chunks, context_lens, strict=True)]
        )
        sequence_of_row = np.repeat(np.arange(len(chunks)), lens)
        token_ids = np.concatenate([np.asarray(chunk.token_ids, dtype=np.int64) for chunk in chunks])
        logit_rows = [last - 1 for c, last in zip(chunks, query_start[1:], strict=True) if c.wants_logits]

        def place(values: npt.NDArray[np.int64]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        block_tables = place(tables)
        return StepBatch(
            token_ids=place(token_ids),
            positions=place(positions),
            block_ids=place(tables[sequence_of_row, positions // BLOCK_TOKENS]),
            offsets=place(positions % BLOCK_TOKENS),
            query_start=query_start,
            context_lens=context_lens,
            block_tables=block_tables,
            logit_rows=place(np.asarray(logit_rows, dtype=np.int64)),
            decode=_decode_group(query_start, context_lens, tables, device),
            prefills=_prefill_spans(query_start, context_lens, block_tables),
        )


def _check(chunks: Sequence[SequenceChunk]) -> None:
    if not chunks:
        raise InternalError("a step needs at least one sequence")
    for number, (token_ids, start, block_table, _) in enumerate(chunks):
        if not token_ids or start < 0:
            raise InternalError(f"sequence {number} of the step runs {len(token_ids)} tokens from {start}")
        needed = blocks_for(start + len(token_ids))
        if len(block_table) < needed:
            raise InternalError(
                f"sequence {number} of the step ends at position {start + len(token_ids) - 1} and needs "
                f"{needed} blocks, its table has {len(block_table)}"
            )


def _padded_tables(chunks: Sequence[SequenceChunk], context_lens: Sequence[int]) -> npt.NDArray[np.int64]:
    tables = np.zeros((len(chunks), blocks_for(max(context_lens))), dtype=np.int64)
    for row, (chunk, context) in enumerate(zip(chunks, context_lens, strict=True)):
        used = blocks_for(context)
        tables[row, :used] = chunk.block_table[:used]
    return tables


def _decode_group(
    query_start: Sequence[int],
    context_lens: Sequence[int],
    tables: npt.NDArray[np.int64],
    device: torch.device | str,
) -> DecodeGroup | None:
    singles = [s for s in range(len(context_lens)) if query_start[s + 1] - query_start[s] == 1]
    if not singles:
        return None
    contexts = np.asarray([context_lens[s] for s in singles], dtype=np.int64)
    blocks = blocks_for(int(contexts.max()))
    valid = np.arange(blocks * BLOCK_TOKENS)[None, :] < contexts[:, None]
    return DecodeGroup(
        rows=torch.tensor([query_start[s] for s in singles], dtype=torch.int64, device=device),
        block_table=torch.from_numpy(np.ascontiguousarray(tables[singles, :blocks])).to(device),
        valid=torch.from_numpy(valid).to(device),
        shortest_full=int(contexts.min()) // BLOCK_TOKENS * BLOCK_TOKENS,
    )


def _prefill_spans(
    query_start: Sequence[int], context_lens: Sequence[int], block_tables: torch.Tensor
) -> tuple[PrefillSpan, ...]:
    spans = []
    for s, context in enumerate(context_lens):
        rows = query_start[s + 1] - query_start[s]
        if rows > 1:
            table = block_tables[s, : blocks_for(context)]
            spans.append(PrefillSpan(query_start[s], rows, context - rows, table))
    return tuple(spans)
