import io
import json
import socket
import subprocess
import sys
from typing import Any

import pytest
import typer
from fake_cluster import FakeCluster

from pdserve.cli.app import app, run

PROMPT_AND_ANSWER = "Grüß Gott\n"


def test_generate_streams_the_answer(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "hello", "--target", cluster.target, "--max-tokens", "5", "--seed", "3"]) == 0
    assert capsys.readouterr().out == PROMPT_AND_ANSWER
    (request,) = cluster.asked
    assert (request.text, request.sampling.max_tokens, request.sampling.seed) == ("hello", 5, 3)
    assert not request.sampling.HasField("temperature")


def test_generate_reads_standard_input(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    assert run(["generate", "--chat", "--target", cluster.target]) == 0
    (request,) = cluster.asked
    assert [(m.role, m.content) for m in request.chat.messages] == [("user", "from a pipe")]


def test_generate_prints_the_result_as_json(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "hello", "--target", cluster.target, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["token_ids"], result["finish_reason"]) == ("Grüß Gott", [1, 2], "stop")
    assert sum(result["ledger"].values()) == pytest.approx(result["ttft_s"])


def test_a_wrong_command_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fly"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_members_finds_the_admin_service_through_the_router(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["members", "list", "--target", cluster.target]) == 0
    assert "decode-0" in capsys.readouterr().out


def test_members_asks_for_each_change(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    admin = ["--admin", cluster.target]
    assert run(["members", "add", "prefill", "--model", "m", *admin]) == 0
    assert run(["members", "drain", "decode-0", "--grace", "1.5", *admin]) == 0
    assert run(["members", "remove", "decode-0", *admin]) == 0
    assert run(["members", "role", "decode-0", "0.25", *admin]) == 0
    add, drain, remove, role = cluster.asked
    assert (add.role, add.model) == ("prefill", "m")
    assert (drain.worker, drain.grace_s) == ("decode-0", 1.5)
    assert (remove.worker, remove.HasField("grace_s")) == ("decode-0", False)
    assert (role.worker, role.role_weight) == ("decode-0", 0.25)
    printed = capsys.readouterr().out
    assert "prefill-7" in printed
    assert "decode-0 is drained; 2 requests failed" in printed
    assert "decode-0 is removed; 0 requests failed" in printed


def test_a_change_that_is_refused_says_why(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["members", "drain", "decode-9", "--admin", cluster.target]) == 1
    assert capsys.readouterr().err == "pdserve: no worker 'decode-9'\n"


def test_members_of_an_unsupervised_cluster_says_so(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.supervised = False
    assert run(["members", "list", "--target", cluster.target]) == 1
    assert "nobody supervises it" in capsys.readouterr().err


def every_command() -> list[Any]:
    """All commands with what can be given to them, groups included."""
    found, todo = [], [typer.main.get_command(app)]
    while todo:
        command = todo.pop()
        found.append(command)
        todo += getattr(command, "commands", {}).values()
    return found


@pytest.mark.parametrize("command", every_command(), ids=lambda command: command.name)
def test_every_command_and_everything_that_it_takes_has_a_help(command: Any) -> None:
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), parameter.name


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from pdserve.cli.app import run\n"
        "for name in ('serve', 'chat', 'generate', 'status', 'config'):\n"
        "    assert run([name, '--help']) == 0\n"
        "heavy = {'torch', 'ray', 'grpc', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", [["status"], ["generate", "hi"], ["members", "list"], ["chat"]])
def test_without_a_cluster_one_line_says_where_none_answers(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        target = f"127.0.0.1:{nobody.getsockname()[1]}"
        assert run([*command, "--target", target]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("pdserve: no cluster answers (")
    assert target in line


@pytest.mark.parametrize(
    ("target", "says"), [("http://127.0.0.1:8000", "is a URL"), ("somewhere", "no port"), ("", "no port")]
)
def test_a_target_that_is_none_is_refused_at_once(
    target: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["status", "--target", target]) == 1
    assert run(["members", "list", "--admin", target or "x"]) == 1
    complaints = capsys.readouterr().err.splitlines()
    assert len(complaints) == 2
    assert says in complaints[0]
    assert all("host:port" in line for line in complaints)
