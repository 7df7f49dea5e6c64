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
    return _check(value, hint, getattr(hint, "__name__", "value").lower())


def _check(value: Any, hint: Any, where: str) -> str | None:
    if type(value) is hint and hint in _PLAIN:  # nearly all values
        return None
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    fields = _fields(hint)
    if fields is not None:
        if type(value) is not hint:
            return _mismatch(value, where, hint.__name__)
        for name, field_hint in fields.items():
            wrong = _check(getattr(value, name), field_hint, f"{where}.{name}")
            if wrong:
                return wrong
        return None
    if origin in (typing.Union, types.UnionType):
        if any(_check(value, option, where) is None for option in args):
            return None
        return _mismatch(value, where, " or ".join(getattr(option, "__name__", "null") for option in args))
    if origin is dict or hint is dict:
        if type(value) is not dict:
            return _mismatch(value, where, "an object")
        for key, item in value.items():
            wrong = _check(item, args[1], f"{where}[{str(key)[:80]!r}]") if args else None
            if wrong:
                return wrong
        return None
    if origin is tuple:
        if type(value) is not tuple:
            return _mismatch(value, where, "a list")
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(hints) != len(value):
            return _mismatch(value, where, f"{len(hints)} values")
        for index, (item, item_hint) in enumerate(zip(value, hints, strict=True)):
            wrong = _check(item, item_hint, f"{where}[{index}]")
            if wrong:
                return wrong
        return None
    if hint is Any or type(value) is hint or (hint is float and type(value) is int):
        return None
    return _mismatch(value, where, hint.__name__)


@functools.cache
def _fields(hint: Any) -> dict[str, Any] | None:
    """Type hints of a dataclass, by field; None for any other hint."""
    return typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else None


def brief(value: object) -> str:
    """A value as a message shows it: its beginning, in ASCII, whatever is nested in it and how deep."""
    text = value[:80] if isinstance(value, str) else reprlib.repr(value)[:80]
    return ascii(text) if isinstance(value, str) else text.encode("ascii", "backslashreplace").decode()


def _mismatch(value: object, where: str, expected: str) -> str:
    shown = value if isinstance(value, str) else reprlib.repr(value)
    return f"{where} is {shown[:80]!r} ({type(value).__name__}), expected {expected}"
