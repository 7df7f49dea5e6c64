"""Turns: calls from any number of threads use one model one after another, in the order in which they came."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator

from gqsa_runtime.errors import BusyError, Cancelled, ClosedError

_log = logging.getLogger(__name__)

# A generation keeps its turn while its consumer looks at a piece of text, but not for ever: after this
# long the next call goes first, and the generation queues again when it is asked for more.
PATIENCE_S = 1.0


class Turn:
    """A place in the queue. paused_s: since when nothing was asked of it, by time.monotonic, or None.

    cancelled: whether its caller is to end, see `Turns.cancel`.
    """

    def __init__(self) -> None:
        self.paused_s: float | None = None
        self.thread: threading.Thread | None = None  # that paused it
        self.cancelled = False

    def patience_s(self) -> float:
        """How long the next in the queue must still wait; infinite while the turn is in use."""
        if self.paused_s is None:
            return math.inf
        if self.thread is threading.current_thread():
            return 0.0  # who waits for itself waits for ever
        return self.paused_s + PATIENCE_S - time.monotonic()


class Turns:
    """The queue of a model. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[Turn] = []  # the first one has its turn
        self._closed = False

    def take(self, wait: bool = True) -> Turn:
        """Queues and returns when it is the caller's turn, which ends with `release`.

        Raises BusyError where it would have to wait and may not, ClosedError after `close`.
        """
        turn = Turn()
        self.enter(turn, wait)
        return turn

    def enter(self, turn: Turn, wait: bool = True) -> None:
        """As `take`, for a turn that may have been cancelled before: then it raises Cancelled."""
        with self._changed:
            self._queue_up(turn, wait)

    def cancel(self, turn: Turn) -> None:
        """Ends its caller: it looks at `cancelled` between two steps, and every wait and pause raises Cancelled."""
        with self._changed:
            turn.cancelled = True
            if turn.paused_s is not None:
                self._drop(turn)  # nobody need wait until it is asked for more
            self._changed.notify_all()

    @contextlib.contextmanager
    def turn(self, wait: bool = True) -> Iterator[None]:
        """A turn for the length of a `with` block."""
        turn = self.take(wait)
        try:
            yield
        finally:
            self.release(turn)

    def pause(self, turn: Turn) -> None:
        """The holder waits for its own caller: from now on its turn may be lost to the next in the queue."""
        with self._changed:
            if turn.cancelled:
                raise Cancelled
            turn.paused_s, turn.thread = time.monotonic(), threading.current_thread()
            self._changed.notify_all()

    def resume(self, turn: Turn) -> None:
        """Ends a pause; waits for another turn where this one was lost. Raises ClosedError after `close`, Cancelled."""
        with self._changed:
            self.check_open()
            turn.paused_s = None
            if turn.cancelled:
                raise Cancelled
            if turn not in self._queue:
                self._queue_up(turn, wait=True)

    def release(self, turn: Turn) -> None:
        """Ends a turn, lost or not."""
        with self._changed:
            self._drop(turn)

    def close(self) -> None:
        """Every call that waits, and every later one, raises ClosedError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def check_open(self) -> None:
        """Raises ClosedError after `close`."""
        if self._closed:
            raise ClosedError("the model is closed")

    def _queue_up(self, turn: Turn, wait: bool) -> None:
        self._queue.append(turn)
        try:
            self._check(turn)
            while (first := self._queue[0]) is not turn:
                left_s = first.patience_s()
                if left_s <= 0:
                    _log.debug("a generation that nobody asked for more gives way to the next call")
                    self._drop(first)
                elif wait:
                    self._changed.wait(None if left_s == math.inf else left_s)
                else:
                    raise BusyError("the model is in use by another call; wait for it, or open the file once more")
                self._check(turn)
        except BaseException:  # an interrupt too: a turn that nobody waits for would stop the queue
            self._drop(turn)
            raise

    def _check(self, turn: Turn) -> None:
        self.check_open()
        if turn.cancelled:
            raise Cancelled

    def _drop(self, turn: Turn) -> None:
        if turn in self._queue:
            self._queue.remove(turn)
            self._changed.notify_all()
