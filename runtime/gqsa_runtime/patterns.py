"""Measures regular expressions of tokenizers, so that those that could take for ever are refused.

The library matches with Oniguruma, which backtracks: `(a+)+b` or `a*a*a*b` take time that grows out of all bounds
with the text. What tokenizers need is less: classes of characters, counts of one thing, a few alternatives, looks
ahead and behind. This parser knows that much, refuses the rest by name, and counts in how many ways a pattern can
try to match at one place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

MAX_CHARACTERS = 4096  # those of today's models have up to 700
_MAX_NESTING = 16
_MAX_COUNT = 256
_MAX_WAYS = 4096
_UNBOUNDED = math.inf
_NAMED_LETTERS = frozenset("wWsSdDhHRX")  # classes; R and X match up to two and more characters
_ANCHOR_LETTERS = frozenset("bBAzZG")
_PLAIN_ESCAPES = frozenset("tnrfvae")


class PatternError(ValueError):
    """A pattern that is refused; the message says what of it."""


@dataclass(frozen=True)
class _Part:
    """What a part of a pattern can do.

    least, most: characters that it takes. fails: whether it can fail to match. ways: in how many ways it can match at
    one place, one of any number counted as one. searches: how many repetitions of any number stand where what follows
    may fail, so that each is tried at every length. plain: neither alternatives nor a choice of length.
    """

    least: int = 0
    most: float = 0
    fails: bool = False
    ways: int = 1
    searches: int = 0
    repeats: int = 0  # repetitions of any number that end it: they search if what follows fails
    plain: bool = True


_ANCHOR = _Part(fails=True)
_CHARACTER = _Part(1, 1, fails=True)


def shortest_match(pattern: str) -> int:
    """The fewest characters that a pattern matches. Raises PatternError where it may take too long, or is none."""
    if len(pattern) > MAX_CHARACTERS:
        raise PatternError(f"it has {len(pattern)} characters, allowed are {MAX_CHARACTERS}")
    parser = _Parser(pattern)
    part = parser.alternatives()
    if parser.place < len(pattern):
        raise PatternError(f"a ) at character {parser.place} closes nothing")
    return part.least


class _Parser:
    """Recursive descent over one pattern. place: of the next character."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self.place, self._depth = pattern, 0, 0

    def _peek(self, text: str) -> bool:
        return self._pattern.startswith(text, self.place)

    def _take(self, text: str) -> bool:
        found = self._peek(text)
        self.place += len(text) if found else 0
        return found

    def _next(self) -> str:
        if self.place == len(self._pattern):
            raise PatternError("it ends too early")
        self.place += 1
        return self._pattern[self.place - 1]

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > _MAX_NESTING:
            raise PatternError(f"its groups are nested more than {_MAX_NESTING} deep")

    def alternatives(self) -> _Part:
        """Alternatives up to a `)` or the end."""
        self._enter()
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        self._depth -= 1
        if len(options) == 1:
            return options[0]
        return _checked(
            least=min(option.least for option in options),
            most=max(option.most for option in options),
            fails=all(option.fails for option in options),
            ways=sum(option.ways for option in options),
            searches=max(option.searches for option in options),
            repeats=max(option.repeats for option in options),
            plain=False,
        )

    def _sequence(self) -> _Part:
        part = _Part()
        while self.place < len(self._pattern) and self._pattern[self.place] not in "|)":
            part = _joined(part, self._repeated())
        return part

    def _repeated(self) -> _Part:
        part = self._atom()
        while True:
            counts = self._counts()
            if counts is None:
                return part
            # Lazy and possessive forms match no more than greedy ones. After a brace the sign is a repetition itself.
            _ = self._pattern[self.place - 1] != "}" and (self._take("?") or self._take("+"))
            part = _repeat(part, *counts)

    def _counts(self) -> tuple[int, float] | None:
        for sign, counts in (("*", (0, _UNBOUNDED)), ("+", (1, _UNBOUNDED)), ("?", (0, 1))):
            if self._take(sign):
                return counts
        end = self._pattern.find("}", self.place)
        if not self._peek("{") or end < 0:
            return None
        least, comma, most = self._pattern[self.place + 1 : end].partition(",")
        if not (least + most).isascii() or not (least + most).isdigit():
            return None  # a brace that stands for itself
        self.place = end + 1
        low = int(least[:9] or 0)
        high = (int(most[:9]) if most else _UNBOUNDED) if comma else low
        if max(low, high if high != _UNBOUNDED else 0) > _MAX_COUNT or high < low:
            raise PatternError(f"it repeats something {{{least}{comma}{most}}} times, allowed are up to {_MAX_COUNT}")
        return low, high

    def _atom(self) -> _Part:
        sign = self._next()
        if sign == "(":
            return self._group()
        if sign == "[":
            self._class()
            return _CHARACTER
        if sign == "\\":
            return self._escape(inside_class=False)
        if sign in "^$":
            return _ANCHOR
        if sign in "*+?":
            raise PatternError(f"the {sign} at character {self.place - 1} repeats nothing")
        return _CHARACTER

    def _group(self) -> _Part:
        kind = next((kind for kind in ("?:", "?=", "?!", "?<=", "?<!", "?>") if self._take(kind)), None)
        if kind is None and self._take("?"):
            while self._next() in "im-":
                pass
            self.place -= 1
            if self._take(")"):
                return _Part()
            if not self._take(":"):
                raise PatternError(f"it has a group (?{self._next()}, which is not supported")
        elif kind is None and self._peek("*"):
            raise PatternError("it has a call (*, which is not supported")
        part = self.alternatives()
        if not self._take(")"):
            raise PatternError("a ( is not closed")
        if kind in ("?:", "?>", None):
            return part
        if kind in ("?<=", "?<!") and part.most == _UNBOUNDED:
            raise PatternError("it looks behind for any number of characters")
        # A look takes nothing; what it holds is tried as often as what stands around it.
        return _Part(fails=True, ways=part.ways, searches=part.searches, plain=False)

    def _escape(self, inside_class: bool) -> _Part:
        letter = self._next()
        if letter in "pP":
            end = self._pattern.find("}", self.place)
            if not self._take("{") or end < 0 or end - self.place > 40:
                raise PatternError(f"a \\{letter} names no property in braces")
            self.place = end + 1
        elif letter in "xu":
            if self._take("{"):
                self.place = self._pattern.find("}", self.place) + 1 or len(self._pattern)
            else:
                self._hexadecimal(2 if letter == "x" else 4)
        elif letter in _ANCHOR_LETTERS and not inside_class:
            return _ANCHOR
        elif letter in "RX" and not inside_class:
            return _Part(1, _UNBOUNDED, fails=True, plain=False)
        elif letter.isascii() and letter.isalnum() and letter not in _NAMED_LETTERS | _PLAIN_ESCAPES | {"b", "0"}:
            # References to groups, calls of groups and the like.
            raise PatternError(f"it has a \\{letter}, which is not supported")
        return _CHARACTER

    def _hexadecimal(self, most: int) -> None:
        for _ in range(most):
            if self._pattern[self.place : self.place + 1] not in frozenset("0123456789abcdefABCDEF"):
                return
            self.place += 1

    def _class(self) -> None:
        """The rest of a `[...]`, in which others may stand."""
        self._enter()
        self._take("^")
        self._take("]")  # the first stands for itself
        while (sign := self._next()) != "]":
            if sign == "[" and not self._posix_class():
                self._class()
            elif sign == "\\":
                self._escape(inside_class=True)
        self._depth -= 1

    def _posix_class(self) -> bool:
        end = self._pattern.find(":]", self.place)
        found = self._peek(":") and 0 < end - self.place < 16
        if found:
            self.place = end + 2
        return found


