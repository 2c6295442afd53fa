"""A record crosses processes as JSON and comes back the same."""

import json
from dataclasses import replace

import pytest

from pdserve.core.types import Incarnation, Role, WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord

RECORD = WorkerRecord(
    worker=WorkerId("decode-0"),
    incarnation=Incarnation("00ff"),
    role=Role.DECODE,
    model="tiny",
    schema="ab" * 16,
    endpoint="127.0.0.1:4000",
    pid=7,
    context_tokens=2048,
    vocab_size=512,
    dtype="bfloat16",
    pool_blocks=64,
    role_weight=0.0,
)


def test_a_record_survives_json() -> None:
    back = WorkerRecord.from_dict(json.loads(json.dumps(RECORD.to_dict())))
    assert back == RECORD
    assert back.role is Role.DECODE


def test_from_dict_leaves_its_argument_alone() -> None:
    fields = json.loads(json.dumps(RECORD.to_dict()))
    WorkerRecord.from_dict(fields)
    assert type(fields["role"]) is str


def test_a_load_survives_json() -> None:
    load = WorkerLoad(running=3, perf_model={"prefill_base": 0.25})
    assert WorkerLoad.from_dict(json.loads(json.dumps(load.to_dict()))) == load


@pytest.mark.parametrize(
    ("weight", "prefills", "decodes"), [(0.0, False, True), (0.5, True, True), (1.0, True, False)]
)
def test_the_role_weight_says_what_a_worker_may_do(weight: float, prefills: bool, decodes: bool) -> None:
    record = replace(RECORD, role_weight=weight)
    assert (record.prefills, record.decodes) == (prefills, decodes)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_draining_worker_takes_nothing_new(weight: float) -> None:
    record = replace(RECORD, role_weight=weight, draining=True)
    assert (record.prefills, record.decodes) == (False, False)
