"""A redis with a password, and over TLS: used, and never told of."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from locked_redis import PASSWORD, locked_redis, tls_front

from pdserve.cli.app import run
from pdserve.cluster.redis_server import start_redis
from pdserve.core.config import IndexConfig, ServeConfig
from pdserve.core.errors import PdserveError
from pdserve.core.security.dev_certs import make_certificates
from pdserve.kvtransfer.index.base import IndexUnavailable
from pdserve.kvtransfer.index.link import RedisLink
from pdserve.kvtransfer.index.redis_membership import RedisMembership


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with locked_redis() as port:
        yield port


async def members(url: str) -> int:
    link = RedisLink(url)
    try:
        return len((await RedisMembership(link).listing()).members)
    finally:
        await link.close()


async def test_the_password_of_the_url_is_used(port: int) -> None:
    assert await members(f"redis://:{PASSWORD}@127.0.0.1:{port}/0") == 0
    with pytest.raises(IndexUnavailable):
        await members(f"redis://127.0.0.1:{port}/0")


async def test_a_redis_behind_tls_is_checked_against_the_ca_that_the_url_names(
    port: int, tmp_path: Path
) -> None:
    make_certificates(tmp_path)
    async with tls_front(port, str(tmp_path / "server.pem"), str(tmp_path / "server.key")) as front:
        url = f"rediss://:{PASSWORD}@localhost:{front}/0"
        assert await members(f"{url}?ssl_ca_certs={tmp_path / 'ca.pem'}") == 0
        for wrong in (url, f"{url}?ssl_ca_certs={tmp_path / 'client-ca.pem'}"):
            with pytest.raises(IndexUnavailable, match="certificate verify failed") as refused:
                await members(wrong)
            assert PASSWORD not in refused.value.message


async def test_no_error_log_or_repr_has_the_password(port: int, caplog: pytest.LogCaptureFixture) -> None:
    wrong = f"not-{PASSWORD}"
    with caplog.at_level(logging.DEBUG):
        for url in (f"redis://:{wrong}@127.0.0.1:{port}/0", f"redis://u:{wrong}@127.0.0.1:1/0"):
            with pytest.raises(IndexUnavailable) as refused:
                await members(url)
            assert PASSWORD not in refused.value.message
            with pytest.raises(PdserveError) as at_start:
                start_redis(url, deadline_s=0.1)
            assert PASSWORD not in at_start.value.message
    assert PASSWORD not in caplog.text
    config = ServeConfig(index=IndexConfig(redis_url=url))
    assert PASSWORD not in f"{config} {config!r} {config.index!r}"


def test_the_printed_configuration_has_no_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.toml"
    url = f"rediss://user:{PASSWORD}@redis.example:6379/0?ssl_password={PASSWORD}"
    file.write_text(f"[index]\nredis_url = {json.dumps(url)}\n")
    for arguments in (["config", str(file)], ["config", str(file), "--json"]):
        assert run(arguments) == 0
        shown = capsys.readouterr()
        assert PASSWORD not in shown.out + shown.err
        assert "redis.example:6379" in shown.out