def _joined(left: _Part, right: _Part) -> _Part:
    """One part after another."""
    searches = left.searches + right.searches + (left.repeats if right.fails else 0)
    return _checked(
        least=left.least + right.least,
        most=left.most + right.most,
        fails=left.fails or right.fails,
        ways=left.ways * right.ways,
        searches=searches,
        repeats=right.repeats + (0 if right.fails else left.repeats),
        plain=left.plain and right.plain,
    )


def _repeat(part: _Part, low: int, high: float) -> _Part:
    if (low, high) == (0, 1):
        return _checked(most=part.most, ways=part.ways + 1, searches=part.searches, repeats=part.repeats, plain=False)
    if (low, high) == (1, 1):
        return part
    if not part.plain or part.searches or part.repeats:
        raise PatternError("it repeats something of many lengths or alternatives, which may take for ever")
    if part.least == 0:
        raise PatternError("it repeats something that takes no character")
    if high == _UNBOUNDED:
        return _checked(least=part.least * low, most=_UNBOUNDED, fails=low > 0, repeats=1, plain=False)
    return _checked(
        least=part.least * low,
        most=part.most * high,
        fails=low > 0,
        ways=int(high) - low + 1,
        plain=low == high,
    )


def _checked(**fields: Any) -> _Part:
    part = _Part(**fields)
    if part.searches > 1:
        raise PatternError("it tries several repetitions of any length against each other, which may take for ever")
    if part.ways > _MAX_WAYS or part.least > _MAX_WAYS:
        raise PatternError("it can match in too many ways")
    return part
