"""What a fault does to a world. When and how often is the scenario's business."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from mqinfer.queues import results
from mqinfer.transports.memory_broker import Message
from simulation.oracle import GARBAGE
from simulation.scenario import Fault

if TYPE_CHECKING:
    from simulation.actor import Actor
    from simulation.world import World

T = TypeVar("T")

#: A killed process dies after up to so many more of its callbacks: at any of its awaits.
MOST_CALLBACKS = 40


def do(world: World, fault: Fault) -> None:
    """Let it happen."""
    world.oracle.counts[f"fault: {fault.kind}"] += 1
    _FAULTS[fault.kind](world, fault)


def cancel_job(world: World, actor: Actor) -> None:
    """Its owner kills the batch and deletes the job's results."""
    actor.retired = True
    world.kill(actor)
    disk = world.disks[world.actors["producer"].index(actor)]
    for job in disk.jobs:
        _delete(world, results(job).name)


def _delete(world: World, name: str) -> None:
    queue = world.network.broker.find(name, None)
    if queue is not None:
        world.network.broker.remove(queue)


def _pick(things: Sequence[T], target: float) -> T | None:
    return things[int(target * len(things))] if things else None


def _kill(role: str) -> Callable[[World, Fault], None]:
    def kill(world: World, fault: Fault) -> None:
        actor = _pick([actor for actor in world.actors[role] if actor.lives], fault.target)
        if actor is not None:
            world.kill(actor, 1 + int(fault.number * MOST_CALLBACKS))

    return kill


def _kill_all_coordinators(world: World, _fault: Fault) -> None:
    for actor in world.actors["coordinator"]:
        world.kill(actor)


def _stop(role: str) -> Callable[[World, Fault], None]:
    def stop(world: World, fault: Fault) -> None:
        actor = _pick([actor for actor in world.actors[role] if actor.lives], fault.target)
        if actor is not None:
            actor.stop.set()

    return stop


def _pause(world: World, fault: Fault) -> None:
    living = [actor for actors in world.actors.values() for actor in actors if actor.lives]
    actor = _pick(living, fault.target)
    if actor is None or actor.process is None:
        return
    actor.process.pause()
    for link in world.network.links:
        if link.process is actor.process:
            link.silence()
    world.loop.call_later(fault.number, actor.process.resume, context=world.network.context)


def _cut(world: World, fault: Fault) -> None:
    if link := _pick(world.network.links, fault.target):
        link.reset()


def _stall(world: World, fault: Fault) -> None:
    if link := _pick(world.network.links, fault.target):
        link.stall()


def _crash(world: World, fault: Fault) -> None:
    if world.network.up:
        world.network.crash()
        world.loop.call_later(fault.number, world.network.restart, context=world.network.context)


def _alarm(world: World, fault: Fault) -> None:
    if not world.network.alarmed:
        world.network.alarm(told=fault.target < 0.5)
        world.loop.call_later(fault.number, world.network.calm, context=world.network.context)


def _evict(world: World, fault: Fault) -> None:
    actor = _pick([actor for actor in world.actors["worker"] if actor.lives], fault.target)
    if actor is not None and actor.engine is not None:
        for key in actor.engine.cache.rows():
            if world.random.random() < fault.number:
                actor.engine.cache.drop(*key)


def _delete_queue(world: World, fault: Fault) -> None:
    names = [queue.spec.name for queue in world.network.broker.queues() if queue.spec.durable]
    if name := _pick(names, fault.target):
        _delete(world, name)


def _garbage(world: World, fault: Fault) -> None:
    if queue := _pick(world.network.broker.queues(), fault.target):
        ends_dead = queue.spec.name in {spec.name for spec in world.topology.shared(len(world.plan.stages))}
        vanishes = world.scenario.weather.forgets_new_queues or any(
            other.kind == "delete queue" for other in world.scenario.faults
        )
        world.oracle.garbage += ends_dead and not vanishes
        world.network.broker.route(queue.spec.name, Message(body=GARBAGE, headers={}, persistent=True))


def _out_of_memory(world: World, _fault: Fault) -> None:
    world.out_of_memory += 1


_FAULTS: Mapping[str, Callable[[World, Fault], None]] = {
    "kill worker": _kill("worker"),
    "kill coordinator": _kill("coordinator"),
    "kill producer": _kill("producer"),
    "kill all coordinators": _kill_all_coordinators,
    "drain worker": _stop("worker"),
    "drain coordinator": _stop("coordinator"),
    "stop producer": _stop("producer"),
    "pause": _pause,
    "cut link": _cut,
    "stall link": _stall,
    "crash broker": _crash,
    "alarm": _alarm,
    "evict": _evict,
    "delete queue": _delete_queue,
    "garbage": _garbage,
    "out of memory": _out_of_memory,
}
