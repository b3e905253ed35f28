"""Full matches of the regular expressions in a ``pattern_dict``.

They come with the file, and Python's ``re`` can be made to take for ever. This matcher follows all alternatives at
once, so its time is bounded by the lengths of pattern and name. It knows literals, ``.``, ``\\d``, ``\\w``, character
sets, groups, ``|`` and the repeats ``*``, ``+``, ``?``; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from bitforbit.errors import Df11FormatError

_Positions = frozenset[int]
_Node = Callable[[str, _Positions], _Positions]

_MAX_PATTERN = 1000
_MAX_DEPTH = 6  # a level may triple the work


def fullmatch(pattern: str, name: str) -> bool:
    """Whether the whole of ``name`` matches. Raises Df11FormatError for an expression this module does not know."""
    return len(name) in _compile(pattern)(name, frozenset([0]))


@lru_cache(maxsize=256)
def _compile(pattern: str) -> _Node:
    if len(pattern) > _MAX_PATTERN:
        raise Df11FormatError(f"a unit pattern of {len(pattern)} characters exceeds {_MAX_PATTERN}")
    parser = _Parser(pattern)
    node = parser.alternatives(0)
    if parser.at < len(pattern):
        raise parser.unknown()
    return node


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def unknown(self) -> Df11FormatError:
        return Df11FormatError(
            f"unit pattern {self.pattern!r}: expected literals, \\d, \\w, [sets], groups, | and *, +, ? at position "
            f"{self.at}; give the units in a file of your own"
        )

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self) -> str:
        char = self.peek()
        if not char:
            raise self.unknown()
        self.at += 1
        return char

    def alternatives(self, depth: int) -> _Node:
        if depth > _MAX_DEPTH:
            raise self.unknown()
        branches = [self.sequence(depth)]
        while self.peek() == "|":
            self.at += 1
            branches.append(self.sequence(depth))
        return lambda text, at: frozenset().union(*(branch(text, at) for branch in branches))

    def sequence(self, depth: int) -> _Node:
        nodes: list[_Node] = []
        while self.peek() not in ("", "|", ")"):
            nodes.append(self.repeat(self.atom(depth)))

        def run(text: str, at: _Positions) -> _Positions:
            for node in nodes:
                if not at:
                    break
                at = node(text, at)
            return at

        return run

    def repeat(self, node: _Node) -> _Node:
        mark = self.peek()
        if mark not in ("*", "+", "?") or not mark:
            return node
        self.at += 1
        if self.peek() in ("*", "+", "?", "{") and self.peek():
            raise self.unknown()

        def run(text: str, at: _Positions) -> _Positions:
            reached = frozenset() if mark == "+" else at
            fresh = at
            while fresh:
                fresh = node(text, fresh) - reached
                reached |= fresh
                if mark == "?":
                    break
            return reached

        return run

    def atom(self, depth: int) -> _Node:
        char = self.take()
        if char == "(":
            if self.peek() == "?":
                self.at += 1
                if self.take() != ":":
                    raise self.unknown()
            node = self.alternatives(depth + 1)
            if self.take() != ")":
                raise self.unknown()
            return node
        if char == "[":
            return _one(self.char_set())
        if char == "\\":
            return _one(self.escape())
        if char == ".":
            return _one(lambda c: c != "\n")
        if char in "*+?{}^$)]":
            self.at -= 1
            raise self.unknown()
        return _one(lambda c: c == char)

    def escape(self) -> Callable[[str], bool]:
        char = self.take()
        if char == "d":
            return lambda c: "0" <= c <= "9"
        if char == "w":
            return lambda c: c.isalnum() or c == "_"
        if char.isalnum():
            raise self.unknown()
        return lambda c: c == char

    def char_set(self) -> Callable[[str], bool]:
        tests: list[Callable[[str], bool]] = []
        negated = self.peek() == "^"
        self.at += negated
        while self.peek() != "]" or not tests:
            char = self.take()
            if char == "\\":
                tests.append(self.escape())
                continue
            last = char
            if self.peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                last = self.take()
                if last == "\\":
                    raise self.unknown()
            tests.append(lambda c, low=char, high=last: low <= c <= high)  # type: ignore[misc]
        self.at += 1
        return lambda c: any(test(c) for test in tests) != negated


def _one(test: Callable[[str], bool]) -> _Node:
    """One character that passes a test."""
    return lambda text, at: frozenset(i + 1 for i in at if i < len(text) and test(text[i]))
