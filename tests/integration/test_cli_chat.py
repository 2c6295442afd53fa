"""`pdserve chat` in a pseudo-terminal, against a real cluster."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from served import PDSERVE
from stack import Stack, stack, tiny_config
from terminal import Terminal

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.types import Role
from pdserve.workers.seams import Seams

WAIT_S = 20.0
WORKERS = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
LONG = 1500
"""Tokens that no test waits for."""
FLAGS = ("--max-tokens", "40", "--ignore-eos", "--stats")


class Gate:
    """A runner of D whose steps stop, once armed, until they are let go."""

    def __init__(self) -> None:
        self._free_steps: int | None = None
        self.steps_since = 0
        """Steps since it was armed."""
        self.stopped = threading.Event()
        self.let_go = threading.Event()

    def arm(self, free_steps: int) -> None:
        self._free_steps, self.steps_since = free_steps, 0

    def around(self, inner: Any) -> "Gate":
        self._inner = inner
        return self

    def run(self, *arguments: Any, **named: Any) -> Any:
        self.steps_since += 1
        if self._free_steps is not None:
            self._free_steps -= 1
            if self._free_steps < 0:
                self._free_steps = None
                self.stopped.set()
                assert self.let_go.wait(WAIT_S)
        return self._inner.run(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


async def answers(running: Stack, messages: list[dict[str, str]]) -> str:
    """What the SDK gets for the same conversation."""
    assert running.client is not None
    return (await running.client.generate(messages=messages, max_tokens=40, ignore_eos=True)).text


def target_of(running: Stack) -> str:
    assert running.router is not None
    return f"127.0.0.1:{running.router.port}"


async def test_two_turns_a_cancelled_answer_and_a_last_turn(
    tiny_model: Path, redis: RedisServer, tmp_path: Path
) -> None:
    gate = Gate()
    saved = tmp_path / "chat.json"
    seams = {"decode-0": Seams(runner=gate.around)}
    async with stack(tiny_config(tiny_model, redis), WORKERS, seams=seams) as running:

        def talk(chat: Terminal) -> None:
            chat.expect("/help", "> ")
            chat.line("tell me a story")
            chat.expect("prefill prefill-0, decode decode-0, 2 blocks over inproc]", "> ")
            chat.line("and another one")
            chat.expect("decode decode-0", "> ")
            chat.line(f"/params max_tokens={LONG}")
            chat.expect(f"max_tokens={LONG}", "> ")
            gate.arm(free_steps=30)
            chat.line("a third, please")
            assert gate.stopped.wait(WAIT_S)  # D is in the middle of the answer, and stays there
            chat.interrupt()
            chat.expect("(cancelled)", "> ")
            gate.let_go.set()
            chat.line("/params max_tokens=40")
            chat.expect("max_tokens=40", "> ")

        with Terminal(PDSERVE, "chat", "--target", target_of(running), *FLAGS, "--no-history") as chat:
            await asyncio.to_thread(talk, chat)
            await running.settled()  # the program lives, the answer's blocks are free
            assert gate.steps_since < LONG / 2  # D gave up, it did not go on to the end

            def leave() -> tuple[int, str]:
                chat.line("go on")
                chat.expect("decode decode-0", "> ")
                chat.line(f"/save {saved}")
                chat.expect("(written to", "> ")
                chat.end_input()
                return chat.ended()

            status, printed = await asyncio.to_thread(leave)
        assert status == 0
        assert "Traceback" not in printed
        messages = json.loads(saved.read_text())["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * 4
        # Greedy in float32: the program's answers are those of the conversation that it saved.
        for end in (1, 3, 7):
            assert messages[end]["content"] == await answers(running, messages[:end])
        whole = await answers(running, messages[:5])
        assert messages[5]["content"]
        assert whole.startswith(messages[5]["content"])
        assert whole != messages[5]["content"]


async def test_ctrl_c_twice_leaves_and_the_history_is_kept(
    tiny_model: Path, redis: RedisServer, tmp_path: Path
) -> None:
    state = {"XDG_STATE_HOME": str(tmp_path)}
    async with stack(tiny_config(tiny_model, redis), {"mixed-0": Role.MIXED}) as running:
        command = (PDSERVE, "chat", "--target", target_of(running), *FLAGS)

        def first() -> tuple[int, str]:
            with Terminal(*command, env=state) as chat:
                chat.expect("> ")
                chat.line("/system remember me")
                chat.expect("(the system prompt is set)", "> ")
                chat.type("never sent")
                chat.expect("never sent")
                chat.interrupt()
                chat.expect("(Ctrl-C once more", "> ")
                chat.type("nor this")
                chat.expect("nor this")
                chat.interrupt()  # the second in a row, but not at an empty prompt
                chat.expect("(Ctrl-C once more", "> ")
                chat.interrupt()
                return chat.ended()

        def second() -> tuple[int, str]:
            with Terminal(*command, env=state) as chat:
                chat.expect("> ")
                chat.type("\x1b[A\r")  # the arrow up
                chat.expect("/system remember me", "(the system prompt is set)", "> ")
                chat.end_input()
                return chat.ended()

        for session in (first, second):
            status, printed = await asyncio.to_thread(session)
            assert status == 0
            assert "Traceback" not in printed
        history = tmp_path / "pdserve" / "chat_history"
        assert history.read_text().splitlines() == ["/system remember me"] * 2
        assert history.stat().st_mode & 0o777 == 0o600


async def run_cli(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    """One command without a terminal: its status, output and errors."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(PDSERVE, *arguments, stdin=pipe, stdout=pipe, stderr=pipe)
    out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_without_a_terminal_a_full_context_ends_no_conversation(
    tiny_model: Path, redis: RedisServer
) -> None:
    async with stack(tiny_config(tiny_model, redis), {"mixed-0": Role.MIXED}) as running:
        target = ("--target", target_of(running))
        long = "long " * 500
        status, out, err = await run_cli("chat", *target, *FLAGS, stdin=f"hello\n{long}\nstill there?\n")
        assert status == 0
        turns = [{"role": "user", "content": "hello"}]
        turns.append({"role": "assistant", "content": await answers(running, turns)})
        last = await answers(running, [*turns, {"role": "user", "content": "still there?"}])
        assert out == f"{turns[1]['content']}\n{last}\n"
        assert "\x1b" not in err
        tokens = len(await running.client.tokenize(messages=[*turns, {"role": "user", "content": long}]))
        assert f"has {tokens} tokens, the answer wants 40, the context holds 2048: /reset" in err


