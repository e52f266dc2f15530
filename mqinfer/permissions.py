"""What each actor's user may do on RabbitMQ, and no more: regular expressions over names of queues and exchanges.

The broker matches them; nothing here talks to it. What a right means there: `configure` makes and deletes, `write`
publishes to an exchange and binds a queue, `read` consumes and purges a queue and binds to an exchange. One exchange
leads to all queues of one kind (`queues.exchange_of`), so that who may write to it may write to these and no others.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mqinfer.queues import Topology

#: What `queues.new_id` puts behind its prefix.
_ID = "[0-9a-f]+"
_STAGE = "stage[.][0-9]+"
#: Results are no pipeline's: who collects them need not know whose they are, and has dead letters of its own.
_RESULTS = f"mqinfer[.]results[.]job-{_ID}"
_TO_RESULTS = "mqinfer[.]to[.]results"
_COLLECTED_DEAD = "mqinfer[.]collect[.](to[.])?dead"
#: Every queue and exchange of a pipeline, after its name. Spelled out, because a pipeline's name may have dots.
_ALL = (
    rf"(requests|dead|control|choosing|{_STAGE}|(worker|coordinator|leases|reports)[.][^.]+"
    rf"|to[.](requests|dead|coordinator|leases|reports|{_STAGE}))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A user of the broker and its rights, each one regular expression over whole names."""

    name: str
    configure: str
    write: str
    read: str


def users(pipeline: str, stages: int) -> tuple[User, ...]:
    """Those of a pipeline: one for the workers of each stage, for coordinators, for batch jobs, for its operator.

    Raises: SettingsError where that can't be a pipeline's name.
    """
    prefix = Topology(pipeline).prefix.replace(".", "[.]")
    workers = [_worker(pipeline, prefix, stage, last=stage == stages - 1) for stage in range(stages)]
    workers.append(_spare(pipeline, prefix))
    return (*workers, _coordinator(pipeline, prefix), _producer(pipeline, prefix), _operator(pipeline, prefix))


def _worker(pipeline: str, prefix: str, stage: int, *, last: bool) -> User:
    own = f"worker[.]s{stage}-{_ID}"
    # Its own stage too: a worker that leaves puts back what it has not begun with.
    targets = [stage] if last else [stage, stage + 1]
    sent = [*(f"to[.]stage[.]{target}" for target in targets), "to[.](coordinator|dead|reports)"]
    return User(
        name=f"{pipeline}-stage-{stage}",
        configure=_any(prefix, [own]),
        write=_any(prefix, [own, *sent]),
        read=_any(prefix, [own, f"stage[.]{stage}", f"to[.]stage[.]{stage}", "control"]),
    )


def _spare(pipeline: str, prefix: str) -> User:
    """For workers that choose their stage (`--stage auto`): those of any stage, and what they ask first."""
    own = [f"worker[.]s[0-9]+-{_ID}", "choosing", f"reports[.]ask-{_ID}"]
    sent = [f"to[.]{_STAGE}", "to[.](coordinator|dead|reports)", "control"]
    seen = f"requests|dead|{_STAGE}"  # as below
    return User(
        name=f"{pipeline}-spare",
        configure=_any(prefix, own),
        write=_any(prefix, [*own, *sent, seen]),
        read=_any(prefix, [*own, _STAGE, f"to[.]{_STAGE}", "to[.]reports", "control"]),
    )


def _coordinator(pipeline: str, prefix: str) -> User:
    own = f"(coordinator|leases)[.]c-{_ID}"
    sent = f"to[.](requests|coordinator|leases|dead|reports|{_STAGE})"
    # RabbitMQ shows a queue's length from 4.2.7 only to who has some right on it; to write to a queue itself, not to
    # its exchange, is the least of them.
    seen = f"requests|{_STAGE}"
    return User(
        name=f"{pipeline}-coordinator",
        configure=_any(prefix, [own]),
        write=_any(prefix, [own, sent, seen], [_TO_RESULTS]),
        read=_any(prefix, [own, "requests", "control", "to[.](coordinator|leases)"]),
    )


def _producer(pipeline: str, prefix: str) -> User:
    reports = f"reports[.]ask-{_ID}"
    own = [_RESULTS, _COLLECTED_DEAD]
    seen = f"requests|dead|{_STAGE}"  # as above
    return User(
        name=f"{pipeline}-producer",
        configure=_any(prefix, [reports], own),
        write=_any(prefix, [reports, "control", "to[.](requests|dead)", seen], [*own, _TO_RESULTS]),
        read=_any(prefix, [reports, "to[.]reports"], [*own, _TO_RESULTS]),
    )


def _operator(pipeline: str, prefix: str) -> User:
    everything = _any(prefix, [_ALL], [_TO_RESULTS, _COLLECTED_DEAD])
    return User(name=f"{pipeline}-operator", configure=everything, write=everything, read=everything)


def _any(prefix: str, names: Iterable[str], others: Iterable[str] = ()) -> str:
    alternatives = [f"{prefix}[.]({'|'.join(names)})", *others]
    return f"^({'|'.join(alternatives)})$"


def commands(users: Sequence[User], vhost: str) -> str:
    """A shell script of rabbitmqctl; it asks for the password of each user, who is new."""
    lines = ["set -e"]
    for user in users:
        rights = (user.configure, user.write, user.read)
        lines.append(f"echo {shlex.quote(f'password of {user.name}:')} >&2")
        lines.append(shlex.join(["rabbitmqctl", "add_user", user.name]))
        lines.append(shlex.join(["rabbitmqctl", "set_permissions", "-p", vhost, user.name, *rights]))
    return "\n".join(lines)


def definitions(users: Sequence[User], vhost: str) -> Mapping[str, object]:
    """For `rabbitmqctl import_definitions`, as a JSON value; the users must be there already."""
    return {
        "permissions": [
            {
                "user": user.name,
                "vhost": vhost,
                "configure": user.configure,
                "write": user.write,
                "read": user.read,
            }
            for user in users
        ]
    }
