"""One fleet for most of the faults, the answers it gives when nothing fails, and a report of every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import workload
from broker import give_up
from counts import Report
from private_broker import PrivateBroker, find_server
from processes import demo_model
from roster import Roster, fault_free

REPORT = pytest.StashKey[Report]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them need a broker and the model, and may wait for a busy machine."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.broker)
            item.add_marker(pytest.mark.smollm2)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep the outcome for `report`."""
    made = yield
    if item.stash.get(REPORT, None) is not None and call.when == "call":
        item.stash[REPORT].write(made.outcome, call.duration)
    return made


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """The line that this test adds to the suite's table."""
    request.node.stash[REPORT] = Report(test=request.node.name)
    return request.node.stash[REPORT]


@pytest.fixture(scope="session")
def node() -> Iterator[PrivateBroker]:
    """A broker to be killed, starved and set up anew: our own, whatever broker the other tests use."""
    if find_server() is None:
        give_up("the faults need an installed rabbitmq-server")
    broker = PrivateBroker(config="vm_memory_high_watermark.absolute = 1GB\n")
    try:
        broker.start()
        yield broker
    finally:
        broker.close()


@pytest.fixture(scope="session")
def roster(tmp_path_factory: pytest.TempPathFactory, node: PrivateBroker) -> Iterator[Roster]:
    """The fleet that the tests share."""
    roster = Roster(tmp_path_factory.mktemp("roster"), demo_model(), node, {})
    try:
        roster.whole()
        yield roster
    finally:
        roster.end()


@pytest.fixture
def healed(roster: Roster) -> Roster:
    """The shared fleet, whole again."""
    roster.heal()
    return roster


@pytest.fixture(scope="session")
def answers(roster: Roster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the fleet answers when nothing fails: made once, and every other run is compared with it."""
    return fault_free(roster, workload.SHORT, tmp_path_factory.mktemp("fault-free"))