@pytest.mark.parametrize("as_json", [False, True])
async def test_generate_and_status_are_the_sdks(
    tiny_model: Path, redis: RedisServer, tmp_path: Path, as_json: bool
) -> None:
    prompt = "once upon a time there was a cluster of workers"
    (tmp_path / "prompt").write_text(prompt)
    flags = ("--max-tokens", "8", "--ignore-eos", *(["--json"] if as_json else []))
    async with stack(tiny_config(tiny_model, redis), WORKERS) as running:
        assert running.client is not None
        target = ("--target", target_of(running))
        file = ("--file", str(tmp_path / "prompt"))
        status, out, _ = await run_cli("generate", *flags, *file, *target)
        assert status == 0
        expected = await running.client.generate(prompt, max_tokens=8, ignore_eos=True)
        assert (json.loads(out)["text"] if as_json else out.removesuffix("\n")) == expected.text
        await running.settled()
        status, out, _ = await run_cli("status", "--json", *target)
        assert status == 0
        seen = {worker["worker"]: worker for worker in json.loads(out)["workers"]}
        assert seen.keys() == WORKERS.keys()
        (moved,) = seen["decode-0"]["transports"]
        assert (moved["transport"], seen["prefill-0"]["transports"]) == ("inproc", [])
        assert (moved["pairs"], moved["falls"]) == (1, 0)
        assert moved["chunks"] > 0
        assert moved["bytes"] > 0
        blocks = seen["decode-0"]["blocks"]
        assert blocks["free"] + blocks["cached"] == blocks["total"]
