"""What the engine is given for a request: its choices, or first the prompt that they fork from."""

import dataclasses

from pdserve.core.seed import derive_seed
from pdserve.core.types import OwnerId, SequenceId, hit_limit
from pdserve.workers.choice import ChoiceStart
from pdserve.workers.decode_request import DecodeAsk
from pdserve.workers.engine.debt import Debt
from pdserve.workers.engine.messages import SequenceSpec


def prompt_spec(ask: DecodeAsk, owner: OwnerId) -> SequenceSpec:
    """Prefill only: the positions that all choices have in common, which are all but the last."""
    return SequenceSpec(
        sequence_id=SequenceId(f"{ask.request_id}/prompt"),
        owner=owner,
        token_ids=ask.token_ids[:-1],
        chain=ask.chain[: hit_limit(len(ask.token_ids))],
        namespace=ask.namespace,
        sampling=None,
    )


def choice_spec(ask: DecodeAsk, choice: int, start: ChoiceStart, debt: Debt) -> SequenceSpec:
    """One choice, which samples with a seed of its own. `debt` is the request's."""
    return SequenceSpec(
        sequence_id=SequenceId(f"{ask.request_id}/{choice}"),
        owner=start.owner,
        token_ids=ask.token_ids,
        chain=ask.chain,
        namespace=ask.namespace,
        sampling=dataclasses.replace(ask.sampling, seed=derive_seed(ask.sampling.seed, choice), n=1),
        num_computed=start.num_computed,
        debt=debt,
    )
