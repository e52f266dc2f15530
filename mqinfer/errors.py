"""The tree of errors; each class says what becomes of the message or the row that met it.

The second column is the verdict, as in the table `verdicts.FATES`; its words are explained there.

::

    MqinferError
    ├── SettingsError   tell    a setting or an argument can't be used
    ├── PlanError       tell    the plan can't be made, read or served here
    ├── OutputError     tell    the results can't be written; nothing is acked, the next run goes on
    ├── WireError       dead    the body can't be read
    ├── PlanMismatch    dead    the body belongs to another plan; a step's rows are missed beside it
    ├── RequestError    fail    the request can't be answered
    ├── CacheMiss       miss    keys and values are gone
    ├── ComputeError    miss    the forward pass raised, for this row alone
    │   └── OutOfMemory miss    the device has no memory left, for this row alone
    └── TransportError  retry   the broker did not take or bring it
        ├── Refused     tell    the broker says no (login, vhost, a queue that differs)
        │   └── Forbidden tell  the broker's user may not do this
        ├── Unroutable  miss    the queue does not exist: its owner is gone
        └── Disconnected retry  the connection is lost; unconfirmed publishes may or may not be there

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


class Forbidden(Refused):
    """The broker's user may not do this."""


class Unroutable(TransportError):
    """The queue does not exist."""


class Disconnected(TransportError):
    """The connection to the broker is lost."""
