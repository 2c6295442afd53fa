"""One tree, mapped once; what is foreign becomes ours in one place."""

import pytest

from pdserve.core import errors
from pdserve.core.errors import (
    Cancelled,
    ContextTooLong,
    DeadlineExceeded,
    GrpcCode,
    InternalError,
    InvalidRequest,
    Overloaded,
    PdserveError,
    Unavailable,
    UnknownModel,
    WorkerLost,
    from_foreign,
    from_wire,
)

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PdserveError)]


@pytest.mark.parametrize("kind", TREE)
def test_every_error_carries_its_message_and_both_mappings(kind: type[PdserveError]) -> None:
    error = kind("what, limit, remedy", retry_after_s=1.5)
    assert (str(error), error.message, error.retry_after_s) == (error.message, "what, limit, remedy", 1.5)
    assert isinstance(error.grpc_code, GrpcCode)
    assert 400 <= error.http_status < 600


@pytest.mark.parametrize("kind", TREE)
def test_only_refusals_and_losses_may_be_retried(kind: type[PdserveError]) -> None:
    retriable = {GrpcCode.UNAVAILABLE, GrpcCode.RESOURCE_EXHAUSTED}
    assert kind.retriable == (kind.grpc_code in retriable)


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        (TimeoutError("slow"), DeadlineExceeded),
        (ConnectionResetError("gone"), Unavailable),
        (MemoryError(), Overloaded),
        (KeyError("defect"), InternalError),
    ],
)
def test_a_foreign_error_becomes_one_of_ours(foreign: BaseException, ours: type[PdserveError]) -> None:
    assert type(from_foreign(foreign)) is ours


def test_an_unmapped_error_keeps_its_name() -> None:
    assert from_foreign(KeyError("where")).message == "KeyError: 'where'"


def test_our_own_errors_pass_unchanged() -> None:
    error = ContextTooLong("too long")
    assert from_foreign(error) is error


@pytest.mark.parametrize("kind", TREE)
def test_the_wire_keeps_what_a_caller_decides_on(kind: type[PdserveError]) -> None:
    error = kind("message", retry_after_s=2.0)
    back = from_wire(error.grpc_code, error.message, error.retry_after_s)
    assert (back.grpc_code, back.message, back.retry_after_s) == (error.grpc_code, "message", 2.0)
    assert back.retriable == error.retriable
    assert issubclass(kind, type(back)) or kind in (WorkerLost, PdserveError)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1, Cancelled), (3, InvalidRequest), (4, DeadlineExceeded), (5, UnknownModel), (8, Overloaded)],
)
def test_the_numbers_are_grpcs(code: int, kind: type[PdserveError]) -> None:
    assert type(from_wire(code, "m")) is kind


def test_an_unknown_code_is_a_defect() -> None:
    assert type(from_wire(99, "m")) is InternalError
