"""`pdserve chat` from a pipe: what is said reaches the cluster, what goes wrong ends nothing."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_cluster import CONTEXT_TOKENS, SEED_THAT_FAILS, FakeCluster

from pdserve.cli.app import run
from pdserve.cli.chat_input import ChatInput, history_file
from pdserve.core.errors import InvalidRequest

ANSWER = "Grüß Gott"
Type = Callable[..., int]


@pytest.fixture
def chat(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Run a chat whose user types these lines."""

    def type_lines(*lines: str, flags: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run(["chat", "--target", cluster.target, *flags])

    return type_lines


def said(cluster: FakeCluster) -> list[list[tuple[str, str]]]:
    """The messages of every request."""
    return [[(m.role, m.content) for m in request.chat.messages] for request in cluster.asked]


def test_every_turn_carries_the_conversation(
    cluster: FakeCluster, chat: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("one", "", "two", flags=("--system", "be brief", "--top-k", "3")) == 0
    system, first = ("system", "be brief"), [("user", "one"), ("assistant", ANSWER)]
    assert said(cluster) == [[system, ("user", "one")], [system, *first, ("user", "two")]]
    assert all(request.sampling.top_k == 3 and request.model == "tiny" for request in cluster.asked)
    printed = capsys.readouterr()
    assert printed.out == f"{ANSWER}\n{ANSWER}\n"  # answers alone, for another program
    assert printed.err == ""


def test_commands_change_the_conversation(
    cluster: FakeCluster, chat: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("one", "/reset", "/system  be kind", "two", "/system", "//three", "/quit", "never sent")
    assert chat(*lines) == 0
    assert said(cluster) == [
        [("user", "one")],
        [("system", "be kind"), ("user", "two")],
        [("user", "two"), ("assistant", ANSWER), ("user", "/three")],
    ]
    assert "a new conversation" in capsys.readouterr().err


def test_help_names_every_command(chat: Type, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("/help", "/hlep") == 0
    *shown, wrong = capsys.readouterr().err.splitlines()
    for command in ("/reset", "/system", "/save", "/params", "/help", "/quit"):
        assert any(line.startswith(command) for line in shown)
    assert wrong.startswith("pdserve: no command /hlep: /help lists them")


def test_params_change_how_the_next_answers_are_sampled(
    cluster: FakeCluster, chat: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = '/params top_k= max_tokens=7 temperature=0.5 stop=["a","b"]'
    assert (
        chat("one", changes, "two", "/params nonsense=1", "/params top_p=high", "x", flags=("--top-k", "3"))
        == 0
    )
    first, second = (request.sampling for request in cluster.asked)
    assert (first.top_k, first.HasField("max_tokens")) == (3, False)
    assert (second.HasField("top_k"), second.max_tokens, second.temperature) == (False, 7, 0.5)
    assert list(second.stop) == ["a", "b"]
    printed = capsys.readouterr().err
    assert 'max_tokens=7 temperature=0.5 stop=["a", "b"]' in printed
    assert "pdserve: cannot set nonsense=1: write NAME=VALUE, names are " in printed
    assert "pdserve: the request cannot be encoded" in printed  # what no field can hold is said, and not sent


def test_what_is_saved_is_the_conversation(
    chat: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chat.json"
    assert chat("one", f"/save {file}", "/save", f"/save {tmp_path}", flags=("--system", "s")) == 0
    assert json.loads(file.read_text())["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": ANSWER},
    ]
    printed = capsys.readouterr().err.splitlines()
    assert printed[1:] == [
        "pdserve: /save needs a file: /save chat.json",
        f"pdserve: cannot write {tmp_path}: Is a directory",
    ]


def test_messages_may_have_several_lines(cluster: FakeCluster, chat: Type) -> None:
    assert (
        chat("one\\", "two\\", "three", '"""', "  four", "", 'five"""', '"""six"""', '"""seven', "end") == 0
    )
    users = [messages[-1][1] for messages in said(cluster)]
    assert users == ["one\ntwo\nthree", "  four\n\nfive", "six", "seven\nend"]


def test_an_answer_that_breaks_stays_as_far_as_it_came(
    cluster: FakeCluster, chat: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("one", "/params seed=1", "two", flags=("--seed", str(SEED_THAT_FAILS))) == 0
    assert said(cluster)[1] == [("user", "one"), ("assistant", "Grüß "), ("user", "two")]
    printed = capsys.readouterr()
    assert "pdserve: decode-0 died" in printed.err.splitlines()
    assert printed.out == f"Grüß \n{ANSWER}\n"


def test_a_full_context_is_explained_and_the_message_is_not_kept(
    cluster: FakeCluster, chat: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.prompt_tokens = CONTEXT_TOKENS + 1
    assert chat("one", "two", flags=("--max-tokens", "9")) == 0
    assert said(cluster)[1] == [("user", "two")]
    shown = capsys.readouterr().err.splitlines()[:3]
    assert shown[0] == "pdserve: that is too much"
    assert "has 101 tokens, the answer wants 9, the context holds 100: /reset" in shown[1]
    assert "not part of the conversation" in shown[2]


def test_an_answer_that_fills_the_context_says_so(
    cluster: FakeCluster, chat: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.finish_reason, cluster.prompt_tokens = "length", CONTEXT_TOKENS - 2
    assert chat("one") == 0
    assert "the context is full: 100 of 100 tokens; /reset" in capsys.readouterr().err
    cluster.prompt_tokens = 5
    assert chat("one") == 0
    assert "stopped after 2 tokens" in capsys.readouterr().err


def test_stats_say_who_did_what(chat: Type, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("one", flags=("--stats",)) == 0
    printed = capsys.readouterr().err
    assert "1 tokens in, 0 of them cached; 2 out; " in printed
    assert "tokens/s, first token after " in printed
    assert "prefill prefill-0, decode decode-0, 3 blocks over shm]" in printed


def test_an_unknown_model_is_refused_before_anything_is_typed(
    chat: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("one", flags=("--model", "huge")) == 1
    assert capsys.readouterr().err == "pdserve: model 'huge' is not served: name one of tiny with --model\n"


def test_a_cluster_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--target", "127.0.0.1:1", "--timeout", "0.5"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pdserve: ")


def test_input_that_is_not_utf8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        ChatInput(None).read()


@pytest.mark.parametrize(
    ("environment", "folder"),
    [({"XDG_STATE_HOME": "/state"}, "/state"), ({"XDG_STATE_HOME": "state"}, None), ({}, None)],
)
def test_the_history_lies_in_the_state_folder(environment: dict[str, str], folder: str | None) -> None:
    expected = Path(folder or "/home/me/.local/state") / "pdserve" / "chat_history"
    assert history_file(environment, Path("/home/me")) == expected
