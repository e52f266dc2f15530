"""Every field of every message: how it stands in a header, derived once from the type hints in messages.py.

A message is a map of its fields by name, a dataclass inside it an array of its fields in order; what equals its default
is left out (of an array only at its end). Writing and reading make the same checks, so whatever `write_message` takes,
`read_message` takes too. How scalars become bytes is wire_header.py's; what a kind of message is for, nobody's here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from enum import StrEnum
from itertools import islice
from types import UnionType
from typing import Any, Protocol, get_args, get_origin, get_type_hints

from mqinfer.errors import WireError
from mqinfer.messages import KINDS, Message
from mqinfer.wire_header import Bounds, Source

Buffer = bytes | memoryview

_INT_MOST = 2**63 - 1
_ANY_SIZE: Bounds = (0, math.inf)

#: Inclusive; of a number its value, of a string its characters, of a tuple its items. NaN is inside no bounds.
_SCALAR_BOUNDS: Mapping[type, Bounds] = {
    bool: (False, True),
    int: (0, _INT_MOST),
    float: (-math.inf, math.inf),
    str: (0, 2**16),
}
_BOUNDS: Mapping[str, Bounds] = {
    "Sampling.temperature": (0.0, sys.float_info.max),
    "Sampling.top_p": (0.0, 1.0),
    "Sampling.logprobs": (-1, _INT_MOST),
    "Row.count": (1, _INT_MOST),
    "Packed.shape": (0, 4),
    "Packed.blobs": (0, 8),
    "Step.rows": (0, 4096),
    "Step.misses": (0, 4096),
    "Step.ttl_s": (0.0, sys.float_info.max),
    "Step.slowest_s": (0.0, sys.float_info.max),
    "Step.slowest_token_s": (0.0, sys.float_info.max),
    "Step.traceparent": (0, 55),
    "StepDone.slowest_s": (0.0, sys.float_info.max),
    "StepDone.slowest_token_s": (0.0, sys.float_info.max),
    "Result.text": _ANY_SIZE,
    "Report.stage": (-1, _INT_MOST),
}


class Field(Protocol):
    """One type of field; both ways raise WireError where a value is not of the type or out of its bounds."""

    def write(self, value: Any, blobs: list[Buffer], /) -> Any:
        """What msgpack is given for `value`; its blobs are appended."""

    def read(self, source: Source) -> Any:
        """The value that comes next."""


class _Scalar:
    """bool, int, float or str."""

    def __init__(self, kind: type[Any], where: str) -> None:
        self.kind = kind
        self._where = where
        self._low, self._high = _BOUNDS.get(where, _SCALAR_BOUNDS[kind])

    def write(self, value: Any, _blobs: list[Buffer]) -> Any:
        # Settings and JSON give 1 where 1.0 is meant; on the wire there is one form.
        if self.kind is float and type(value) is int and abs(value) <= _INT_MOST:
            value = float(value)
        return self._checked(value)

    def read(self, source: Source) -> Any:
        value = source.scalar()
        # Most of what a step has are numbers within their bounds: 200 in a step of 32 rows.
        if type(value) is self.kind and self.kind is not str and self._low <= value <= self._high:
            return value
        return self._checked(value)

    def check_all(self, values: Sequence[Any]) -> None:
        """The same for many numbers at once: a long prompt costs 50 ns a token, not 200."""
        if not set(map(type, values)) <= {self.kind}:
            raise WireError(f"{self._where}: not {self.kind.__name__}")
        if values and not (self._low <= min(values) and max(values) <= self._high):
            raise WireError(f"{self._where}: out of range")

    def _checked(self, value: Any) -> Any:
        if type(value) is not self.kind:
            raise WireError(f"{self._where}: not {self.kind.__name__}")
        size: float = len(value) if self.kind is str else value
        if not self._low <= size <= self._high:
            raise WireError(f"{self._where}: out of range")
        return value


class _Choice:
    """A StrEnum, as its string."""

    def __init__(self, kind: type[StrEnum], where: str) -> None:
        self._members: Mapping[Any, StrEnum] = {member.value: member for member in kind}
        self._text = _Scalar(str, where)
        self._where = where

    def write(self, value: Any, _blobs: list[Buffer]) -> Any:
        return self._member(value if isinstance(value, StrEnum) else None).value

    def read(self, source: Source) -> Any:
        return self._member(self._text.read(source))

    def _member(self, value: Any) -> StrEnum:
        if value not in self._members:
            raise WireError(f"{self._where}: none of its values")
        return self._members[value]


class _Blob:
    """Bytes behind the header, as their length."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._length = _Scalar(int, where)

    def write(self, value: Any, blobs: list[Buffer]) -> Any:
        if not isinstance(value, bytes | memoryview) or not memoryview(value).contiguous:
            raise WireError(f"{self._where}: not contiguous bytes")
        blobs.append(value)
        return memoryview(value).nbytes

    def read(self, source: Source) -> Any:
        return source.blob(self._where, self._length.read(source))


