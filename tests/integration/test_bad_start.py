"""What a start is refused for, before anything serves: one line that names the file or the port."""

import dataclasses
import json
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from stack import RouterSeams, Stack, tiny_config

from pdserve.cluster.redis_server import RedisServer, start_redis
from pdserve.core.catalog import resolve_model
from pdserve.core.errors import ConfigError, Unavailable
from pdserve.workers.model_host import ModelHost
from pdserve.workers.spec import WorkerSpec

WEIGHTS = "model.safetensors"


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return damage


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def without_a_shard(folder: Path) -> None:
    """The index names two files, one is there."""
    with safe_open(folder / WEIGHTS, "pt") as reader:
        names = list(reader.keys())
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    weight_map = dict.fromkeys(names, "one.safetensors") | {names[0]: "two.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def damaged_gguf(content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        (folder / "tiny.gguf").write_bytes(content)

    return damage


def with_more_tokens(folder: Path) -> None:
    """A tokenizer whose last token the model has no row for."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["surplus"] = 300
    file.write_text(json.dumps(tokenizer))


GGUF_HEADER = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(without(WEIGHTS), "neither model.safetensors nor", id="no weights"),
        pytest.param(without_a_shard, r"two\.safetensors, which is not in the folder", id="a missing shard"),
        pytest.param(cut(WEIGHTS, 0.7), r"model\.safetensors, truncated", id="truncated weights"),
        pytest.param(cut(WEIGHTS, 0.0), r"model\.safetensors, truncated", id="empty weights"),
        pytest.param(without("config.json"), "has no config.json", id="no configuration"),
        pytest.param(written("config.json", b"{"), r"config\.json", id="a broken configuration"),
        pytest.param(written("config.json", b"\xff"), r"config\.json", id="a configuration in no UTF-8"),
        pytest.param(without("tokenizer.json"), "tokenizer", id="no tokenizer"),
        pytest.param(written("tokenizer.json", b"{}"), r"tokenizer\.json", id="a broken tokenizer"),
        pytest.param(with_more_tokens, "tokenizer.*301.*257", id="a tokenizer that does not match"),
        pytest.param(damaged_gguf(b"GGML"), r"tiny\.gguf", id="no GGUF"),
        pytest.param(damaged_gguf(b""), r"tiny\.gguf", id="an empty GGUF"),
        pytest.param(damaged_gguf(GGUF_HEADER), r"tiny\.gguf", id="a truncated GGUF"),
        pytest.param(damaged_gguf(GGUF_HEADER + b"\xff" * 64), r"tiny\.gguf", id="a damaged GGUF"),
    ],
)
def test_a_damaged_model_is_one_line_that_names_it(
    tiny_model: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    with pytest.raises(ConfigError, match=says) as refused:
        ModelHost.load(WorkerSpec(worker="mixed-0", role="mixed", model=str(folder)))
    message = refused.value.message
    assert str(folder) in message
    assert len(message.splitlines()) == 1


def test_the_model_that_was_copied_is_whole(tiny_model: Path) -> None:
    assert resolve_model(str(tiny_model)) == tiny_model
    ModelHost.load(WorkerSpec(worker="mixed-0", role="mixed", model=str(tiny_model)))


def test_a_redis_that_does_not_answer_is_one_line_without_the_password() -> None:
    with pytest.raises(Unavailable, match=r"did not answer within 0\.2 s.*index\.redis_url") as refused:
        start_redis("redis://:secret@127.0.0.1:1/0", deadline_s=0.2)
    assert len(refused.value.message.splitlines()) == 1
    assert "secret" not in refused.value.message


@pytest.mark.parametrize("key", ["grpc_port", "http_port"])
async def test_a_taken_port_is_named_and_nothing_is_left_listening(
    tiny_model: Path, redis: RedisServer, key: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        port, other = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        ports = {"grpc_port": other, "http_port": other, key: port}
        config = tiny_config(tiny_model, redis)
        config = dataclasses.replace(config, router=dataclasses.replace(config.router, **ports))
        running = Stack(config)
        try:
            with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}.*router\.{key}"):
                await running.start_router(RouterSeams())
        finally:
            await running.close()
        socket.create_server(("127.0.0.1", other)).close()  # raises where somebody still listens
