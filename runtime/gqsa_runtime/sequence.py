"""The tokens of one text, apart from the engine that runs them."""

from __future__ import annotations


class Sequence:
    """What a caller has fed so far. `Engine.extend` appends to it.

    tokens: all of them; the KV cache may hold another sequence meanwhile. n_reused: how many tokens of
    another sequence's the last `extend` could keep in the cache, 0 where it held this one already.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.n_reused = 0
