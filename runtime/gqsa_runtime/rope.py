"""Rotary position tables, filled when a file is opened so that they fit the chosen context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from gqsa_runtime.program import Rope


def rope_table(inv_freq: np.ndarray, scaling: float, context: int) -> np.ndarray:
    """f32 [context, 2 * len(inv_freq)]: a row is scaling * cos(angles), then scaling * sin(angles).

    inv_freq: f32 [rotary_dim / 2]. Angles are f32 products, as Hugging Face models compute them.
    """
    positions = np.arange(context, dtype=np.float32)
    angles = positions[:, None] * inv_freq.astype(np.float32)[None, :]
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * np.float32(scaling)
    return np.ascontiguousarray(table, np.float32)


def long_ropes(ropes: Mapping[str, Rope], n_tokens: int) -> frozenset[str]:
    """The tables of a program whose long frequencies a sequence of n_tokens has, at all of its positions."""
    return frozenset(
        name for name, rope in ropes.items() if rope.original_context is not None and n_tokens > rope.original_context
    )


class RopeTables:
    """Makes a program's rotary tables. tensors: name -> array, read here and not kept. context: their rows."""

    def __init__(self, ropes: Mapping[str, Rope], tensors: Mapping[str, np.ndarray], context: int) -> None:
        self._ropes, self._context = ropes, context
        names = set().union(*(rope.tensors for rope in ropes.values()))
        self._frequencies = {name: np.array(tensors[name], np.float32).reshape(-1) for name in sorted(names)}

    def make(self, long: frozenset[str]) -> Iterator[tuple[str, np.ndarray]]:
        """(name, f32 [context, rotary_dim]) of each table. long: those with their long frequencies."""
        for name, rope in self._ropes.items():
            source = rope.long_inv_freq if name in long and rope.long_inv_freq is not None else rope.inv_freq
            inv_freq = self._frequencies[source]
            yield name, rope_table(inv_freq, rope.scaling, self._context)
