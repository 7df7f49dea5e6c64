"""What a weight layout is: how the weights of one linear are coded in a file, for every device.

A layout is one object in one file of this folder, and nothing outside that file knows how a weight is
coded: writer, reader, size counts and test oracles ask the object. Kernels have one header for CUDA and
one for CPUs, which the object names. `params` are a kernel's constants: of them a layout needs `rows`, `k`
and its own `constants`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqsa_runtime.constants import Params, Rule
from gqsa_runtime.format import TENSOR_TYPES

_BYTES = dict(TENSOR_TYPES.values())


@dataclass(frozen=True)
class Part:
    """One tensor that a layout stores. dtype: as in format.TENSOR_TYPES."""

    name: str
    dtype: str


class ContentRule(ABC):
    """What must be true of the numbers in an index tensor; rules with the same fields are equal.

    needs: parts of the linear that the rule compares the array with.
    """

    needs: tuple[str, ...] = ()

    @abstractmethod
    def broken(self, array: np.ndarray, *needed: np.ndarray) -> str | None:
        """How the array breaks the rule, in words that follow the tensor's name, or None."""


class Layout(ABC):
    """One way of storing a linear [rows, k], or one addend of it.

    op: the operator whose kernels read it, also the name of their templates. parts: its tensors, in the
    order of the kernels' arguments. constants: what of the operator's constants it adds to a linear's.
    headers: of the algorithm, by family. compressed: whether its weights are quantised. n_groups: what
    follows from the content alone, as the layout counts it, 0 where nothing does.
    """

    op: str
    parts: tuple[Part, ...]
    constants: Mapping[str, Rule]
    headers: Mapping[str, str]
    compressed: bool

    @abstractmethod
    def shapes(self, params: Params, n_groups: Any) -> dict[str, tuple[int, ...]]:
        """Shape of each part."""

    @abstractmethod
    def pack(self, part: str, source: Any, params: Params) -> np.ndarray:
        """One part, in its shape and dtype. source: the weights as checkpoints hold them; see each layout."""

    @abstractmethod
    def unpack(self, arrays: Mapping[str, np.ndarray], params: Params) -> np.ndarray:
        """float32 [rows, k] from all parts, flat or shaped: what the kernels multiply by."""

    def count_groups(self, params: Params, elements: Mapping[str, int]) -> Any:
        """n_groups of a stored linear, from the number of elements of each part."""
        return 0

    def n_weights(self, params: Params, n_groups: Any) -> int | None:
        """Weights that are stored; the others of rows * k are zero. None where sizes alone do not tell."""
        return int(params["rows"] * params["k"])

    def rows_by_width(self, params: Params, read: Callable[[str], np.ndarray]) -> dict[int, int] | None:
        """Width in bits -> rows that have it; None where that cannot be told without the weights.

        read: gives the contents of a part by its name, which have passed their rule.
        """
        return None

    def check_constants(self, params: Params) -> str | None:
        """What is wrong with constants that are each in their range, or None."""
        return None

    def rules(self, params: Params, n_groups: Any) -> dict[str, ContentRule]:
        """Rules by part, for the parts by whose numbers kernels index memory."""
        return {}

    def elements(self, params: Params, n_groups: Any) -> dict[str, int]:
        """Elements of each part."""
        return {name: math.prod(shape) for name, shape in self.shapes(params, n_groups).items()}

    def n_bytes(self, params: Params, n_groups: Any) -> int:
        """Bytes of all parts."""
        elements = self.elements(params, n_groups)
        return sum(elements[part.name] * _BYTES[part.dtype] for part in self.parts)

    def check_sizes(self, params: Params, held: Mapping[str, int]) -> str | None:
        """How the parts' numbers of elements contradict each other or the constants, or None."""
        n_groups = self.count_groups(params, held)
        for name, expected in self.elements(params, n_groups).items():
            if held[name] != expected:
                groups = f" for {n_groups} groups" if n_groups else ""
                return f"{name} has {held[name]} elements, expected {expected}{groups}"
        return None