class _Optional:
    """X or nil."""

    def __init__(self, field: Field) -> None:
        self._field = field

    def write(self, value: Any, blobs: list[Buffer]) -> Any:
        return None if value is None else self._field.write(value, blobs)

    def read(self, source: Source) -> Any:
        return None if source.is_nil() else self._field.read(source)


class _Many:
    """tuple[X, ...], as an array."""

    def __init__(self, item: Field, where: str) -> None:
        self._item = item
        self._where = where
        self._bounds = _BOUNDS.get(where, _ANY_SIZE)

    def write(self, value: Any, blobs: list[Buffer]) -> Any:
        _check_tuple(value, self._where, self._bounds)
        return [self._item.write(item, blobs) for item in value]

    def read(self, source: Source) -> Any:
        return tuple([self._item.read(source) for _ in range(source.array(self._where, self._bounds))])


class _Integers:
    """tuple[int, ...], as an array: token ids, mostly, and many of them."""

    def __init__(self, where: str) -> None:
        self._item = _Scalar(int, f"{where}[]")
        self._where = where
        self._bounds = _BOUNDS.get(where, _ANY_SIZE)

    def write(self, value: Any, _blobs: list[Buffer]) -> Any:
        _check_tuple(value, self._where, self._bounds)
        self._item.check_all(value)
        return value

    def read(self, source: Source) -> Any:
        values = tuple([source.scalar() for _ in range(source.array(self._where, self._bounds))])
        self._item.check_all(values)
        return values


class _Few:
    """tuple[X, Y], as an array of just so many."""

    def __init__(self, items: Sequence[Field], where: str) -> None:
        self._items = items
        self._where = where

    def write(self, value: Any, blobs: list[Buffer]) -> Any:
        if type(value) is not tuple or len(value) != len(self._items):
            raise WireError(f"{self._where}: not a tuple of {len(self._items)}")
        return [field.write(item, blobs) for field, item in zip(self._items, value, strict=True)]

    def read(self, source: Source) -> Any:
        source.array(self._where, (len(self._items), len(self._items)))
        return tuple([field.read(source) for field in self._items])


class _Table:
    """Mapping[str, X], as a map."""

    def __init__(self, value: Field, where: str) -> None:
        self._key = _Scalar(str, f"{where} key")
        self._value = value
        self._where = where

    def write(self, value: Any, blobs: list[Buffer]) -> Any:
        if not isinstance(value, Mapping):
            raise WireError(f"{self._where}: not a mapping")
        return {self._key.write(key, blobs): self._value.write(item, blobs) for key, item in value.items()}

    def read(self, source: Source) -> Any:
        pairs = range(source.map(self._where, _ANY_SIZE))
        table = {self._key.read(source): self._value.read(source) for _ in pairs}
        if len(table) != len(pairs):
            raise WireError(f"{self._where}: a key stands there twice")
        return table


