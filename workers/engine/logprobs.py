"""Log-probabilities of sampled tokens, from the logits as the model gave them."""

from collections.abc import Sequence

import torch

from pdserve.core.types import TokenLogprobs


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """For each row the logprob and rank of its token, and the `tops[row]` likeliest tokens.

    `logits` is [rows, vocabulary] float32, not written to. Log-softmax in float64, natural logarithm. Equal
    logits rank by id, the lowest first, so the greedy token always has rank 1.
    """
    if not tokens:
        return []
    device, vocabulary = logits.device, logits.shape[1]
    mass = logits.double().logsumexp(-1)
    chosen = torch.tensor(tokens, device=device).unsqueeze(1)
    own = logits.gather(1, chosen)
    before = (logits == own) & (torch.arange(vocabulary, device=device) < chosen)
    ranks = ((logits > own).sum(-1) + before.sum(-1) + 1).tolist()
    own_logprobs = (own.squeeze(1).double() - mass).tolist()
    ids, logprobs = _likeliest(logits, mass, min(max(tops), vocabulary))
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(ids[row][:top], logprobs[row][:top], strict=True)))
        for row, (token, logprob, rank, top) in enumerate(zip(tokens, own_logprobs, ranks, tops, strict=True))
    ]


def _likeliest(
    logits: torch.Tensor, mass: torch.Tensor, count: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and logprobs of the `count` highest logits of each row, equals by id."""
    if not count:
        return [[] for _ in logits], [[] for _ in logits]
    threshold = logits.topk(count, dim=-1).values[:, -1:]
    # topk leaves the order of equals open, also of those at the cut: take all of them, order by id, then
    # stable by value.
    widest = int((logits >= threshold).sum(-1).max())
    ids = logits.topk(widest, dim=-1).indices.sort(-1).values
    ordered = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    values = ordered.values[:, :count].double() - mass.unsqueeze(1)
    found: list[list[int]] = ids.gather(1, ordered.indices)[:, :count].tolist()
    logprobs: list[list[float]] = values.tolist()
    return found, logprobs
