"""The header of a body as a stream of msgpack scalars, and the blobs behind it.

Reading is driven by the expected type, one scalar at a time. A generic unpack would first build whatever the header
says: each array sets aside memory for the length that it merely declares, so 5 KiB of nested arrays ask for gigabytes.
msgpack is at home here and nowhere else; which fields a message has is wire_fields.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgpack

from mqinfer.errors import WireError

Bounds = tuple[float, float]

#: Blobs begin at multiples of this, counted from the body's first byte.
ALIGNMENT = 64

_NIL = 0xC0


def packed(header: Mapping[str, Any]) -> bytes:
    """The header's bytes. Raises: WireError where a string is not Unicode (a lone surrogate)."""
    try:
        return bytes(msgpack.packb(header))
    except ValueError as error:
        raise WireError(f"the header can't be written: {type(error).__name__}") from None


@contextmanager
def unpacking() -> Iterator[None]:
    """Foreign errors become WireError. Not chained: theirs may hold content, which belongs in no traceback."""
    try:
        yield
    except (msgpack.UnpackException, ValueError) as error:
        raise WireError(f"the header can't be read: {type(error).__name__}") from None


class Source:
    """A header being read, and the blobs behind it: each is used once, in order, with zeros between them."""

    def __init__(self, body: memoryview, start: int, end: int) -> None:
        self._body = body
        self._header = body[start:end]
        self._blobs_end = end
        # No limit but zero is needed for what `scalar` may not build: arrays and maps are entered by their headers.
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=max(1, end - start), max_array_len=0, max_map_len=0, max_bin_len=0, max_ext_len=0
        )
        self._unpacker.feed(self._header)
        #: The next scalar, of whatever type.
        self.scalar = self._unpacker.unpack

    def array(self, where: str, bounds: Bounds) -> int:
        """Enter an array; how many items it has."""
        return self._fits(self._unpacker.read_array_header(), where, bounds)

    def map(self, where: str, bounds: Bounds) -> int:
        """Enter a map; how many pairs it has."""
        return self._fits(self._unpacker.read_map_header(), where, bounds)

    def _fits(self, items: int, where: str, bounds: Bounds) -> int:
        left_bytes = len(self._header) - self._unpacker.tell()
        if not bounds[0] <= items <= min(bounds[1], left_bytes):
            raise WireError(f"{where}: {items} items are too few or too many")
        return items

    def is_nil(self) -> bool:
        """Whether the next scalar is nil; it is skipped then."""
        at = self._unpacker.tell()
        if at >= len(self._header) or self._header[at] != _NIL:
            return False
        self._unpacker.skip()
        return True

    def blob(self, where: str, length: int) -> memoryview:
        """The next blob: a view of the body."""
        start = self._blobs_end + -self._blobs_end % ALIGNMENT
        if start + length > len(self._body):
            raise WireError(f"{where}: {length} bytes go beyond the end of the body")
        if any(self._body[self._blobs_end : start]):
            raise WireError(f"{where}: the bytes before it are not zero")
        self._blobs_end = start + length
        return self._body[start : self._blobs_end]

    def finish(self) -> None:
        """Raises: WireError if anything is left over."""
        if self._unpacker.tell() != len(self._header):
            raise WireError("the header goes on after its map")
        if self._blobs_end != len(self._body):
            raise WireError("the body goes on after its blobs")