class _Record:
    """A dataclass: as an array inside a message, as a map where it is the message."""

    def __init__(self, kind: type[Any]) -> None:
        hints = get_type_hints(kind)
        self.kind = kind
        self._fields = {f.name: _field(hints[f.name], f"{kind.__name__}.{f.name}") for f in fields(kind)}
        self._defaults = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(kind)
        }
        required = [place for place, default in enumerate(self._defaults.values(), 1) if default is MISSING]
        self._required = {f.name for f in fields(kind) if self._defaults[f.name] is MISSING}
        self._bounds: Bounds = (max(required, default=0), len(self._fields))
        #: One for all that have nothing but defaults; hashed to be sure that all of it is frozen.
        self._plain = None if required else kind()
        hash(self._plain)

    def write(self, value: Any, blobs: list[Buffer]) -> Any:
        self._check(value)
        if self._plain is not None and value == self._plain:
            return []
        names = list(self._fields)
        while len(names) > self._bounds[0] and self._is_default(value, names[-1]):
            names.pop()
        return [self._fields[name].write(getattr(value, name), blobs) for name in names]

    def read(self, source: Source) -> Any:
        count = source.array(self.kind.__name__, self._bounds)
        if not count:
            return self._plain
        return self.kind(**{name: field.read(source) for name, field in islice(self._fields.items(), count)})

    def write_map(self, value: Any, blobs: list[Buffer]) -> dict[str, Any]:
        """By name, without what equals its default."""
        self._check(value)
        names = [name for name in self._fields if not self._is_default(value, name)]
        return {name: self._fields[name].write(getattr(value, name), blobs) for name in names}

    def read_map(self, source: Source, pairs: int) -> Any:
        """The reverse, where so many pairs are left of the map."""
        values: dict[str, Any] = {}
        for _ in range(pairs):
            name = _KEY.read(source)
            if name not in self._fields or name in values:
                raise WireError(f"{self.kind.__name__}: an unknown or repeated field")
            values[name] = self._fields[name].read(source)
        if missing := self._required - values.keys():
            raise WireError(f"{self.kind.__name__}: without {', '.join(sorted(missing))}")
        return self.kind(**values)

    def _check(self, value: Any) -> None:
        if type(value) is not self.kind:
            raise WireError(f"not a {self.kind.__name__}")

    def _is_default(self, value: Any, name: str) -> bool:
        return bool(getattr(value, name) == self._defaults[name])


def write_message(message: Message) -> tuple[dict[str, Any], list[Buffer]]:
    """The header's map, and the blobs to stand behind it. Raises: WireError."""
    kind = _KINDS.get(type(message))
    if kind is None:
        raise WireError("no kind of message")
    blobs: list[Buffer] = []
    return {_KIND: kind, **_RECORDS[kind].write_map(message, blobs)}, blobs


def read_message(source: Source) -> Message:
    """The one message of a header. Raises: WireError."""
    pairs = source.map("the header", (1, math.inf))
    if _KEY.read(source) != _KIND:
        raise WireError("the header does not begin with its kind")
    record = _RECORDS.get(_KEY.read(source))
    if record is None:
        raise WireError("an unknown kind of message")
    message: Message = record.read_map(source, pairs - 1)
    source.finish()
    return message


def _field(hint: Any, where: str) -> Field:
    """How a field of this type travels; `where` names it in errors and in _BOUNDS."""
    arguments = get_args(hint)
    if hint == bytes | memoryview:
        return _Blob(where)
    if hint in _SCALAR_BOUNDS:
        return _Scalar(hint, where)
    if get_origin(hint) is UnionType:
        return _Optional(_field(arguments[0], where))
    if get_origin(hint) is tuple:
        return _tuple_field(arguments, where)
    if get_origin(hint) is Mapping:
        return _Table(_field(arguments[1], f"{where}[]"), where)
    return _Choice(hint, where) if issubclass(hint, StrEnum) else _Record(hint)


def _tuple_field(arguments: tuple[Any, ...], where: str) -> Field:
    if arguments[-1] is not Ellipsis:
        return _Few([_field(hint, f"{where}[]") for hint in arguments], where)
    return _Integers(where) if arguments[0] is int else _Many(_field(arguments[0], f"{where}[]"), where)


def _check_tuple(value: Any, where: str, bounds: Bounds) -> None:
    if type(value) is not tuple or not bounds[0] <= len(value) <= bounds[1]:
        raise WireError(f"{where}: not a tuple, or too few or too many items")


_KIND = "kind"
_KEY = _Scalar(str, "a key of the header")
_RECORDS: Mapping[str, _Record] = {name: _Record(kind) for name, kind in KINDS.items()}
_KINDS: Mapping[type, str] = {kind: name for name, kind in KINDS.items()}
