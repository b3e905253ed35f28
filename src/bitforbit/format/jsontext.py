"""JSON from files that nobody vouches for: strict parsing, and typed access that names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping

from bitforbit.errors import DuplicateKeyError, FormatError, ManifestError

MAX_INTEGER = (1 << 63) - 1
"""Largest size, offset or dimension that is accepted."""


def parse(data: bytes | str, *, where: str, error: type[FormatError], duplicate: type[FormatError]) -> object:
    """Parse UTF-8 JSON.

    Raises ``error`` for invalid UTF-8 or JSON (NaN and Infinity included), too deep nesting and text that is not
    Unicode, ``duplicate`` for an object that has the same key twice.
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    raise duplicate(f"{where}: expected every key once, got {key!r} twice; the file is damaged")
                seen.add(key)
        return result

    def constant(name: str) -> object:
        raise error(f"{where}: expected JSON, got {name}, which JSON does not have")

    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value: object = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except FormatError:
        raise
    except RecursionError:
        raise error(f"{where}: expected a flat JSON object, got one nested too deeply") from None
    except ValueError as e:  # UnicodeDecodeError, JSONDecodeError, integers of thousands of digits
        raise error(f"{where}: expected UTF-8 JSON, got {e}; the file is damaged or of another kind") from None
    if "\\u" in text and not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise error(f"{where}: expected text that is valid Unicode, got an unpaired surrogate; the file is damaged")
    return value


def parse_header_json(data: bytes, where: str, error: type[FormatError]) -> object:
    """:func:`parse` with the duplicate-key error of safetensors headers."""
    return parse(data, where=where, error=error, duplicate=DuplicateKeyError)


def is_size(value: object) -> bool:
    """Whether a JSON value is an integer from 0 to MAX_INTEGER; true and 1.0 are not."""
    return type(value) is int and 0 <= value <= MAX_INTEGER


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8 (JSON escapes can spell lone surrogates, which cannot)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class Fields:
    """Typed access to a JSON object; every mismatch is a ManifestError that names the member."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ManifestError(f"{where}: expected a JSON object, got {type(value).__name__}")
        self._members: Mapping[str, object] = value
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self._members

    def _fail(self, key: str, expected: str) -> ManifestError:
        got = repr(self._members[key])[:80] if key in self._members else "nothing"
        return ManifestError(f"{self.where}: expected {key!r} to be {expected}, got {got}")

    def text(self, key: str) -> str:
        """A string that can be written as UTF-8."""
        value = self._members.get(key)
        if not isinstance(value, str) or not is_unicode(value):
            raise self._fail(key, "a string")
        return value

    def size(self, key: str, maximum: int = MAX_INTEGER) -> int:
        """An integer from 0 to ``maximum``."""
        value = self._members.get(key)
        if type(value) is not int or not 0 <= value <= maximum:
            raise self._fail(key, f"an integer from 0 to {maximum}")
        return value

    def digest(self, key: str, digits: int) -> str:
        """A string of that many lower-case hex digits."""
        value = self._members.get(key)
        if not isinstance(value, str) or len(value) != digits or set(value) - set("0123456789abcdef"):
            raise self._fail(key, f"{digits} lower-case hex digits")
        return value

    def child(self, key: str) -> Fields:
        """A nested object."""
        if key not in self._members:
            raise self._fail(key, "an object")
        return Fields(self._members[key], f"{self.where}, {key!r}")

    def items(self) -> list[tuple[str, object]]:
        """All members, in the order of the file."""
        return list(self._members.items())

    def array(self, key: str) -> list[object]:
        """A list of anything."""
        value = self._members.get(key)
        if not isinstance(value, list):
            raise self._fail(key, "a list")
        return value
