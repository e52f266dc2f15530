"""The tree of errors; each class says what becomes of the message that met it.

::

    MqinferError
    ├── SettingsError       the person who started the command is told; exit code 2
    ├── PlanError           likewise: the plan can't be made, read or served here
    ├── OutputError         likewise: the results can't be written; nothing is acked, the next run goes on
    ├── WireError           the body can't be read: dead-letter queue
    ├── PlanMismatch        the body belongs to another plan: dead-letter queue
    ├── RequestError        the request can't be answered: a failure row that says why
    ├── CacheMiss           keys and values are gone: the coordinator replays the row
    ├── ComputeError        the forward pass raised: split, retry, then a failure row
    │   └── OutOfMemory     the device has no memory left: likewise
    └── TransportError      the broker did not take or bring it: retry
        ├── Refused         the broker says no (login, vhost, permission): told at once, no retry
        ├── Unroutable      the queue does not exist: its owner is gone
        └── Disconnected    the connection is lost; unconfirmed publishes may or may not be there

A class's docstring is its default message. No message text, token or secret belongs in an error.
"""


class MqinferError(Exception):
    """mqinfer failed."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class SettingsError(MqinferError):
    """A setting is missing or has a value that can't be used."""


class PlanError(MqinferError):
    """The plan can't be made, read or served."""


class OutputError(MqinferError):
    """The output can't be written."""


class WireError(MqinferError):
    """The message body can't be read."""


class PlanMismatch(MqinferError):
    """The message belongs to another plan."""


class RequestError(MqinferError):
    """The request can't be answered."""


class CacheMiss(MqinferError):
    """The keys and values of earlier positions are not here."""


class ComputeError(MqinferError):
    """The forward pass failed."""


class OutOfMemory(ComputeError):
    """The device has no memory left."""


class TransportError(MqinferError):
    """The broker did not take the message."""


class Refused(TransportError):
    """The broker refused the connection or the operation."""


class Unroutable(TransportError):
    """The queue does not exist."""


class Disconnected(TransportError):
    """The connection to the broker is lost."""
