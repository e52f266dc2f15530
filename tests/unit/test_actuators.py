"""Starting and stopping consumers by commands: what is run, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
import shlex
import socket
import sys
from pathlib import Path

import pytest

from mqinfer.actuators import SYSTEMD_DOWN, SYSTEMD_UP, ActionFailed, Commands, Consumer, Systemd
from mqinfer.errors import SettingsError

MARK = '-c \'import sys; open(sys.argv[1], "a").write(" ".join(sys.argv[2:]) + chr(10))\''


def python(rest: str) -> str:
    return f"{shlex.quote(sys.executable)} {rest}"


async def test_the_command_gets_stage_number_instance_and_host_as_words_of_its_own(tmp_path: Path) -> None:
    note = tmp_path / "a note"
    up = python(f"{MARK} {shlex.quote(str(note))} up {{stage}} {{n}} {{instance}} '{{host}} $HOME;'")
    acting = Commands(up, up.replace(" up ", " down "), hosts=["gpu1"])
    await acting.start(Consumer(stage=2, n="auto1", host="gpu1"))
    await acting.stop(Consumer(stage=2, n="", host="gpu1"))
    assert note.read_text().splitlines() == ["up 2 auto1 2-auto1 gpu1 $HOME;", "down 2  2 gpu1 $HOME;"]


async def test_a_command_that_fails_is_told_with_its_code_and_the_end_of_what_it_said() -> None:
    command = python('-c \'import sys; print("x" * 9999, "no such unit"); sys.exit(5)\'')
    with pytest.raises(ActionFailed, match=r"ended with 5: x+ no such unit$") as failed:
        await Commands(command, command).start(Consumer(stage=0, n="1"))
    assert len(str(failed.value)) < 1000


async def test_a_command_that_takes_too_long_is_killed_with_what_it_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    alive.touch()
    code = (
        "import subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
    )
    command = python(f"-c {shlex.quote(code)}")
    with pytest.raises(ActionFailed, match=r"took more than 0\.2 s"):
        await Commands(command, command, timeout_s=0.2).start(Consumer(stage=0, n="1"))


async def test_a_command_that_leaves_a_process_behind_is_through_when_it_ends_itself() -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(5)'])"
    command = python(f"-c {shlex.quote(code)}")
    async with asyncio.timeout(60):
        await Commands(command, command).start(Consumer(stage=0, n="1"))


async def test_a_program_that_is_not_there_is_a_failed_action() -> None:
    with pytest.raises(ActionFailed, match="can't be run: No such file"):
        await Commands("/nowhere/at/all", "true").start(Consumer(stage=0, n="1"))


@pytest.mark.parametrize("host", ["-oProxyCommand=reboot", "a b", "gpu1;reboot", "$(reboot)", "é", "a" * 300])
async def test_a_host_that_is_no_name_comes_into_no_command(host: str) -> None:
    with pytest.raises(ActionFailed, match="is no name to be put into a command"):
        await Commands("true {host}", "true", hosts=["gpu1"]).start(Consumer(stage=0, n="1", host=host))


async def test_an_instance_that_is_no_name_comes_into_no_command() -> None:
    with pytest.raises(ActionFailed, match="is no name"):
        await Commands("true", "true {instance}").stop(Consumer(stage=0, n="x;reboot"))


@pytest.mark.parametrize(
    ("up", "words"),
    [
        ("", "--up is empty"),
        ("ssh 'x", r"can't be read: No closing quotation"),
        ("ssh {unit}", r"has \{unit\}; there are \{stage\}, \{n\}, \{instance\}, \{host\}"),
        ("ssh {stage.__class__}", r"has \{stage.__class__\}"),
        ("ssh {", "can't be read"),
        ("ssh {host}", "say with --host which ones there are"),
    ],
)
def test_a_template_that_can_not_be_filled_in_is_told_before_anything_runs(up: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Commands(up, "true")


def test_systemd_is_a_pair_of_commands_for_this_host() -> None:
    assert Systemd().hosts == (socket.gethostname(),)
    for command, verb in ((SYSTEMD_UP, "start"), (SYSTEMD_DOWN, "stop")):
        assert command.split()[1] == verb
        assert command.format(instance="2-auto1").endswith("mqinfer-worker@2-auto1")
