"""What a configuration lays open is said before it is."""

import pytest

from pdserve.core.config import RouterConfig, SecurityConfig, ServeConfig
from pdserve.core.security.exposure import exposures, is_loopback


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("router.example", False),
    ],
)
def test_loopback_is_known_by_its_addresses(host: str, inside: bool) -> None:
    assert is_loopback(host) is inside


def test_the_default_listens_on_loopback_and_needs_no_warning() -> None:
    assert is_loopback(ServeConfig().router.host)
    assert exposures(ServeConfig()) == ()


@pytest.mark.parametrize(
    ("security", "says"),
    [
        (SecurityConfig(), ["plain text", "may use this cluster"]),
        (SecurityConfig(tokens_file="t"), ["plain text"]),
        (SecurityConfig(tls_dir="d"), ["may use this cluster"]),
        (SecurityConfig(tls_dir="d", tokens_file="t"), []),
        (SecurityConfig(tls_dir="d", client_certificates=True), []),
    ],
)
def test_beyond_loopback_each_missing_protection_is_one_warning(
    security: SecurityConfig, says: list[str]
) -> None:
    warnings = exposures(ServeConfig(router=RouterConfig(host="0.0.0.0"), security=security))
    assert len(warnings) == len(says)
    assert all(part in warning for part, warning in zip(says, warnings, strict=True))


def test_workers_on_a_shared_ray_are_part_of_the_warning() -> None:
    config = ServeConfig(router=RouterConfig(host="10.0.0.1"), ray_address="auto")
    assert "workers obey" in exposures(config)[0]
