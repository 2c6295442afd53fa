"""Sampling as a pure function of (logits, parameters, seed, position).

Gumbel-max: the argmax of logits plus Gumbel noise is a draw from their softmax. The noise of a token is a
hash of (seed, position, token id), so the draw does not depend on the device, on the batch, or on what ran
before: a sequence that is migrated, resumed or preempted goes on with the tokens that it would have had.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from pdserve.core.errors import InternalError
from pdserve.core.seed import GOLDEN_GAMMA, MIX_FACTORS, MIX_SHIFTS, noise_key
from pdserve.core.types import SamplingParams

_ROWS_AT_ONCE: Final = 16
"""Bounds the float64 temporaries: about 40 bytes × vocabulary × rows."""

_GREEDY_BELOW: Final = 1e-5
"""Temperatures under it choose as 0 does, as in vLLM; logits over far smaller ones are not finite."""

_MASS_SCALE: Final = float(1 << 40)
"""Probability mass is counted in integers of this unit, relative to the likeliest token. Integer sums are
exact in every order, so no row's nucleus can depend on how a device splits a reduction over the batch."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What one row of logits is sampled with. `position` is the index of the new token in its sequence."""

    params: SamplingParams
    seed: int
    position: int

    @property
    def is_greedy(self) -> bool:
        """The likeliest token wins whatever the noise."""
        return self.params.temperature < _GREEDY_BELOW or self.params.top_k == 1

    @property
    def is_truncated(self) -> bool:
        """Only some of the vocabulary can win."""
        return self.params.top_k > 0 or self.params.top_p < 1.0 or self.params.min_p > 0.0


def sample(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> list[int]:
    """One token id per row.

    `logits` is [rows, vocabulary] float32, on any device, and is not written to. Greedy rows take the
    likeliest token, the lowest id on ties. Others: temperature, min-p, top-k, top-p, as vLLM orders them, but
    ties at a cut of top-k or top-p go to the lowest ids, so that top-k keeps k tokens.
    Raises InternalError when a row has NaN or +inf, or nothing above -inf: the forward pass is broken.
    """
    if logits.shape[0] != len(requests):
        raise InternalError(f"{logits.shape[0]} rows of logits for {len(requests)} sample requests")
    if not requests:
        return []
    best = logits.max(dim=-1)
    _refuse_broken(best.values)
    tokens: list[int] = best.indices.tolist()
    random = [row for row, request in enumerate(requests) if not request.is_greedy]
    for truncated in (False, True):
        group = [row for row in random if requests[row].is_truncated is truncated]
        for start in range(0, len(group), _ROWS_AT_ONCE):
            rows = group[start : start + _ROWS_AT_ONCE]
            for row, token in zip(rows, _draw(logits, requests, rows, truncated), strict=True):
                tokens[row] = token
    return tokens


def check_finite(logits: torch.Tensor) -> None:
    """Raises InternalError as `sample` does."""
    _refuse_broken(logits.amax(dim=-1))


def gumbel_noise(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64 [rows, n], of int64 `keys` [rows, 1] and token `ids` [rows or 1, n].

    Each entry is -log(-log(u)) with u in (0, 1) from the top 52 bits of word id + 1 of the SplitMix64
    sequence that starts at the row's key, which is that of `core.seed.noise_key`.
    """
    words = _mix64((ids + 1) * _signed(GOLDEN_GAMMA) + keys)
    # 52 bits and a half are exact in float64, so u is never 0 or 1 and the noise is finite.
    uniform = _shift_right(words, 12).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _refuse_broken(highest: torch.Tensor) -> None:
    finite = highest.isfinite()
    if not bool(finite.all()):
        broken = finite.logical_not().nonzero().flatten().tolist()
        raise InternalError(f"the logits of rows {broken} are not finite: the forward pass is broken")


def _draw(
    logits: torch.Tensor, requests: Sequence[SampleRequest], rows: Sequence[int], truncated: bool
) -> list[int]:
    """Token ids for `rows`, which are all truncated or all not."""
    device = logits.device
    chosen = [requests[row] for row in rows]
    temperature = torch.tensor([[request.params.temperature] for request in chosen], dtype=torch.float64)
    keys = torch.tensor([[_signed(noise_key(request.seed, request.position))] for request in chosen])
    scores = logits.index_select(0, torch.tensor(rows, device=device)).double().div_(temperature.to(device))
    if truncated:
        ids, scores = _candidates(scores, [request.params for request in chosen])
    else:
        ids = torch.arange(scores.shape[1], device=device).unsqueeze(0)
    best = scores.add_(gumbel_noise(keys.to(device), ids)).argmax(-1, keepdim=True)
    drawn: list[int] = ids.expand(len(rows), -1).gather(1, best).flatten().tolist()
    return drawn


def _candidates(scores: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that min-p, top-k and top-p leave, likeliest first, equals by id.

    Returns (ids, scores), both [rows, n]. n is that of the widest row; what is beyond a row's own limits has
    the score -inf. Top-p keeps a token when the mass before it is below p, so always one at least. Tokens
    lighter than (1 - p) / vocabulary of the mass weigh less than 1 - p together and so lie outside of the
    nucleus: only the others are sorted.
    """
    device = scores.device
    vocabulary = scores.shape[1]
    if any(p.min_p > 0.0 for p in params):
        _keep_min_p(scores, [p.min_p for p in params])
    if any(p.top_k > 0 for p in params):
        _keep_top_k(scores, [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params])
    limit = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=device)
    weights = (scores - scores.amax(-1, keepdim=True)).exp_().mul_(_MASS_SCALE).round_().long()
    total = weights.sum(-1, keepdim=True)
    unlimited = limit >= 1.0
    floor = ((1.0 - limit) * total / vocabulary).clamp_(min=1.0).masked_fill_(unlimited, 0.0)
    widest = int(((weights >= floor) & (scores > -torch.inf)).sum(-1).max())
    # topk leaves the order of equals open; by id first, then stable by weight, fixes it.
    ids = scores.topk(widest, dim=-1).indices.sort(-1).values
    ordered = weights.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, ordered.indices)
    before = ordered.values.cumsum(-1) - ordered.values
    inside = unlimited | (before < (limit * total).ceil_().clamp_(min=1.0))
    return ids, scores.gather(1, ids).masked_fill_(~inside, -torch.inf)


