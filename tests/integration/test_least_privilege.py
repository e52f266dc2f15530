"""Every actor under its own user of a real broker: the work gets done, and nothing else can be done."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest
from aio_pika import Message, connect
from aiormq.exceptions import ChannelAccessRefused
from broker import Broker
from fakes import make_plan
from fleet import PATIENCE_S, Fleet, Job
from yarl import URL

from mqinfer import plan as plans
from mqinfer import survey
from mqinfer.dead_letters import send_back, taken
from mqinfer.errors import Forbidden
from mqinfer.link import bury, first
from mqinfer.operate import declare_all
from mqinfer.permissions import User, definitions, users
from mqinfer.queues import QueueSpec, Topology, exchange_of, new_id, results
from mqinfer.transports import open_transport
from mqinfer.transports.base import Delivery, Transport

pytestmark = pytest.mark.broker

STAGES = 3
PLAN = make_plan(new_id("least"), stages=STAGES)
TOPOLOGY = Topology(PLAN.name)
#: Of the same broker, and not theirs.
FOREIGN = QueueSpec(name=f"mqinfer.{new_id('foreign')}.requests")
JOB = results(new_id("job"))

Urls = Mapping[str, str]


def account(user: User, password: str) -> Mapping[str, object]:
    """A user as RabbitMQ's definitions have it."""
    salt = secrets.token_bytes(4)
    hashed = base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()
    algorithm = "rabbit_password_hashing_sha256"
    return {"name": user.name, "password_hash": hashed, "hashing_algorithm": algorithm, "tags": []}


