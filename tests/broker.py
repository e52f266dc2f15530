"""The RabbitMQ of the test run: one given by the environment, one in Docker, or a private node; in this order.

Only the choosing and the three ways to control a broker; what a private node is stands in scripts/private_broker.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from private_broker import START_TIMEOUT_S, PrivateBroker, answers, find_server, free_ports

DOCKER_IMAGE = "rabbitmq:4-alpine"
GREETING = b"AMQP\x00\x00\x09\x01"


class Broker(Protocol):
    """A RabbitMQ that tests may take away and bring back."""

    @property
    def url(self) -> str: ...

    def stop(self) -> None:
        """End it as an operator does: it writes down all that is durable first."""

    def kill(self) -> None:
        """End it as a power cut would. Confirmed messages outlive it; a queue declared just before may not."""

    def start(self) -> None:
        """Start it on the same data and port; returns when it answers."""

    def restart(self) -> None:
        """`stop`, then `start`."""

    def ctl(self, *arguments: str) -> str:
        """What `rabbitmqctl` says about it."""


class GivenBroker:
    """A broker that is not ours: what would disturb others is skipped."""

    def __init__(self, url: str) -> None:
        self.url = url

    def stop(self) -> None:
        pytest.skip("the broker of MQINFER_TEST_AMQP_URL is not ours to stop")

    start = restart = kill = stop

    def ctl(self, *arguments: str) -> str:
        pytest.skip("the broker of MQINFER_TEST_AMQP_URL is not ours to control")


class DockerBroker:
    """A container whose port stays the same when it is started again."""

    def __init__(self, container: Any, port: int) -> None:
        self.url = f"amqp://guest:guest@127.0.0.1:{port}/"
        self._container = container
        self._port = port

    def stop(self) -> None:
        self._container.stop()

    def kill(self) -> None:
        self._container.kill()

    def start(self) -> None:
        self._container.start()
        self.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def ctl(self, *arguments: str) -> str:
        code, output = self._container.exec_run(["rabbitmqctl", *arguments])
        assert code == 0, output
        return str(output.decode())

    def wait(self) -> None:
        """Until the broker, not only Docker's proxy, answers."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(self._port, GREETING):
            if time.monotonic() > deadline:
                raise TimeoutError("RabbitMQ in Docker did not answer in time")
            time.sleep(0.2)


@contextlib.contextmanager
def any_broker() -> Iterator[Broker]:
    """The broker of the test run; where there is none the tests fail in CI and are skipped on a laptop."""
    if url := os.environ.get("MQINFER_TEST_AMQP_URL"):
        yield GivenBroker(url)
    elif docker_answers():
        with docker_broker() as broker:
            yield broker
    elif find_server():
        with contextlib.closing(PrivateBroker()) as broker:
            broker.start()
            yield broker
    else:
        give_up("no RabbitMQ: set MQINFER_TEST_AMQP_URL, start Docker or install rabbitmq-server")


def docker_answers() -> bool:
    """Whether a Docker engine, not only its command, is there."""
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=10, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@contextlib.contextmanager
def docker_broker() -> Iterator[DockerBroker]:
    """A container that testcontainers removes, even when the test run is killed."""
    from testcontainers.core.container import DockerContainer

    (port,) = free_ports(1)
    image = DockerContainer(DOCKER_IMAGE)
    image.ports["5672"] = ("127.0.0.1", port)  # with_bind_ports would bind it to every interface
    with image as container:
        broker = DockerBroker(container.get_wrapped_container(), port)
        broker.wait()
        yield broker


def give_up(reason: str) -> None:
    """A hole in CI is a failure; a laptop without a broker may run the rest."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
