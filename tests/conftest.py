"""Fixtures for every test: the broker of the run, and both transports behind one name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from broker import Broker, any_broker
from hypothesis import HealthCheck, settings

from mqinfer.queues import new_id

# Otherwise hypothesis fails what is slow on a busy machine: nothing is timed here.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


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
