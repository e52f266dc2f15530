"""`mqinfer top` and `status` over a real broker: on a pseudo-terminal and in a pipe, and how one leaves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from command_line import PATIENCE_S, Process, environment

from mqinfer import plan as plans

#: Runs its arguments on a terminal of their own, whose settings it prints before and after.
ON_A_TERMINAL = """\
import os, pty, sys
command = ["sh", "-c", 'trap : INT; stty -g; "$@"; code=$?; stty -g; exit $code', "sh", *sys.argv[1:]]
sys.exit(os.waitstatus_to_exitcode(pty.spawn(command)))
"""
ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"


@pytest.mark.broker
@pytest.mark.parametrize("key", [b"\x03", b"q"], ids=["ctrl-c", "q"])
def test_top_draws_on_the_terminal_and_a_key_leaves_it_as_it_was(
    key: bytes, start: Callable[..., Process], amqp_url: str, pipeline: Path
) -> None:
    where = ("-p", str(pipeline), "--broker", amqp_url)
    start("coordinator", *where).said("actor.ready")
    command = (sys.executable, "-m", "mqinfer", "top", "--interval", "0.2", *where)
    seen = b""
    with (
        subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(TERM="xterm", COLUMNS="120", LINES="40"),
        ) as running,
        ExitStack() as at_the_end,
    ):
        at_the_end.callback(running.kill)  # where the test fails; Popen's own end waits for ever
        assert running.stdin is not None
        assert running.stdout is not None
        while b"no worker serves stage 0, 1" not in seen:  # the test's own time limit ends it
            seen += running.stdout.read1()
            assert running.poll() is None, seen.decode()
        running.stdin.write(key)
        running.stdin.flush()
        seen += running.stdout.read()
        code = running.wait(PATIENCE_S)
    assert code == 0, seen.decode()
    assert b"Traceback" not in seen
    assert seen.count(ENTER) == seen.count(LEAVE) == 1
    assert b"stage 1 [2, 4)" in seen[seen.index(ENTER) : seen.index(LEAVE)]
    settings = re.findall(rb"[0-9a-f]+(?::[0-9a-f]+){9,}", seen)
    assert len(settings) == 2
    assert settings[0] == settings[1]


@pytest.mark.broker
def test_without_a_terminal_top_writes_a_table_again_and_again_until_ctrl_c(
    start: Callable[..., Process], amqp_url: str, pipeline: Path
) -> None:
    where = ("-p", pipeline, "--broker", amqp_url)
    watching = start("top", "--interval", 0.1, *where)
    watching.until(lambda: watching.out.read_text().count("dead letters") >= 2)
    ended = watching.end(signal.SIGINT)
    assert (ended.code, ended.err) == (0, "")
    assert "\x1b" not in ended.out
    assert "no coordinator answers" in ended.out


@pytest.mark.broker
def test_status_for_machines_is_one_json_object(start: Callable[..., Process], amqp_url: str, pipeline: Path) -> None:
    where = ("-p", pipeline, "--broker", amqp_url)
    start("coordinator", *where).said("actor.ready")
    ended = start("status", "--json", *where).end()
    told = json.loads(ended.out)
    assert (ended.code, told["pipeline"]) == (0, plans.read(pipeline).name)
    assert [found["values"]["rows"] for found in told["coordinators"]] == [0]
    assert told["complaint"] == "no worker serves stage 0, 1"


def test_top_says_in_one_sentence_that_there_is_no_broker(start: Callable[..., Process], pipeline: Path) -> None:
    ended = start("top", "-p", pipeline, "--broker", "amqp://127.0.0.1:1/").end()
    assert (ended.code, ended.err) == (2, "mqinfer: nothing listens at 127.0.0.1:1\n")
