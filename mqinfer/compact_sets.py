"""Sets of numbers that take a few bits or bytes each, where Python's takes 66 bytes: for files of a million lines."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(slots=True)
class LineSet:
    """A set of line numbers, one bit each."""

    _bits: bytearray = field(default_factory=bytearray)

    def add(self, number: int) -> bool:
        """Whether it is new."""
        byte, bit = divmod(number, 8)
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 4096 - len(self._bits)))
        new = not self._bits[byte] >> bit & 1
        self._bits[byte] |= 1 << bit
        return new

    def __contains__(self, number: int) -> bool:
        byte, bit = divmod(number, 8)
        return byte < len(self._bits) and bool(self._bits[byte] >> bit & 1)


#: What a set is told to expect takes no more than this at once: a file of a billion blank lines has no ids at all.
MOST_EXPECTED = 2**22


class FingerprintSet:
    """A set of evenly spread 64-bit numbers, 10 to 20 bytes each: a table in which each stands at or after its place.

    A set that is told how many to `expect`, up to MOST_EXPECTED, takes 10, and does not have its table twice to grow.
    """

    def __init__(self, expect: int = 0) -> None:
        self._table = _table(max(64, min(expect, MOST_EXPECTED) * 5 // 4 + 1))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, number: int) -> bool:
        """Whether it is new."""
        number = number or 1  # 0 is a free place; that two numbers are one is as likely for any two fingerprints
        place = self._place(number)
        if self._table[place]:
            return False
        self._table[place] = number
        self._count += 1
        if 5 * self._count > 4 * len(self._table):
            self._grow()
        return True

    def __contains__(self, number: int) -> bool:
        return bool(self._table[self._place(number or 1)])

    def _place(self, number: int) -> int:
        """Where it stands, or the free place where it would."""
        table, size = self._table, len(self._table)
        place = number % size
        while (found := table[place]) and found != number:
            place = place + 1 if place + 1 < size else 0
        return place

    def _grow(self) -> None:
        numbers = self._table
        self._table = _table(2 * len(numbers))
        for number in numbers:
            if number:
                self._table[self._place(number)] = number


def _table(places: int) -> array[int]:
    """So many free ones."""
    return array("Q", bytes(8 * places))
