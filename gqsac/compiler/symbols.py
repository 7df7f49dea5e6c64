"""What the nodes of a traced graph stand for while `legalize` walks it, and where their elements are.

An activation is known by the positions of its elements in the IR value that holds them, an int64 tensor
of the activation's traced shape. A view, transpose, slice or concatenation of activations is then that
very operation on positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gqsac.compiler.passes.trace import N_TOKENS


@dataclass(frozen=True)
class Rows:
    """An activation: element e is factor * value[positions[e] // width, positions[e] % width]."""

    value: str
    width: int
    positions: Tensor
    factor: float = 1.0


@dataclass(frozen=True)
class Rotated:
    """`source` after rotary embedding along its last axis, the head's features; only attention reads it."""

    source: Rows
    table: str


@dataclass(frozen=True)
class Angles:
    """cos or sin of a rotary table."""

    table: str


@dataclass(frozen=True)
class Mask:
    """A causal mask; window 0: no sliding window."""

    window: int


@dataclass(frozen=True)
class Weight:
    """A parameter by its state-dict name."""

    name: str
    shape: tuple[int, ...]


def rows_of(value: str, width: int, shape: torch.Size, axis: int) -> Rows:
    """A whole value [N_TOKENS, width], laid out in a traced shape whose axis `axis` is that of the tokens."""
    others = [size for i, size in enumerate(shape) if i != axis]
    return Rows(value, width, torch.arange(N_TOKENS * width).reshape(N_TOKENS, *others).movedim(0, axis))


def token_axis(rows: Rows) -> int | None:
    """The axis along which each step goes to the next token's row."""
    for axis, size in enumerate(rows.positions.shape):
        if size == N_TOKENS:
            by_token = rows.positions.movedim(axis, 0).reshape(N_TOKENS, -1)
            first = torch.arange(N_TOKENS)[:, None] * rows.width
            if torch.equal(by_token, first + by_token[0]) and int(by_token[0].max()) < rows.width:
                return axis
    return None


def column_run(rows: Rows) -> tuple[int, int] | None:
    """(start, count) if the activation is columns start, start + 1, ... of its value, in order."""
    axis = token_axis(rows)
    if axis is None:
        return None
    columns = rows.positions.select(axis, 0).flatten()
    start, count = int(columns[0]), len(columns)
    return (start, count) if torch.equal(columns, torch.arange(start, start + count)) else None


def is_constant(args: object) -> bool:
    """Whether nothing among (nested) arguments depends on tokens or parameters."""
    if isinstance(args, (tuple, list)):
        return all(is_constant(arg) for arg in args)
    if isinstance(args, dict):
        return all(is_constant(arg) for arg in args.values())
    return not isinstance(args, (Rows, Rotated, Angles, Mask, Weight))


def scalar(x: object) -> float | None:
    """The number that x is, if it is one."""
    if isinstance(x, (int, float)):
        return float(x)
    return float(x) if isinstance(x, Tensor) and x.numel() == 1 else None
