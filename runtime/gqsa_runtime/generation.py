"""What `Model.generate` and its like return: the pieces of a text, and the means to end it early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass


@dataclass
class GenerationStats:
    """What a generation did; filled while it runs. cached_tokens: of the prompt, kept from before.

    finish_reason: "stop" (end of text or a stop string), "length" (max_new_tokens), "context" (it is
    full), "cancelled" (by `Generation.cancel`), or None while it runs or where the caller left early.
    context_shifts: how often the oldest half of the text was forgotten; reading the rest again counts
    as decode_seconds.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: str | None = None
    context_shifts: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Speed over the prompt's tokens that were not kept from before."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of every new token but the first, whose logits the prefill made."""
        return max(self.new_tokens - 1, 0) / max(self.decode_seconds, 1e-9)


class Generation(Iterator[str]):
    """Pieces of a text as they are made, whole characters each. stats: GenerationStats of this one."""

    def __init__(self, pieces: Generator[str, None, None], stats: GenerationStats, cancel: Callable[[], None]) -> None:
        self.stats = stats
        self._pieces, self._cancel = pieces, cancel

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def cancel(self) -> None:
        """Ends it, from any thread: no piece follows.

        What computes stops after its next step, a long prompt after its next chunk, and whoever waits for a turn
        waits no longer. The iteration then ends as usual, with the finish_reason "cancelled". The model can go on with
        other calls. May be called before it begins, after it has ended, and more than once.
        """
        self._cancel()

    def close(self) -> None:
        """Ends it in the thread that iterates, as leaving the loop does. From another thread use `cancel`."""
        self._pieces.close()


class AsyncGeneration(AsyncIterator[str]):
    """Pieces of a text for `async for`, made in a thread of its own: the event loop never waits.

    Nothing is made before it is asked for. A task that is cancelled while it waits for a piece cancels the generation;
    one that leaves the loop ends it, too, as soon as this object is dropped, or at once by `aclose`.
    start: makes the generation, in that thread. What it raises, InputError for instance, comes with the first piece.
    """

    def __init__(self, start: Callable[[], Generation]) -> None:
        self._start = start
        self._generation: Generation | None = None
        self._ended = False
        # Not a pool for all: a call that waits for its turn would keep the thread from the one that has it.
        self._thread = ThreadPoolExecutor(1, "gqsa-generation")

    @property
    def stats(self) -> GenerationStats | None:
        """GenerationStats of this one; None before the first piece was asked for."""
        return None if self._generation is None else self._generation.stats

    def __aiter__(self) -> AsyncGeneration:
        return self

    async def __anext__(self) -> str:
        if self._ended:
            raise StopAsyncIteration
        try:
            piece = await asyncio.get_running_loop().run_in_executor(self._thread, self._next)
        except BaseException:  # what the generation raised, or the task was cancelled
            self.cancel()
            raise
        if piece is None:
            self._end()
            raise StopAsyncIteration
        return piece

    def _next(self) -> str | None:
        if self._generation is None:
            self._generation = self._start()
        if self._ended:
            self._generation.cancel()
        return next(self._generation, None)

    def cancel(self) -> None:
        """Ends it: no piece follows. Returns at once; what computes stops after its next step."""
        self._end()
        if self._generation is not None:
            self._generation.cancel()

    def _end(self) -> None:
        self._ended = True
        self._thread.shutdown(wait=False)

    async def aclose(self) -> None:
        """Ends it as `cancel` does, for `contextlib.aclosing`."""
        self.cancel()
