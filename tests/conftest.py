"""Fixtures for every test: the broker of the run, and both transports behind one name."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator, Iterator

import pytest
from broker import Broker, any_broker
from hypothesis import HealthCheck, settings

from mqinfer.queues import new_id

# Otherwise hypothesis fails what is slow on a busy machine: nothing is timed here.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

#: pytest-timeout stops its clock where a test fails; what hangs in a teardown after that would hang for ever.
TEARDOWN_S = 120.0
STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the real standard error, which is captured while tests run."""
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[STDERR] = os.dup(2)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """A teardown that hangs ends its process, and where all threads stand is told. xdist goes on in another process."""
    faulthandler.dump_traceback_later(TEARDOWN_S, exit=True, file=item.config.stash[STDERR])
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    """A RabbitMQ that may be killed and started again; shared by all tests, so use names of your own."""
    with any_broker() as found:
        yield found


@pytest.fixture(scope="session")
def amqp_url(broker: Broker) -> str:
    """URL of the RabbitMQ of the run."""
    return broker.url


@pytest.fixture(params=["memory", pytest.param("rabbitmq", marks=pytest.mark.broker)])
def transport_url(request: pytest.FixtureRequest) -> str:
    """The test runs twice: over a memory broker of its own and over RabbitMQ."""
    if request.param == "memory":
        return f"memory://{new_id('test')}"
    url: str = request.getfixturevalue("amqp_url")
    return url
