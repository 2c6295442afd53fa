"""Every error has one status, and says whether a retry can help."""

import grpc
import pytest

from pdserve.core import errors
from pdserve.proto import worker_pb2
from pdserve.router.status import abort, from_failure, status_code, trailing_metadata


def every_error() -> list[type[errors.PdserveError]]:
    """All kinds that the imports so far define and that are made from a message alone."""
    found, todo = [], [errors.PdserveError]
    while todo:
        kind = todo.pop()
        if kind.__init__ is errors.PdserveError.__init__:
            found.append(kind)
        todo += kind.__subclasses__()
    return found


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_and_says_whether_to_retry(kind: type[errors.PdserveError]) -> None:
    error = kind("why")
    assert status_code(error).value[0] == error.grpc_code
    assert dict(trailing_metadata(error)) == {"retriable": "true" if kind.retriable else "false"}


def test_a_retry_after_travels_in_seconds() -> None:
    error = errors.Overloaded("full", retry_after_s=0.25)
    assert dict(trailing_metadata(error)) == {"retriable": "true", "retry-after-s": "0.25"}


def test_a_workers_failure_keeps_code_message_and_retriability() -> None:
    failure = worker_pb2.Failure(code=14, message="gone", retriable=False, retry_after_s=2.0)
    error = from_failure(failure)
    assert isinstance(error, errors.Unavailable)
    assert (error.message, error.retriable, error.retry_after_s) == ("gone", False, 2.0)
    assert from_failure(worker_pb2.Failure(code=13, retriable=True)).retriable
    assert not errors.InternalError.retriable


async def test_a_foreign_error_is_internal() -> None:
    class Context:
        async def abort(self, code: grpc.StatusCode, details: str, metadata: object) -> None:
            raise RuntimeError(code, details, metadata)

    with pytest.raises(RuntimeError) as ended:
        await abort(Context(), KeyError("x"))  # type: ignore[arg-type]
    assert ended.value.args == (grpc.StatusCode.INTERNAL, "KeyError: 'x'", (("retriable", "false"),))
