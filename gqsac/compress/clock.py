"""How far a training has come: by steps, by minutes, or by whichever is nearer its end."""

from __future__ import annotations

import time


class Clock:
    """steps: how many there will be at most, or None. seconds: how long it may take, or None; one must be given.

    spent_s: seconds used up before, by a run that was stopped. With seconds the number of steps, and so the
    result, depends on the machine's speed.
    """

    def __init__(self, steps: int | None, seconds: float | None, spent_s: float = 0.0):
        if steps is None and seconds is None:
            raise ValueError("a training needs a number of steps or of seconds")
        self._steps, self._seconds = steps, seconds
        self._began = time.monotonic() - spent_s

    @property
    def spent_s(self) -> float:
        """Seconds of training so far, those of earlier runs among them."""
        return time.monotonic() - self._began

    def fraction(self, step: int) -> float:
        """Share of the training that lies behind before step `step` (from 0), at most 1."""
        by_steps = step / self._steps if self._steps else 0.0
        by_time = self.spent_s / self._seconds if self._seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    def left_s(self, step: int) -> float | None:
        """Seconds still to come, as far as can be told."""
        fraction = self.fraction(step)
        return self.spent_s * (1 - fraction) / fraction if fraction > 0 else None


def learning_rate_factor(fraction: float, warmup: float = 0.03, last: float = 0.05) -> float:
    """Linear warm-up over the first `warmup` of the training, then a cosine down to `last`; the peak is 1."""
    import math

    if fraction < warmup:
        return max(0.05, fraction / warmup)
    done = (fraction - warmup) / (1 - warmup)
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
