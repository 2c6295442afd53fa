"""Ray's wrapping of errors ends at the cluster's border."""

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError

from pdserve.cluster.actors import from_ray
from pdserve.cluster.ray_runtime import RayRuntime
from pdserve.core.errors import ConfigError, InternalError, Unavailable, WorkerLost


def wrapped(cause: Exception) -> RayTaskError:
    return RayTaskError("start", "a long traceback", cause).as_instanceof_cause()


def test_an_error_of_ours_inside_an_actor_arrives_as_it_was_raised() -> None:
    cause = ConfigError("no weights in /models/x")
    assert from_ray("decode-0", wrapped(cause)) is cause


def test_any_other_error_inside_an_actor_is_a_defect_with_its_own_words() -> None:
    error = from_ray("decode-0", wrapped(KeyError("layers")))
    assert type(error) is InternalError
    assert error.message == "KeyError: 'layers'"


def test_a_dead_actor_is_a_lost_worker() -> None:
    error = from_ray("decode-0", ActorDiedError())
    assert type(error) is WorkerLost
    assert error.message == "the process of decode-0 died"


def test_a_ray_that_does_not_answer_is_unavailable() -> None:
    assert type(from_ray("decode-0", GetTimeoutError("late"))) is Unavailable


@pytest.mark.parametrize("address", ["ray://head:10001", "nonsense", "host:port"])
def test_a_wrong_ray_address_is_a_configuration_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.raises(ConfigError, match="host:port"):
        RayRuntime(address).start()


def test_a_ray_address_where_nobody_listens_is_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.raises(Unavailable, match="no Ray answers at 127"):
        RayRuntime("127.0.0.1:1").start()
