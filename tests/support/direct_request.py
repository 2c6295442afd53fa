"""One request straight at a decode worker, with candidates of the test's choice: no router in between."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from pdserve.core.channel_options import CHANNEL_OPTIONS
from pdserve.kvtransfer.names import chain, namespace, pack_chain, pack_tokens
from pdserve.proto import worker_pb2, worker_pb2_grpc

Record = Mapping[str, Any]
"""A worker's ready line."""


async def direct_request(
    owner: Record,
    candidates: Sequence[Record],
    prompt: Sequence[int],
    *,
    name: str,
    tokens: int,
    within_s: float,
) -> tuple[tuple[int, ...], str]:
    """The greedy tokens, and who prefilled. AssertionError where it fails, TimeoutError where it is late."""
    root = namespace(bytes.fromhex(owner["schema"]))
    opening = worker_pb2.OpenRequest(
        request_id=name,
        prompt_token_ids=pack_tokens(prompt),
        chain=pack_chain(chain(root, prompt)),
        namespace=root,
        remaining_s=within_s,
        candidates=[
            worker_pb2.Candidate(worker=c["worker"], incarnation=c["incarnation"], endpoint=c["endpoint"])
            for c in candidates
        ],
    )
    opening.sampling.max_tokens = tokens
    opening.sampling.ignore_eos = True
    async with (
        asyncio.timeout(within_s),
        grpc.aio.insecure_channel(owner["endpoint"], options=CHANNEL_OPTIONS) as channel,
    ):
        call = worker_pb2_grpc.WorkerStub(channel).Session()
        await call.write(worker_pb2.SessionRequest(hello=worker_pb2.SessionHello(router=name)))
        await call.write(worker_pb2.SessionRequest(open=opening))
        got: list[int] = []
        prefilled_by = ""
        async for response in call:
            assert not response.HasField("replace"), f"{name} was refused: {response.replace.reason}"
            for item in response.frame.items:
                assert not item.HasField("failure"), f"{name} failed: {item.failure.message}"
                got += item.token_ids
                prefilled_by = prefilled_by or item.route.prefill_worker
                if item.finish_reason:
                    ack = worker_pb2.AckRequest(request_id=name)
                    await call.write(worker_pb2.SessionRequest(ack=ack))
                    await call.done_writing()
                    return tuple(got), prefilled_by
    raise AssertionError(f"{name}: the session ended before the request")
