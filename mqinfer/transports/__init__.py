"""Links to a broker. `open_transport` picks the transport by its URL; what all of them promise is in base.py.

Nothing but the choice may live here: each transport is imported only when its scheme asks for it, so that the
embedded default runs where no RabbitMQ client is installed.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from mqinfer.errors import SettingsError
from mqinfer.transports.base import Transport

#: Schemes that `open_transport` knows.
SCHEMES = ("memory", "amqp", "amqps")


async def open_transport(
    url: str, *, name: str = "mqinfer", heartbeat_s: float = 10, timeout_s: float = 30
) -> Transport:
    """Open a link to the broker at `url`: `memory://NAME`, `amqp://…` or `amqps://…`.

    `name` is what the broker's operator sees; a call that takes longer than `timeout_s` ends the link.

    Raises: Refused, with words for people, where no link can be had; SettingsError where the URL is none.
    """
    scheme = _scheme(url)
    if scheme == "memory":
        from mqinfer.transports.memory import open_memory

        return open_memory(url.partition("://")[2])
    from mqinfer.transports.rabbitmq import open_rabbitmq

    return await open_rabbitmq(url, name=name, heartbeat_s=heartbeat_s, timeout_s=timeout_s)


def _scheme(url: str) -> str:
    # The URL itself is never quoted: there may be a password in it.
    try:
        scheme = urlsplit(url).scheme
    except ValueError as error:
        raise SettingsError("the broker's URL can't be read") from error
    if scheme not in SCHEMES or "://" not in url:
        raise SettingsError(f"the broker's URL must begin with one of {', '.join(f'{name}://' for name in SCHEMES)}")
    return scheme
