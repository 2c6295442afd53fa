"""A foreign gRPC client that knows no proto of ours: reflection alone has to do."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from stack import stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.types import Role

pytestmark = [pytest.mark.full, pytest.mark.timeout(180)]

BUF = "@bufbuild/buf@1.75.0"


@pytest.fixture(scope="module")
def buf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `buf` command, from its npm package."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is missing: it installs buf, the foreign client")
    return tmp_path_factory.mktemp("buf")


async def run(*command: str | Path, folder: Path) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *map(str, command), cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_buf_curl_generates_through_reflection(buf: Path, tiny_model: Path, redis: RedisServer) -> None:
    status, _, err = await run("npm", "install", "--no-save", "--silent", BUF, folder=buf)
    assert status == 0, err
    curl = (buf / "node_modules/.bin/buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge")
    workers = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    async with stack(tiny_config(tiny_model, redis), workers) as running:
        assert running.router is not None
        url = f"http://127.0.0.1:{running.router.port}"
        _, methods, _ = await run(*curl, "--list-methods", url, folder=buf)
        assert "pdserve.v1.Inference/Generate" in methods
        assert "grpc.health.v1.Health/Check" in methods
        sampling = {"maxTokens": 3, "ignoreEos": True}
        body = json.dumps({"text": "once upon a time, long ago", "sampling": sampling})
        status, out, err = await run(*curl, "-d", body, f"{url}/pdserve.v1.Inference/Generate", folder=buf)
        assert status == 0, err
        chunks = out.replace("}\n{", "},{")
        tokens = [token for chunk in json.loads(f"[{chunks}]") for token in chunk["tokenIds"]]
        assert len(tokens) == 3
        status, _, err = await run(*curl, "-d", "{}", f"{url}/pdserve.v1.Inference/Generate", folder=buf)
        assert status != 0
        assert "invalid_argument" in err
        assert "the prompt is empty" in err
