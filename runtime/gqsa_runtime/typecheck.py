"""Checks parsed JSON against the type hints of the dataclasses it was read into."""

from __future__ import annotations

import dataclasses
import functools
import reprlib
import types
import typing
from typing import Any

_PLAIN = frozenset((bool, int, float, str))


def conforms(value: object, hint: Any) -> str | None:
    """What is wrong with a value that should have the type `hint`, as "where is what", or None.

    Knows dataclasses, dict[K, V], tuple[X, ...], tuple[X, Y], unions, plain classes and Any. A bool is no
    int, an int is a float.
    """
    wrong = _check(value, hint)
    return None if wrong is None else getattr(hint, "__name__", "value").lower() + wrong


def _check(value: Any, hint: Any) -> str | None:
    """What is wrong, as what follows the name of the value: where in it, and what."""
    if type(value) is hint and hint in _PLAIN:  # nearly all values
        return None
    origin, args, fields = _parts(hint)
    if fields is not None:
        if type(value) is not hint:
            return _mismatch(value, hint.__name__)
        for name, field_hint in fields:
            wrong = _check(getattr(value, name), field_hint)
            if wrong:
                return f".{name}{wrong}"
        return None
    if origin in (typing.Union, types.UnionType):
        for option in args:
            if _check(value, option) is None:
                return None
        return _mismatch(value, " or ".join(getattr(option, "__name__", "null") for option in args))
    if origin is dict or hint is dict:
        if type(value) is not dict:
            return _mismatch(value, "an object")
        for key, item in value.items():
            wrong = _check(item, args[1]) if args else None
            if wrong:
                return f"[{str(key)[:80]!r}]{wrong}"
        return None
    if origin is tuple:
        if type(value) is not tuple:
            return _mismatch(value, "a list")
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(hints) != len(value):
            return _mismatch(value, f"{len(hints)} values")
        for index, (item, item_hint) in enumerate(zip(value, hints, strict=True)):
            wrong = _check(item, item_hint)
            if wrong:
                return f"[{index}]{wrong}"
        return None
    if hint is Any or type(value) is hint or (hint is float and type(value) is int):
        return None
    return _mismatch(value, hint.__name__)


@functools.cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...] | None]:
    """(origin, arguments) of a generic, and of a dataclass (name, type hint) of each field, else None."""
    fields = tuple(typing.get_type_hints(hint).items()) if dataclasses.is_dataclass(hint) else None
    return typing.get_origin(hint), typing.get_args(hint), fields


def printable(text: str) -> str:
    """A text of whoever made a file, as it may go to a terminal: escapes in place of what would move that."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def brief(value: object) -> str:
    """A value as a message shows it: its beginning, in ASCII, whatever is nested in it and how deep."""
    text = value[:80] if isinstance(value, str) else reprlib.repr(value)[:80]
    return ascii(text) if isinstance(value, str) else text.encode("ascii", "backslashreplace").decode()


def _mismatch(value: object, expected: str) -> str:
    shown = value if isinstance(value, str) else reprlib.repr(value)
    return f" is {shown[:80]!r} ({type(value).__name__}), expected {expected}"
