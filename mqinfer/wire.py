"""Message <-> body: prefix, checksum, limits. docs/wire.md is the normative text.

A body is a 32-byte prefix, a header (wire_header.py, wire_fields.py) and blobs. Everything is checked before memory is
taken, and whatever a body holds, reading it ends in a message or in WireError. xxhash is at home here. No tensor and
no queue may be known here: what a blob means is tensor_codec.py's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import xxhash

from mqinfer.errors import WireError
from mqinfer.messages import Message, Step
from mqinfer.wire_fields import Buffer, read_message, write_message
from mqinfer.wire_header import ALIGNMENT, Source, packed, unpacking

#: What RabbitMQ 4 takes by default.
MAX_BODY_BYTES = 16 * 2**20
#: What we allow a step's hidden states, so that hops stay short.
MAX_STEP_BYTES = 4 * 2**20
#: A header can become 25 times its size in objects (tests/unit/test_hostile.py): of this, 100 MiB.
MAX_HEADER_BYTES = 4 * 2**20

MAGIC = b"\x93MQI"  # not ASCII: text can't be taken for it
VERSION = 1
PREFIX_BYTES = 32

_PREFIX = struct.Struct("<4sHHQQ")  # magic, version, flags, header bytes, bytes after the header; the checksum follows
_CHECKSUM = struct.Struct("<Q")


def encode(message: Message) -> bytes:
    """The message's body.

    Raises: WireError where `decode` would not take it: a field out of its bounds, or more than the limits allow.
    """
    fields, blobs = write_message(message)
    _check(message)
    header = packed(fields)
    behind = _aligned(blobs, PREFIX_BYTES + len(header))
    behind_bytes = sum(memoryview(part).nbytes for part in behind)
    _check_sizes(PREFIX_BYTES + len(header) + behind_bytes, MAX_BODY_BYTES, len(header))
    prefix = _PREFIX.pack(MAGIC, VERSION, 0, len(header), behind_bytes)
    return b"".join((prefix, _checksum((prefix, header, *behind)), header, *behind))


def decode(body: bytes | memoryview, *, limit_bytes: int = MAX_BODY_BYTES) -> Message:
    """The message in a body; its blobs are views of the body.

    Raises: WireError, and nothing else, whatever the body holds.
    """
    view = memoryview(body)
    header_end = _check_prefix(view, limit_bytes)
    with unpacking():
        message = read_message(Source(view, PREFIX_BYTES, header_end))
    _check(message)
    return message


def _aligned(blobs: list[Buffer], end: int) -> list[Buffer]:
    """The blobs with the zeros before each, to stand at offset `end`."""
    parts: list[Buffer] = []
    for blob in blobs:
        padding = -end % ALIGNMENT
        parts += (bytes(padding), blob)
        end += padding + memoryview(blob).nbytes
    return parts


def _check_prefix(body: memoryview, limit_bytes: int) -> int:
    """Where the header ends."""
    if body.nbytes < PREFIX_BYTES:
        raise WireError(f"{body.nbytes} bytes are too few for a body")
    magic, version, flags, header_bytes, behind_bytes = _PREFIX.unpack_from(body)
    if magic != MAGIC:
        raise WireError("not a body of mqinfer")
    if (version, flags) != (VERSION, 0):
        raise WireError(f"version {version} with flags {flags}: this is version {VERSION}")
    _check_sizes(body.nbytes, limit_bytes, header_bytes)
    if PREFIX_BYTES + header_bytes + behind_bytes != body.nbytes:
        raise WireError("the lengths in the prefix do not add up to the body's")
    if _checksum((body[: _PREFIX.size], body[PREFIX_BYTES:])) != body[_PREFIX.size : PREFIX_BYTES]:
        raise WireError("the checksum is wrong")
    return PREFIX_BYTES + int(header_bytes)


def _check_sizes(body_bytes: int, limit_bytes: int, header_bytes: int) -> None:
    if body_bytes > limit_bytes:
        raise WireError(f"a body of {body_bytes} bytes, the limit is {limit_bytes}")
    if header_bytes > MAX_HEADER_BYTES:
        raise WireError(f"a header of {header_bytes} bytes, the limit is {MAX_HEADER_BYTES}")


def _checksum(parts: Iterable[Buffer]) -> bytes:
    """Of all bytes but its own eight."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return _CHECKSUM.pack(digest.intdigest())


def _check(message: Message) -> None:
    """What no single field shows."""
    if isinstance(message, Step):
        _check_step(message)


def _check_step(step: Step) -> None:
    positions = sum(row.count for row in step.rows)
    if len({row.row for row in step.rows}) != len(step.rows):
        raise WireError("Step.rows: a row stands there twice")
    if len(step.route) < step.stage:
        raise WireError("Step.route: does not name the workers of earlier stages")
    if len(step.tokens) != (0 if step.stage else positions):
        raise WireError("Step.tokens: one for each new position on stage 0, none on others")
    if (step.hidden is None) != (step.stage == 0):
        raise WireError("Step.hidden: on all stages but 0")
    if step.hidden is not None and (len(step.hidden.shape) != 2 or step.hidden.shape[0] != positions):
        raise WireError("Step.hidden: not one vector for each new position")
