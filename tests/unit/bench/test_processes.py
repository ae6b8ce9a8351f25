"""Children of a suite: the ready line, the conversation, and how a failure is told."""

from __future__ import annotations

import os
import sys

import psutil
import pytest

from bench.machine import cores
from bench.processes import PeerFailed, Process

ECHO = """
import sys
print('{"event": "ready", "grpc": "127.0.0.1:1"}', flush=True)
for line in sys.stdin:
    print(line.strip().upper(), flush=True)
"""


def python(code: str) -> Process:
    return Process("child", [sys.executable, "-c", code], core=cores()[0])


def test_a_child_is_ready_answers_and_is_ended() -> None:
    with python(ECHO) as child:
        assert child.target == "127.0.0.1:1"
        assert child.ask("hello", 10) == "HELLO"
        assert child.ask("again", 10) == "AGAIN"
        (pid,) = child.pids
        assert pid != os.getpid()
    assert not psutil.pid_exists(pid)


def test_a_child_that_ends_early_is_quoted() -> None:
    with (
        pytest.raises(PeerFailed, match=r"(?s)child ended; its last words:.*no such port"),
        python("import sys; sys.exit('no such port')"),
    ):
        pass


def test_a_child_that_says_something_else_is_refused() -> None:
    with pytest.raises(PeerFailed, match="said 'hello' instead of its ready line"), python("print('hello')"):
        pass


def test_a_child_that_does_not_answer_is_not_waited_for() -> None:
    silent = ECHO.replace("print(line.strip().upper(), flush=True)", "pass")
    with python(silent) as child, pytest.raises(PeerFailed, match="did not answer within 0 s"):
        child.ask("hello", 0.1)


def test_a_child_that_has_died_is_told_when_asked() -> None:
    dying = ECHO.replace("print(line.strip().upper(), flush=True)", "sys.exit('cannot go on')")
    with python(dying) as child, pytest.raises(PeerFailed, match=r"(?s)ended; its last words:.*cannot go on"):
        child.ask("hello", 10)
