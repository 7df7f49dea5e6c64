"""Which rows of one slot the layers with a sliding window still hold; what others hold is never lost."""

from __future__ import annotations

import numpy as np

from gqsa_runtime.kv_cache import held_rows
from gqsa_runtime.program import Program


class WindowRows:
    """Follows the slot's tokens as they come. Positions before `_first[window]` have lost their rows there."""

    def __init__(self, program: Program) -> None:
        self._first = {layer.window: 0 for layer in program.kv_layers if layer.window}

    def clear(self) -> None:
        """The slot holds nothing."""
        self._first = dict.fromkeys(self._first, 0)

    def append(self, n_tokens: int) -> None:
        """The slot has got rows up to n_tokens, or one more that was made ahead: they are in the places of others."""
        for window, first in self._first.items():
            self._first[window] = max(first, n_tokens + 1 - held_rows(window))

    def restore(self, n_tokens: int) -> None:
        """The slot holds what `kept_positions` says of n_tokens."""
        self._first = {window: max(0, n_tokens - window) for window in self._first}

    def hold(self, n_tokens: int) -> bool:
        """Whether all is there that a token after the first n_tokens sees of them."""
        return all(first <= max(0, n_tokens + 1 - window) for window, first in self._first.items()) or n_tokens == 0


def kept_positions(window: int, n_tokens: int) -> np.ndarray:
    """Positions of a text of n_tokens whose rows go on with it, those that can still be seen: int64, ascending."""
    return np.arange(max(0, n_tokens - window) if window else 0, n_tokens)


def places(window: int, positions: np.ndarray) -> np.ndarray:
    """Rows of a slot that positions have, as kernels find them."""
    return positions % held_rows(window) if window else positions
