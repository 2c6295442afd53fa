"""The edits of a whole batch on its logits, in a handful of tensor operations.

Every entry is computed from its own logit alone, so no row's values depend on who else is in the batch.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from pdserve.workers.engine.logit_rules import Ids, LogitEdits
from pdserve.workers.engine.sampler import check_finite

_FLOAT32_MAX: Final = torch.finfo(torch.float32).max
_BITS: Final = 8


def edit_logits(logits: torch.Tensor, edits: Mapping[int, LogitEdits]) -> None:
    """Apply `edits`, by row, to `logits`, [rows, vocabulary] float32 and contiguous, in place.

    Bias, then repetition, frequency and presence penalty; then tokens that the constraint or a ban excludes
    get -inf, which comes to the same as excluding them first. Bans that would leave nothing are void, so a
    row with a satisfiable constraint always keeps a token. Ids outside of the vocabulary are left out.
    Raises InternalError where the logits are not finite: an exclusion would hide it from the sampler.
    """
    if not edits:
        return
    check_finite(logits)
    _add_biases(logits, edits)
    _penalise(logits, edits)
    constrained = {row: edit.allowed for row, edit in edits.items() if edit.allowed is not None}
    if constrained:
        _keep_allowed(logits, constrained)
    _ban(logits, edits)


def _add_biases(logits: torch.Tensor, edits: Mapping[int, LogitEdits]) -> None:
    biased = {row: edit for row, edit in edits.items() if edit.bias_ids.size}
    if not biased:
        return
    places, kept = _places(logits, {row: edit.bias_ids for row, edit in biased.items()})
    biases = np.concatenate([edit.biases for edit in biased.values()])[kept]
    values = logits.view(-1)[places].double().add_(torch.from_numpy(biases).to(logits.device))
    _store(logits, places, values)


def _penalise(logits: torch.Tensor, edits: Mapping[int, LogitEdits]) -> None:
    seen = {row: edit for row, edit in edits.items() if edit.seen_ids.size}
    if not seen:
        return
    places, kept = _places(logits, {row: edit.seen_ids for row, edit in seen.items()})

    def column(name: str) -> npt.NDArray[np.float64]:
        values = [getattr(edit.params, name) for edit in seen.values()]
        sizes = [edit.seen_ids.size for edit in seen.values()]
        return np.repeat(np.asarray(values, dtype=np.float64), sizes)[kept]

    counts = np.concatenate([edit.counts for edit in seen.values()])[kept]
    less = column("frequency_penalty") * counts + column("presence_penalty") * (counts > 0)
    penalty = torch.from_numpy(column("repetition_penalty")).to(logits.device)
    values = logits.view(-1)[places].double()
    values = torch.where(values > 0, values / penalty, values * penalty)
    _store(logits, places, values.sub_(torch.from_numpy(less).to(logits.device)))


def _keep_allowed(logits: torch.Tensor, allowed: Mapping[int, npt.NDArray[np.uint8]]) -> None:
    """Set what the bit masks do not have to -inf; they cover the vocabulary or more."""
    device, vocabulary = logits.device, logits.shape[1]
    width = -(-vocabulary // _BITS)
    packed = torch.from_numpy(np.stack([bits[:width] for bits in allowed.values()])).to(device)
    shifts = torch.arange(_BITS, dtype=torch.uint8, device=device)
    bits = (packed.unsqueeze(-1) >> shifts).bitwise_and_(1).view(len(allowed), -1)[:, :vocabulary]
    rows = torch.tensor(list(allowed), device=device)
    kept = logits.index_select(0, rows).masked_fill_(bits == 0, -torch.inf)
    logits.index_copy_(0, rows, kept)


def _ban(logits: torch.Tensor, edits: Mapping[int, LogitEdits]) -> None:
    banned = {row: edit for row, edit in edits.items() if edit.banned.size}
    if not banned:
        return
    places, _ = _places(logits, {row: edit.banned for row, edit in banned.items()})
    before = logits.view(-1)[places]
    logits.view(-1)[places] = -torch.inf
    doubtful = [
        row for row, edit in banned.items() if edit.allowed is not None or edit.banned.size >= logits.shape[1]
    ]
    if not doubtful:
        return
    rows = torch.tensor(doubtful, device=logits.device)
    empty = rows[logits.index_select(0, rows).amax(-1) == -torch.inf]
    void = torch.isin(places // logits.shape[1], empty)
    logits.view(-1)[places[void]] = before[void]


def _places(logits: torch.Tensor, ids: Mapping[int, Ids]) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
    """Indices into the flat logits, and which of all ids, one row after the other, they are for."""
    vocabulary = logits.shape[1]
    tokens = np.concatenate(list(ids.values()))
    starts = np.repeat(np.asarray(list(ids)) * vocabulary, [part.size for part in ids.values()])
    kept = (tokens >= 0) & (tokens < vocabulary)
    return torch.from_numpy((starts + tokens)[kept]).to(logits.device), kept


def _store(logits: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
    """No penalty makes a logit +inf."""
    logits.view(-1)[places] = values.clamp_(max=_FLOAT32_MAX).to(logits.dtype)
