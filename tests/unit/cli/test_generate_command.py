"""`pdserve generate`: what is asked for reaches the cluster, and every end has its exit status."""

import io
import json
import sys
from pathlib import Path

import pytest
from fake_cluster import PROMPT_THAT_IS_REFUSED, SEED_THAT_FAILS, SEED_THAT_HANGS, FakeCluster
from served import PDSERVE
from terminal import Terminal

from pdserve.cli.app import run
from pdserve.core.types import SamplingParams

ANSWER = "Grüß Gott\n"


def standard_input(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), "utf-8")


def test_every_option_reaches_the_request(cluster: FakeCluster) -> None:
    values = {
        "max-tokens": "7",
        "min-tokens": "2",
        "temperature": "0.5",
        "top-p": "0.25",
        "top-k": "9",
        "min-p": "0.125",
        "repetition-penalty": "1.5",
        "presence-penalty": "-0.5",
        "frequency-penalty": "0.75",
        "seed": "3",
        "logprobs": "4",
        "n": "2",
    }
    arguments = [part for name, value in values.items() for part in (f"--{name}", value)]
    arguments += ["--logit-bias", "5=-100", "--logit-bias", "6=1.5", "--stop", "a", "--stop", "b"]
    arguments += ["--stop-token", "8", "--ignore-eos", "--model", "tiny"]
    assert run(["generate", "hello", *arguments, "--target", cluster.target, "--json"]) == 0
    (request,) = cluster.asked
    sampling = request.sampling
    for name, value in values.items():
        assert getattr(sampling, name.replace("-", "_")) == float(value), name
    assert dict(sampling.logit_bias) == {5: -100.0, 6: 1.5}
    assert (list(sampling.stop), list(sampling.stop_token_ids)) == (["a", "b"], [8])
    assert (sampling.ignore_eos, request.model) == (True, "tiny")


def test_zero_is_a_value(cluster: FakeCluster) -> None:
    names = ("seed", "temperature", "top_k", "min_p", "logprobs", "min_tokens")
    flags = [part for name in names for part in (f"--{name.replace('_', '-')}", "0")]
    assert run(["generate", "hello", *flags, "--target", cluster.target]) == 0
    (request,) = cluster.asked
    assert all(request.sampling.HasField(name) for name in names)


def test_what_is_not_given_is_left_to_the_cluster(cluster: FakeCluster) -> None:
    assert run(["generate", "hello", "--target", cluster.target]) == 0
    (request,) = cluster.asked
    assert not request.sampling.ListFields()


@pytest.mark.parametrize(
    ("arguments", "kind", "source"),
    [
        (["--json-schema", '{"type": "integer"}'], "json_schema", {"type": "integer"}),
        (["--json-schema", "FILE"], "json_schema", {"type": "string"}),
        (["--choice", "yes", "--choice", "no"], "choice", ["yes", "no"]),
        (["--regex", "[0-9]+"], "regex", "[0-9]+"),
        (["--json-object"], "json_object", ""),
        (["--grammar", "FILE"], "grammar", '{"type": "string"}'),
    ],
)
def test_every_constraint_reaches_the_request(
    cluster: FakeCluster, tmp_path: Path, arguments: list[str], kind: str, source: object
) -> None:
    file = tmp_path / "file"
    file.write_text('{"type": "string"}')
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    assert run(["generate", "hello", *given, "--target", cluster.target]) == 0
    (request,) = cluster.asked
    constraint = request.sampling.constraint
    assert constraint.kind == kind
    assert (constraint.source if isinstance(source, str) else json.loads(constraint.source)) == source


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--regex", "a", "--choice", "b"], "contradict each other"),
        (["--json-schema", "{"], "--json-schema is not JSON"),
        (["--json-schema", "absent.json"], "cannot read absent.json"),
        (["--logit-bias", "five"], "write TOKEN_ID=BIAS"),
        (["--file", "x"], "got a prompt and --file"),
        (["--system", "x"], "--system needs --chat"),
        (["--max-tokens", "many"], "--max-tokens"),
    ],
)
def test_a_wrong_command_line_is_status_2(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(["generate", "hello", *arguments, "--target", cluster.target]) == 2
    printed = capsys.readouterr()
    assert says in " ".join(printed.err.split())
    assert printed.out == ""
    assert not cluster.asked


def test_every_file_is_one_completion(
    cluster: FakeCluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "one").write_text("first")
    (tmp_path / "two").write_text(PROMPT_THAT_IS_REFUSED)
    (tmp_path / "bad").write_bytes(b"\xff")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", standard_input(b"last"))
    files = [part for name in ("one", "two", "bad", "absent", "-") for part in ("--file", name)]
    assert run(["generate", *files, "--json", "--target", cluster.target]) == 1
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [(line["file"], line["text"]) for line in lines] == [("one", "Grüß Gott"), ("-", "Grüß Gott")]
    assert printed.err.splitlines() == [
        "pdserve: two: that is too much",
        "pdserve: bad: bad is not UTF-8, see byte 0: convert it first",
        "pdserve: absent: cannot read absent: No such file or directory",
    ]
    assert [request.text for request in cluster.asked] == ["first", PROMPT_THAT_IS_REFUSED, "last"]


def test_a_chat_has_its_system_prompt_first(cluster: FakeCluster) -> None:
    assert run(["generate", "hi", "--chat", "--system", "be brief", "--target", cluster.target]) == 0
    (request,) = cluster.asked
    messages = [(message.role, message.content) for message in request.chat.messages]
    assert messages == [("system", "be brief"), ("user", "hi")]


def test_choices_are_printed_one_after_the_other(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "hi", "-n", "2", "--target", cluster.target]) == 0
    assert capsys.readouterr().out == f"--- choice 0\n{ANSWER}--- choice 1\n{ANSWER}"


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_cancels_the_request_and_leaves_what_has_arrived(cluster: FakeCluster, as_json: bool) -> None:
    flags = ["--json"] if as_json else []
    arguments = ["generate", "hi", "--seed", str(SEED_THAT_HANGS), "--target", cluster.target, *flags]
    with Terminal(PDSERVE, *arguments, columns=1000) as terminal:
        assert cluster.hangs.wait(20)
        if not as_json:
            terminal.expect("Grüß ")
        terminal.interrupt()
        assert cluster.left.wait(20)
        status, printed = terminal.ended()
    assert status == 130
    assert "Traceback" not in printed
    if as_json:  # nothing was printed before the end
        assert json.loads(printed.replace("^C", ""))["finish_reason"] == "abort"


def test_an_error_after_the_first_text_leaves_that(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "hi", "--target", cluster.target, "--seed", str(SEED_THAT_FAILS)]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("Grüß \n", "pdserve: decode-0 died\n")


def test_a_refused_prompt_leaves_standard_output_empty(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in ([], ["-n", "2"], ["--json"]):
        assert run(["generate", PROMPT_THAT_IS_REFUSED, *flags, "--target", cluster.target]) == 1
        assert capsys.readouterr().out == ""


def test_help_shows_the_defaults_of_the_cluster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["generate", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, default in (("max_tokens", 128), ("temperature", 0), ("top_p", 1), ("n", 1)):
        (line,) = (line for line in lines if line.startswith(f"│ --{name.replace('_', '-')} "))
        assert f"[default: ({default})]" in line
        assert getattr(SamplingParams(), name) == default
