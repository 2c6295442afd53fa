"""The whole cluster on Ray, as a user starts it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import grpc
import pytest
from parity import assert_equal_to_references, in_flight, one_at_a_time
from references import QUICK, QUICK_TOKENS, references
from served import PDSERVE, Served

from pdserve.client import AsyncClient, Client
from pdserve.proto import admin_pb2, admin_pb2_grpc

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Served]:
    """1 prefill + 1 decode worker of the demo model in float32."""
    shape = ("--prefill", "1", "--decode", "1", "--pool-blocks", "512")
    served = Served("--dtype", "float32", "--disaggregation", "always", *shape)
    try:
        yield served
    finally:
        status = served.stop()
        left = served.left_behind()
        assert status == 0, served.log[-4000:]
        assert not left, left


def test_the_demo_tells_who_did_what_and_its_ledger_adds_up() -> None:
    done = subprocess.run(
        [PDSERVE, "demo", "--json", "--max-tokens", "16"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["text"].strip()
    assert record["tokens"] > 0
    assert record["prefill_pid"] != record["decode_pid"]
    assert record["transport"] == "shm"
    assert record["blocks_moved"] > 0
    assert record["bytes_moved"] > 0
    parts = record["ledger_ms"]
    assert min(parts.values()) >= 0, parts
    assert sum(parts.values()) == pytest.approx(record["ttft_ms"], abs=1.0)
    assert parts["network"] <= 0.1 * record["ttft_ms"] + 5.0, parts


async def test_greedy_tokens_over_ray_equal_transformers(cluster: Served) -> None:
    cases = references(QUICK)
    async with AsyncClient(cluster.target, timeout=120) as client:
        assert_equal_to_references(await one_at_a_time(client, cases, QUICK_TOKENS), cases, QUICK_TOKENS)
        again = await in_flight(client, cases, QUICK_TOKENS)
    assert_equal_to_references(again, cases, QUICK_TOKENS)
    assert sum(result.route.blocks_reused for result in again) > 0


@pytest.mark.full
@pytest.mark.timeout(600)
async def test_the_full_matrix_over_ray_equals_transformers(cluster: Served) -> None:
    cases = references()
    async with AsyncClient(cluster.target, timeout=600) as client:
        assert_equal_to_references(await one_at_a_time(client, cases, 64), cases, 64)
        assert_equal_to_references(await in_flight(client, cases, 64), cases, 64)
    print(f"\nover Ray: {len(cases)} prompts x 64 tokens equal transformers, alone and in flight")


def test_a_killed_worker_comes_back_as_another_incarnation(cluster: Served) -> None:
    case = references(QUICK)[0]
    with Client(cluster.target, timeout=120) as client:
        before = client.generate(token_ids=case.prompt, max_tokens=4, ignore_eos=True)
        assert before.route.decode_pid in cluster.record["pids"]["decode"]
        os.kill(int(before.route.decode_pid or 0), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while True:
            workers = {worker.worker: worker for worker in client.status().workers}
            decode = workers.get("decode-0")
            back = decode is not None and decode.state == "ready"
            if back and decode is not None and decode.incarnation != before.route.decode_incarnation:
                break
            assert time.monotonic() < deadline, cluster.log[-4000:]
            time.sleep(0.1)
        after = client.generate(token_ids=case.prompt, max_tokens=QUICK_TOKENS, ignore_eos=True)
        assert list(after.token_ids) == case.completion[:QUICK_TOKENS]
        assert after.route.decode_incarnation != before.route.decode_incarnation
        cluster.record["pids"]["decode"].append(int(after.route.decode_pid or 0))


def test_members_are_added_drained_and_removed_while_streams_run(cluster: Served) -> None:
    case = references(QUICK)[0]
    with (
        Client(cluster.target, timeout=120) as client,
        grpc.insecure_channel(cluster.record["admin"]) as channel,
    ):
        admin = admin_pb2_grpc.AdminStub(channel)
        with client.generate(token_ids=case.prompt, max_tokens=64, ignore_eos=True, stream=True) as stream:
            added = admin.AddMember(admin_pb2.AddMemberRequest(role="decode"), timeout=100).member
            cluster.record["pids"]["decode"].append(added.pid)
            assert added.state == "ready"
            removed = admin.RemoveMember(admin_pb2.RemoveMemberRequest(worker="decode-0"), timeout=60)
            assert removed.failed_requests == 0
            tokens = [token for chunk in stream for token in chunk.token_ids]
        assert tokens == case.completion
        result = client.generate(token_ids=case.prompt, max_tokens=8, ignore_eos=True)
        assert result.route.decode_worker == added.worker
        listed = subprocess.run(
            [PDSERVE, "members", "list", "--admin", cluster.record["admin"]],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert listed.returncode == 0, listed.stderr
        assert added.worker in listed.stdout
        assert "decode-0" not in listed.stdout