def _keep_min_p(scores: torch.Tensor, shares: Sequence[float]) -> None:
    """Set the scores of tokens less likely than that share of the likeliest one to -inf."""
    share = torch.tensor(shares, dtype=torch.float64, device=scores.device).unsqueeze(1)
    scores.masked_fill_(scores < scores.amax(-1, keepdim=True) + share.log(), -torch.inf)


def _keep_top_k(scores: torch.Tensor, limits: Sequence[int]) -> None:
    """Set all but the `limits[row]` highest scores of each row to -inf; at the cut the lowest ids stay."""
    k = torch.tensor(limits, device=scores.device).unsqueeze(1)
    finite_k = [limit for limit in limits if limit < scores.shape[1]]
    highest = scores.topk(max(finite_k, default=1), dim=-1).values
    threshold = highest.gather(1, (k - 1).clamp(max=highest.shape[1] - 1))
    threshold = threshold.masked_fill(k == scores.shape[1], -torch.inf)
    above = scores > threshold
    level = scores == threshold
    room = k - above.sum(-1, keepdim=True)
    scores.masked_fill_(~(above | (level & (level.cumsum(-1) <= room))), -torch.inf)


def _mix64(words: torch.Tensor) -> torch.Tensor:
    """`core.seed.mix64` on int64 two's complement words, in place; products wrap as they do modulo 2^64."""
    for shift, factor in zip(MIX_SHIFTS[:2], MIX_FACTORS, strict=True):
        words.bitwise_xor_(_shift_right(words, shift)).mul_(_signed(factor))
    return words.bitwise_xor_(_shift_right(words, MIX_SHIFTS[2]))


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's own copies the sign bit of an int64."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word
