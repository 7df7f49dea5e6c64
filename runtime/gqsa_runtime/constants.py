"""Kinds of constants that are stamped into kernels, and whether a value is of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MAX_INT = 2**31 - 1  # kernels index with 32 bits
_MAX_NUMBER = 3.4e38  # kernels calculate with float32

SIZE, COUNT, NUMBER, FLAG = "an integer from 1", "an integer from 0", "a number that float32 holds", "true or false"

# One of the kinds above, or a tuple of the allowed values.
Rule = str | tuple[Any, ...]

# Constants of a kernel by name: numbers, flags and names.
Params = Mapping[str, Any]


def allowed(value: Any, rule: Rule) -> bool:
    """Whether a constant is of the kind `rule`, type and range."""
    if isinstance(rule, tuple):
        # True == 1 and 8.0 == 8: the type counts too.
        return any(type(value) is type(choice) and value == choice for choice in rule)
    if rule is FLAG:
        return type(value) is bool
    if rule is NUMBER:
        return type(value) in (int, float) and -_MAX_NUMBER <= value <= _MAX_NUMBER  # NaN is not
    return type(value) is int and (1 if rule is SIZE else 0) <= value <= _MAX_INT


def shown(value: object) -> str:
    """A value as a message shows it: a number from a file may have thousands of digits."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
