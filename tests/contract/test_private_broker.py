"""The broker that the tests and `scripts/broker` run: it leaves nothing behind, however it or its owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import private_broker
import pytest
from broker import GREETING
from private_broker import BrokerFailed, PrivateBroker, answers

SCRIPT = Path(private_broker.__file__).parent / "broker"

PATIENCE_S = 30.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private brokers make their folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_start_that_fails_says_why_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_broker, "find_server", lambda: "false")
    broker = PrivateBroker()
    with pytest.raises(BrokerFailed, match="server ended"):
        broker.start()
    broker.close()
    broker.close()
    assert list(folder.iterdir()) == []


def test_without_rabbitmq_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_broker, "find_server", lambda: None)
    broker = PrivateBroker()
    with pytest.raises(BrokerFailed, match="not installed"):
        broker.start()
    broker.close()
    assert list(folder.iterdir()) == []


@pytest.mark.broker
@pytest.mark.skipif(private_broker.find_server() is None, reason="rabbitmq-server is not installed")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_script_serves_until_it_is_ended_and_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    environment = os.environ | {"TMPDIR": str(folder)}
    with (
        subprocess.Popen([SCRIPT], stdout=subprocess.PIPE, text=True, env=environment) as script,
        ExitStack() as at_the_end,
    ):
        at_the_end.callback(script.kill)  # where the test fails; Popen's own end waits for ever
        assert script.stdout is not None
        port = urlsplit(script.stdout.readline().strip()).port
        assert port is not None
        assert answers(port, GREETING)
        assert len(list(folder.iterdir())) == 1
        script.send_signal(number)
        script.wait(PATIENCE_S)
    assert script.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    deadline = time.monotonic() + PATIENCE_S
    while answers(port, GREETING) or list(folder.iterdir()):
        assert time.monotonic() < deadline
