"""A broker and the network before it, which delays, duplicates, reorders, crashes and runs short of memory.

The broker is the memory transport's own, which the contract tests hold to RabbitMQ; what it does runs outside of every
process. Nothing of coordinators, workers or producers may be known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from random import Random

from mqinfer.errors import Refused
from mqinfer.transports.memory_broker import Broker, Message
from simulation.link import SimTransport
from simulation.virtual import PROCESS, State, VirtualLoop


@dataclass(slots=True, kw_only=True)
class Weather:
    """What a network and its broker do to those who use them."""

    latency_s: float = 0.001
    #: Share of messages that take up to `late_s` longer.
    late: float = 0.0
    late_s: float = 2.0
    #: Share of publishes that enter their queue after others that came later.
    reordered: float = 0.0
    #: Share of publishes that enter their queue twice.
    duplicated: float = 0.0
    heartbeat_s: float = 10.0
    timeout_s: float = 30.0
    #: Deliveries held for longer cost the link; None: never.
    consumer_timeout_s: float | None = None
    #: Whether a crash of the broker may take queues with it that were declared less than 2 s before.
    forgets_new_queues: bool = False


@dataclass(slots=True)
class Network:
    """All links and the broker."""

    loop: VirtualLoop
    random: Random
    weather: Weather
    #: Told of every body that enters a queue.
    watch: Callable[[str, bytes, bool], None]
    #: Things that must never happen.
    complain: Callable[[str], None]
    #: Told of every link that the broker loses, before what it held goes back.
    lost: Callable[[SimTransport], None]
    broker: Broker = field(init=False)
    links: list[SimTransport] = field(default_factory=list)
    up: bool = True
    alarmed: bool = False
    told_at_s: float | None = None
    blocked_s: float = 0.0
    #: Publishes that the broker does not read while it is short of memory.
    held: list[Callable[[], None]] = field(default_factory=list)
    duplicates: int = 0
    declared_s: dict[str, float] = field(default_factory=dict)
    context: Context = field(default_factory=copy_context)

    def __post_init__(self) -> None:
        self.broker = Broker(self.loop)

    async def connect(self) -> SimTransport:
        """What actors are given as `connect`. Raises: Refused while the broker is down."""
        await asyncio.sleep(self.delay_s() * 4)
        if not self.up:
            raise Refused("nothing listens")
        link = SimTransport(self, PROCESS.get())
        self.links.append(link)
        return link

    def delay_s(self) -> float:
        """How long a message is on its way."""
        late_s = self.random.uniform(0, self.weather.late_s) if self.random.random() < self.weather.late else 0.0
        return self.weather.latency_s * (0.5 + self.random.random()) + late_s

    def at_broker(self, when_s: float, do: Callable[[], object]) -> None:
        """Let the broker do it then."""
        self.loop.call_at(when_s, do, context=self.context)

    def enter(self, queue: str, message: Message) -> bool:
        """Route a message as the broker does; False where the queue does not exist."""
        unattended = any(found.spec.name == queue and not found.consumers for found in self.broker.queues())
        self.watch(queue, message.body, unattended)
        return self.broker.route(queue, message)

    def enter_again(self, queue: str, message: Message) -> None:
        """The same message comes a second time, a little later."""
        again = Message(
            body=message.body,
            headers=message.headers,
            persistent=message.persistent,
            priority=message.priority,
            ttl_s=message.ttl_s,
        )
        self.duplicates += 1
        self.at_broker(self.loop.time() + self.random.uniform(0, 3), lambda: self.enter(queue, again))

    def crash(self) -> None:
        """The broker dies: links are lost, transient messages are gone, what was unsettled is ready again."""
        self.up = False
        self.held.clear()
        for link in list(self.links):
            link.reset()
        self.broker.restart()
        if self.weather.forgets_new_queues:
            for name, declared_s in self.declared_s.items():
                queue = self.broker.find(name, None)
                if queue is not None and declared_s > self.loop.time() - 2.0 and self.random.random() < 0.5:
                    self.broker.remove(queue)

    def restart(self) -> None:
        """The broker is back, with what was durable."""
        self.up = True

    def alarm(self, *, told: bool) -> None:
        """The broker reads no publishes any more; clients that were not told lose patience."""
        self.alarmed = True
        self.told_at_s = self.loop.time() if told else None
        if not told:
            for link in list(self.links):
                self.loop.call_later(self.weather.timeout_s, link.lose_patience, context=link.process.context)

    def told_blocked_s(self) -> float:
        """How long publishers knew that the broker took nothing, over the whole run."""
        return self.blocked_s + (0.0 if self.told_at_s is None else self.loop.time() - self.told_at_s)

    def calm(self) -> None:
        """The alarm is over: what waits is read, also what nobody waits for any more."""
        self.blocked_s = self.told_blocked_s()
        self.alarmed, self.told_at_s = False, None
        held, self.held = self.held, []
        for publish in held:
            publish()

    def calm_weather(self) -> None:
        """From now on nothing is late, twice or out of order."""
        self.weather = replace(self.weather, late=0.0, reordered=0.0, duplicated=0.0)

    def tick(self) -> None:
        """Take back what was held too long; that must not be the lease of a coordinator which lives."""
        limit_s = self.weather.consumer_timeout_s
        for link in [] if limit_s is None else list(self.links):
            late = link.held_longer_than(limit_s)
            if late and link.process.state is State.RUNNING and not link.is_cut:
                for queue in late:
                    if queue.endswith(".requests") or ".leases." in queue:
                        self.complain(f"a lease of {link.process.name} was held for more than {limit_s} s")
            if late:
                link.reset()
