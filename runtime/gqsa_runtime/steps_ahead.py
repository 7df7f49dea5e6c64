"""Decode steps on a GPU that choose their token: the next one starts before the host has read the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gqsa_runtime.operators import STATE_DRAW, state_elements
from gqsa_runtime.sampling import next_draw

ROW = 16  # i32 of a step in pinned memory
TOKEN, STATE, CHOSEN = 0, slice(1, 1 + state_elements(1)), ROW - 1  # in a row: the step's inputs and what it chooses
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING


def following(state: Sequence[int]) -> tuple[int, ...]:
    """The state of the step after one of one token: the next position of its slot, and the next draw."""
    after = np.array(state, np.int32)
    after[STATE_DRAW] = next_draw(after[STATE_DRAW])
    after[-1] += 1
    return tuple(after.tolist())


class StepsAhead:
    """Starts decode steps and gives the tokens that they choose.

    Where each step continues the last one, the step after is under way while the host still handles a token: it
    takes the chosen token from the device. If the host goes on otherwise, its result is dropped; it wrote nothing
    that the cache is trusted for.

    memory: pinned int32 [2, ROW], read and written by the graphs of the row. given: a graph whose token comes from
    row 0. following: for each row a graph whose token is the one that the device chose last. call: of the driver.
    """

    def __init__(
        self, memory: np.ndarray, given: object, following: Sequence[object], stream: object, call: Callable[..., Any]
    ) -> None:
        self._memory, self._given, self._following = memory, given, tuple(following)
        self._stream, self._call = stream, call
        self._events = [call("cuEventCreate", _NO_TIMING) for _ in memory]
        self._row = 0
        self._state: tuple[int, ...] = ()  # of the step that was started last
        self._follows = False  # whether that one went on with the token chosen before it
        self._token: int | None = None  # that it chose, once it is read
        self._expected: tuple[int, tuple[int, ...]] | None = None  # inputs of the step that would continue it
        self._under_way = False  # whether such a step was started

    def start(self, token: int, state: Sequence[int] | np.ndarray) -> None:
        """state: of launch_state, for one token."""
        state = tuple(map(int, state))
        continues = self._expected == (token, state)
        if continues and self._under_way:
            self._row ^= 1
        else:
            self._settle()
            self._row = 0
            self._memory[0, TOKEN], self._memory[0, STATE] = token, state
            self._launch(self._given, 0)
        self._state, self._follows, self._token = state, continues, None
        self._expected, self._under_way = None, False

    def chosen(self) -> int:
        """The token of the step that was started last, -1 where its logits were not finite; waits for it."""
        if self._token is not None:
            return self._token
        context, position = self._state[1], self._state[-1]
        after, ahead = following(self._state), self._row ^ 1
        self._under_way = self._follows and position + 1 < context
        if self._under_way:
            self._memory[ahead, STATE] = after
            self._launch(self._following[ahead], ahead)
        self._call("cuEventSynchronize", self._events[self._row])
        self._token = int(self._memory[self._row, CHOSEN])
        self._expected = (self._token, after)
        if self._token < 0:
            self.forget()
        return self._token

    def forget(self) -> None:
        """Something else changes what the cache holds: a step under way counts no more."""
        self._settle()
        self._expected, self._under_way = None, False

    def close(self) -> None:
        """Waits for what runs."""
        self._settle()
        for event in self._events:
            self._call("cuEventDestroy", event)

    def _settle(self) -> None:
        """Waits until no graph uses the memory."""
        if self._token is None and self._state:
            self._call("cuEventSynchronize", self._events[self._row])
        if self._under_way:
            self._call("cuEventSynchronize", self._events[self._row ^ 1])

    def _launch(self, graph: object, row: int) -> None:
        self._call("cuGraphLaunch", graph, self._stream)
        self._call("cuEventRecord", self._events[row], self._stream)