@pytest.fixture(scope="module")
def urls(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Urls:
    """Where each actor of the plan connects, by what follows the pipeline's name in its user's; the users are there."""
    found = users(PLAN.name, STAGES)
    passwords = {user.name: secrets.token_hex(8) for user in found}
    file: Path = tmp_path_factory.mktemp("broker") / "definitions.json"
    accounts = {"users": [account(user, passwords[user.name]) for user in found]}
    file.write_text(json.dumps({**accounts, **definitions(found, "/")}))
    broker.ctl("import_definitions", str(file))
    return {
        name.removeprefix(f"{PLAN.name}-"): str(URL(broker.url).with_user(name).with_password(password))
        for name, password in passwords.items()
    }


@pytest.fixture
async def declared(urls: Urls, amqp_url: str) -> AsyncIterator[None]:
    """The operator has made the queues; a job and another pipeline are on the broker too."""
    operator, producer, guest = [await open_transport(url) for url in (urls["operator"], urls["producer"], amqp_url)]
    await declare_all(operator, TOPOLOGY, STAGES)
    await producer.declare(JOB)
    await guest.declare(FOREIGN)
    yield
    await producer.delete(JOB.name)
    await guest.delete(FOREIGN.name)
    for spec in TOPOLOGY.shared(STAGES):
        await operator.delete(spec.name)
    for link in (operator, producer, guest):
        await link.close()


@pytest.fixture
async def fleet(urls: Urls, declared: None) -> AsyncIterator[Fleet]:
    fleet = Fleet(urls["operator"], PLAN)
    for stage in range(STAGES):
        fleet.worker(stage, url=urls[f"stage-{stage}"])
    fleet.coordinator(url=urls["coordinator"])
    yield fleet
    await fleet.close()


@pytest.fixture
async def job(fleet: Fleet, urls: Urls) -> AsyncIterator[Job]:
    transport = await open_transport(urls["producer"])
    job = Job(fleet, transport)
    yield job
    await job._producer.forget()
    await transport.close()


async def test_a_job_is_done_although_every_actor_has_only_its_own_rights(fleet: Fleet, job: Job) -> None:
    await job.ask(40)
    await job.gather()
    job.check()


async def test_a_worker_that_dies_and_a_coordinator_that_leaves_need_no_other_rights(
    fleet: Fleet, job: Job, urls: Urls
) -> None:
    await job.ask(60)
    await job.gather(5)
    await fleet.actors[1].kill()
    fleet.worker(1, url=urls["stage-1"])
    fleet.coordinator(url=urls["coordinator"])
    await fleet.actors[STAGES].stop()
    await fleet.actors[0].stop()
    fleet.worker(0, url=urls["stage-0"])
    await job.gather()
    job.check()


@pytest.mark.parametrize("asker", ["operator", "producer"])
async def test_who_may_ask_sees_every_actor_and_every_queue(fleet: Fleet, job: Job, urls: Urls, asker: str) -> None:
    await job.ask(1)
    await job.gather()
    link = await open_transport(urls[asker])
    seen = await survey.take(link, PLAN, wait_s=PATIENCE_S / 6)
    await link.close()
    assert len(seen.reports) == STAGES + 1
    assert None not in (seen.requests, seen.dead, *seen.stages)


@pytest.mark.parametrize("role", ["stage-1", "coordinator", "producer"])
async def test_what_an_actor_cannot_read_it_buries_and_the_operator_sends_it_back(
    declared: None, urls: Urls, role: str
) -> None:
    queue = {"stage-1": TOPOLOGY.stage(1), "coordinator": TOPOLOGY.requests, "producer": JOB}[role]
    operator, actor = [await open_transport(urls[name]) for name in ("operator", role)]
    came: asyncio.Queue[Delivery] = asyncio.Queue()
    await operator.publish(queue.name, b"junk")
    await actor.consume(queue.name, prefetch=1, sink=came.put_nowait)
    await bury(actor, TOPOLOGY.dead, await asyncio.wait_for(came.get(), PATIENCE_S), "no message of ours")
    async with taken(operator, TOPOLOGY, 10) as found:
        assert [letter.queue for letter in found.letters] == [queue.name]
        assert await send_back(operator, TOPOLOGY, found.letters[0]) == ""
        await found.remove(found.letters[0])
    assert (await asyncio.wait_for(came.get(), PATIENCE_S)).body == b"junk"
    for link in (operator, actor):
        await link.close()


async def test_where_nobody_made_the_queues_a_worker_says_so(urls: Urls) -> None:
    fleet = Fleet(urls["operator"], PLAN)
    worker = fleet.worker(1, url=urls["stage-1"])
    with pytest.raises(BaseExceptionGroup) as raised:
        await asyncio.wait_for(worker.task, PATIENCE_S)
    assert isinstance(first(raised.value), Forbidden)
    assert f"'{TOPOLOGY.dead.name}'" in str(first(raised.value))


async def test_the_policies_reach_the_queues_that_they_are_for(declared: None, broker: Broker) -> None:
    broker.ctl("import_definitions", str(Path(__file__).parents[2] / "deploy" / "policies.json"))
    lines = broker.ctl("list_queues", "--quiet", "--no-table-headers", "name", "policy").splitlines()
    policies = {name: policy for name, _, policy in (line.partition("\t") for line in lines)}
    assert policies[TOPOLOGY.dead.name] == "mqinfer-dead"
    assert policies[JOB.name] == "mqinfer-results"
    assert {policies[spec.name] for spec in TOPOLOGY.shared(STAGES)[1:]} == {""}
    for policy in ("mqinfer-dead", "mqinfer-results"):
        broker.ctl("clear_policy", policy)


async def nothing(delivery: Delivery) -> None:
    raise AssertionError("a delivery came")


Act = Callable[[Transport], Awaitable[object]]


def consume(queue: str) -> Act:
    return lambda link: link.consume(queue, prefetch=1, sink=nothing)


def publish(queue: str) -> Act:
    return lambda link: link.publish(queue, b"forged")


def delete(queue: str) -> Act:
    return lambda link: link.delete(queue)


def purge(queue: str) -> Act:
    return lambda link: link.purge(queue)


def listen(exchange: str) -> Act:
    """A queue of one's own, bound to somebody else's exchange."""
    own = TOPOLOGY.worker(new_id("s1"))
    return lambda link: link.declare(QueueSpec(name=own.name, durable=False, exclusive=True, fanout=exchange))


def make(spec: QueueSpec) -> Act:
    return lambda link: link.declare(spec)


WORKER, STAGE = "stage-1", [TOPOLOGY.stage(stage).name for stage in range(STAGES)]
FORBIDDEN: Mapping[str, tuple[str, Act]] = {
    "a worker reads the stage before it": (WORKER, consume(STAGE[0])),
    "a worker reads the stage after it": (WORKER, consume(STAGE[2])),
    "a worker reads requests": (WORKER, consume(TOPOLOGY.requests.name)),
    "a worker reads results": (WORKER, consume(JOB.name)),
    "a worker reads dead letters": (WORKER, consume(TOPOLOGY.dead.name)),
    "a worker reads another pipeline": (WORKER, consume(FOREIGN.name)),
    "a worker listens in on the stage after it": (WORKER, listen(exchange_of(STAGE[2]))),
    "a worker listens in on requests": (WORKER, listen(exchange_of(TOPOLOGY.requests.name))),
    "a worker listens in on results": (WORKER, listen(exchange_of(JOB.name))),
    "a worker deletes its stage's queue": (WORKER, delete(STAGE[1])),
    "a worker deletes the next stage's queue": (WORKER, delete(STAGE[2])),
    "a worker deletes requests": (WORKER, delete(TOPOLOGY.requests.name)),
    "a worker purges the next stage's queue": (WORKER, purge(STAGE[2])),
    "a worker writes to the stage before it": (WORKER, publish(STAGE[0])),
    "a worker writes requests": (WORKER, publish(TOPOLOGY.requests.name)),
    "a worker writes results": (WORKER, publish(JOB.name)),
    "a worker writes to another pipeline": (WORKER, publish(FOREIGN.name)),
    "a worker asks the actors": (WORKER, lambda link: link.broadcast(TOPOLOGY.control, b"forged")),
    "a worker makes a queue of another stage's worker": (WORKER, make(TOPOLOGY.worker(new_id("s2")))),
    "a worker makes a queue for results": (WORKER, make(results(new_id("job")))),
    "the last worker writes to the first stage": ("stage-2", publish(STAGE[0])),
    "a coordinator reads a stage": ("coordinator", consume(STAGE[0])),
    "a coordinator reads results": ("coordinator", consume(JOB.name)),
    "a coordinator deletes requests": ("coordinator", delete(TOPOLOGY.requests.name)),
    "a batch job reads requests": ("producer", consume(TOPOLOGY.requests.name)),
    "a batch job reads a stage": ("producer", consume(STAGE[0])),
    "a batch job writes to a stage": ("producer", publish(STAGE[0])),
    "a batch job purges dead letters": ("producer", purge(TOPOLOGY.dead.name)),
    "the operator reads results": ("operator", consume(JOB.name)),
    "the operator reads another pipeline": ("operator", consume(FOREIGN.name)),
    "the operator deletes another pipeline's queue": ("operator", delete(FOREIGN.name)),
}


async def test_the_broker_forbids_what_is_not_an_actors_to_do(declared: None, urls: Urls) -> None:
    allowed = [what for what, (role, act) in FORBIDDEN.items() if not await is_forbidden(urls[role], act)]
    assert allowed == []


async def is_forbidden(url: str, act: Act) -> bool:
    link = await open_transport(url)
    try:
        await act(link)
    except Forbidden:
        return True
    else:
        return False
    finally:
        await link.close()


async def test_nobody_gets_around_the_exchanges_by_the_default_one(declared: None, urls: Urls) -> None:
    for url in urls.values():
        async with await connect(url) as connection:
            channel = await connection.channel()
            with pytest.raises(ChannelAccessRefused):
                await channel.default_exchange.publish(Message(b"forged"), STAGE[2])


async def test_a_publish_that_is_forbidden_ends_the_link_with_the_brokers_words(declared: None, urls: Urls) -> None:
    link = await open_transport(urls[WORKER])
    with pytest.raises(Forbidden, match="access to exchange"):
        await link.publish(TOPOLOGY.requests.name, b"forged")
    with pytest.raises(Forbidden, match="access to exchange"):
        await link.closed()
    await link.close()


#: Runs the command, then shows what any user of the machine, or its owner, sees of the process.
SEEN = """\
import atexit, pathlib
from mqinfer.cli import main
atexit.register(lambda: print(*(pathlib.Path("/proc/self", name).read_text() for name in ("cmdline", "environ"))))
main()
"""


def run_command(url: str, folder: Path, *command: str, how: str) -> subprocess.CompletedProcess[str]:
    """A command of the operator, whose broker comes from a flag's file or from systemd's credential."""
    (folder / "broker").write_text(url)
    plans.write(PLAN, folder / "pipeline.toml")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MQINFER_")}
    given = ("--broker", f"@{folder}/broker") if how == "file" else ()
    told = {"CREDENTIALS_DIRECTORY": str(folder)} if how == "credential" else {}
    return subprocess.run(
        [sys.executable, "-c", SEEN, *command, "-p", str(folder / "pipeline.toml"), *given],
        env={**kept, **told, "MQINFER_LOG_LEVEL": "debug"},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,  # it imports all that a command needs
    )


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("how", ["file", "credential"])
@pytest.mark.parametrize("right", [True, False])
async def test_a_password_is_neither_seen_from_outside_nor_said(
    declared: None, urls: Urls, tmp_path: Path, how: str, right: bool
) -> None:
    url = URL(urls["operator"])
    url = url if right else url.with_password(secrets.token_hex(8))
    ended = await asyncio.to_thread(run_command, str(url), tmp_path, "queues", "declare", how=how)
    assert ended.returncode == (0 if right else 2), ended.stderr
    assert ("wrong user or password" in ended.stderr) != right
    assert "queues" in ended.stdout  # what is seen of the process
    assert url.password is not None
    assert url.password not in ended.stdout + ended.stderr
