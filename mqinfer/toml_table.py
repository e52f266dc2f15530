"""TOML files that people edit: read key by key with errors that name the key, and replaced whole.

What the keys mean is not known here; settings have a reader of their own (`settings.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mqinfer.errors import PlanError

_T = TypeVar("_T")
_KINDS: Mapping[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a table",
}


class Table:
    """One TOML table, from which every key is taken once."""

    def __init__(self, values: Mapping[str, Any], prefix: str) -> None:
        self._values = dict(values)
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def take(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        """The value of the key. Raises: PlanError where it is of another kind, or missing without a default."""
        if key not in self._values:
            if default is not None:
                return default
            raise PlanError(f"{self._prefix}{key}: missing")
        value = self._values.pop(key)
        if kind is float and type(value) is int:
            if abs(value) > sys.float_info.max:
                raise PlanError(f"{self._prefix}{key}: {value} is too large")
            value = float(value)
        if type(value) is not kind:
            raise PlanError(f"{self._prefix}{key}: {value!r} is not {_KINDS[kind]}")
        return value

    def finish(self) -> None:
        """Raises: PlanError that names the keys nobody took."""
        if self._values:
            raise PlanError(f"unknown key: {', '.join(self._prefix + key for key in self._values)}")


def document(text: str) -> Table:
    """The whole file's table. Raises: PlanError."""
    try:
        return Table(tomllib.loads(text), "")
    except ValueError as error:  # TOMLDecodeError; and int's own, of thousands of digits
        raise PlanError(f"not TOML: {error}") from error
    except RecursionError as error:
        raise PlanError("not TOML: its brackets are nested too deeply") from error


def string(text: str) -> str:
    """A TOML basic string: JSON's escapes are a part of TOML's, but for DEL, which JSON leaves bare."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_file(path: str | Path, what: str, loads: Callable[[str], _T]) -> _T:
    """What `loads` makes of the file. Raises: PlanError that names the file, and the key at fault."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"can't read {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: not UTF-8 text") from error
    except ValueError as error:  # no path has a NUL
        raise PlanError(f"can't read {what} {str(path)!r}: {error}") from error
    try:
        return loads(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def replace_file(path: str | Path, what: str, text: str) -> None:
    """Put the text into the file, which is at any moment the old one or the new one, whole. Raises: PlanError."""
    target = Path(path)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(target)
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()
    except OSError as error:
        raise PlanError(f"can't write {what} {path}: {error.strerror}") from error
