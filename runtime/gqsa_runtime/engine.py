"""Feeds tokens to a device: which tokens its KV cache holds, and the launches that extend them.

Any number of threads may call an engine: each method runs alone, from its checks to its results.
"""

from __future__ import annotations

import threading
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from gqsa_runtime.errors import Cancelled, ClosedError, DeviceError, InputError
from gqsa_runtime.operators import FEW_TOKENS, STATE_DRAW, STATE_TOKENS, state_elements
from gqsa_runtime.program import Plan, Program
from gqsa_runtime.rope import long_ropes
from gqsa_runtime.sampling import GREEDY, choose, not_finite
from gqsa_runtime.sequence import Sequence
from gqsa_runtime.session import Session, cache_shapes
from gqsa_runtime.window_rows import WindowRows, kept_positions, places

_Read = TypeVar("_Read")

# Integers in a row, tokens or positions.
Tokens = abc.Sequence[int] | np.ndarray


def _never() -> bool:
    return False


def launch_state(context: int, slots: int | np.ndarray, positions: Tokens, draw: np.ndarray = GREEDY) -> np.ndarray:
    """The `state` of a launch, i32 [8 + 2 * n_tokens]: {n_tokens, context, draw}, then {slot, position} of each token.

    context: positions of one slot. slots: of the tokens, or of all of them. positions: n_tokens integers. draw: how the
    token after the last one is chosen, i32 [sampling.DRAW].
    """
    state = np.empty(state_elements(len(positions)), np.int32)
    state[:2] = len(positions), context
    state[STATE_DRAW] = draw
    state[STATE_TOKENS::2], state[STATE_TOKENS + 1 :: 2] = slots, positions
    return state


class Device(Protocol):
    """What runs a program: CpuDevice and CudaDevice.

    Reserved buffers: tokens i32 [prefill_chunk], state i32 [8 + 2 * prefill_chunk] (`launch_state`), targets i32
    [score_chunk], logits f32 [score_chunk or 1, vocab], log_probs f32 [score_chunk], argmax i32 [score_chunk]. plan:
    what it runs.
    """

    name: str
    plan: Plan

    def upload(self, buffer: str, values: np.ndarray) -> None:
        """Copies values to the start of a buffer."""

    def launch(self, *phases: str) -> None:
        """Runs the steps of phases of `program.PHASES`, one phase after another."""

    def download(self, buffer: str, count: int) -> np.ndarray:
        """The first `count` elements of a buffer, flat, after all work before."""

    def bandwidth(self) -> float:
        """Bytes per second that the device's memory is seen to move now, by plain code."""

    def step_seconds(self, phase: str, repeats: int) -> list[float]:
        """Seconds of each step of a phase, each kind of kernel by itself; leaves no sound activations behind."""

    def download_rows(self, cache: str, layer: int, count: int) -> np.ndarray:
        """The first `count` rows of slot 0 of a layer's "k_cache" or "v_cache", [count, Program.kv_row]."""

    def upload_rows(self, cache: str, layer: int, rows: np.ndarray) -> None:
        """Copies rows, as download_rows gives them, to the first of slot 0."""

    def fill_ropes(self, long: frozenset[str]) -> None:
        """Makes the rotary tables anew, those named with their long frequencies. It opens with none of them long."""

    def close(self) -> None:
        """Frees all that the device holds."""


@dataclass(frozen=True)
class ScoreResult:
    """Of tokens first .. n - 1 of a text, each given those before it. log_probs: f32 [n - first].

    greedy: bool [n - first], whether the token was the likeliest one.
    """

    log_probs: np.ndarray
    greedy: np.ndarray


class Engine:
    """Feeds tokens to slot 0 of a device. context: positions of a slot that the device was opened with.

    Every method raises ClosedError after `close`. Where the device fails, the method raises its DeviceError, and every
    later one the same: a GPU that failed can do nothing more in this process.
    """

    def __init__(self, program: Program, device: Device, context: int) -> None:
        self.program, self.device, self.context = program, device, context
        self._tokens: list[int] = []
        self._window_rows = WindowRows(program)
        self._long_ropes: frozenset[str] | None = frozenset()  # of the device's tables; None: unknown
        self._resident: Sequence | None = None  # the sequence that the KV cache holds, if it is any
        self._lock = threading.Lock()
        self._closed = False
        self._failure: DeviceError | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that the KV cache holds."""
        return tuple(self._tokens)

    @property
    def position(self) -> int:
        """How many tokens the KV cache holds."""
        return len(self._tokens)

    def reset(self) -> None:
        """Forgets all tokens."""
        with self._alone():
            self._tokens.clear()

    def rewind(self, n_tokens: int) -> None:
        """Keeps the first n_tokens only. Raises InputError.

        Where layers with a window have lost what the next token sees of them, they run again before it.
        """
        with self._alone():
            if not 0 <= n_tokens <= len(self._tokens):
                raise InputError(f"cannot rewind to {n_tokens} tokens: the cache holds {len(self._tokens)}")
            del self._tokens[n_tokens:]

    def prefill(self, tokens: Tokens) -> np.ndarray:
        """Appends tokens, any number up to the context; returns the last one's logits, f32 [vocab].

        Raises InputError for no tokens, a token outside the vocabulary, or too many for the context.
        """
        with self._alone():
            self._append(self._checked(tokens, self.context - self.position))
            return self._logits()

    def decode(self, token: int) -> np.ndarray:
        """Appends one token; returns its logits, f32 [vocab]. Raises InputError as prefill does."""
        return self.prefill([token])

    def extend(self, sequence: Sequence, tokens: Tokens, cancelled: Callable[[], bool] = _never) -> np.ndarray:
        """Appends tokens to a sequence; returns the last one's logits, f32 [vocab].

        Where the cache holds another sequence, what the two do not share is computed again. Raises
        InputError as prefill does, Cancelled where `cancelled` becomes true before a chunk of a prompt, and
        leaves the sequence as it was.
        """
        return self._extend(sequence, tokens, self._logits, cancelled)

    def extend_choosing(
        self, sequence: Sequence, tokens: Tokens, draw: np.ndarray = GREEDY, cancelled: Callable[[], bool] = _never
    ) -> int:
        """Like extend, but returns the next token, chosen as `sampling.choose` does: by default the likeliest.

        draw: i32 [sampling.DRAW]. The device chooses where the file has the operator for it; then logits stay there.
        Raises ModelError where they are not finite.
        """
        return self._extend(sequence, tokens, lambda: self._chosen(draw), cancelled, draw)

    def _extend(
        self,
        sequence: Sequence,
        tokens: Tokens,
        read: Callable[[], _Read],
        cancelled: Callable[[], bool],
        draw: np.ndarray = GREEDY,
    ) -> _Read:
        with self._alone() as resident:
            new = ids = self._checked(tokens, self.context - len(sequence.tokens))
            n_reused = 0
            if resident is not sequence:
                ids = np.concatenate([np.array(sequence.tokens, np.int32), new])
                n_reused = self._keep_shared(ids[:-1])  # the last token must run for its logits
            n_again = self._append(ids[n_reused:], draw, cancelled)
            found = read()
            sequence.tokens.extend(new.tolist())
            sequence.n_reused, self._resident = max(n_reused - n_again, 0), sequence
            return found

    def step_seconds(self, tokens: Tokens, repeats: int) -> tuple[str, list[float]]:
        """(phase, seconds of each of its steps) that appending one token, or a chunk of them, would run.

        The cache stays as it is. Raises InputError as prefill does.
        """
        with self._alone():
            ids = self._checked(tokens, min(self.context - self.position, self.device.plan.prefill_chunk))
            phase = "decode" if len(ids) == 1 else _body(ids)
            self._upload(ids)
            self._window_rows.append(self.position + len(ids))
            return phase, self.device.step_seconds(phase, repeats)

    def score(self, tokens: Tokens, first: int = 1) -> ScoreResult:
        """Log-probabilities of tokens `first` and later of a text; the last is scored, never run.

        What the cache shares with the tokens before `first` is not computed again. Raises InputError.
        """
        with self._alone():
            ids = self._checked(tokens, self.context + 1)
            if not 1 <= first <= len(ids):
                raise InputError(f"scores are asked for from token {first} on, expected 1 to {len(ids)}")
            # The token before the first scored one runs again: its logits predict it.
            self._keep_shared(ids[: first - 1])
            log_probs, greedy = [np.empty(0, np.float32)], [np.empty(0, bool)]
            inputs, targets = ids[:-1], ids[1:]
            self._use_ropes(len(inputs))  # what no longer fits them is computed again
            for chunk in _chunks(inputs[self.position :], self.device.plan.score_chunk):
                start = self.position
                self._launch(chunk, _body(chunk))
                if self.position < first:
                    continue
                expected = targets[start : self.position]
                self.device.upload("targets", expected)
                self.device.launch("all_log_probs")
                scored = slice(max(first - 1 - start, 0), None)
                log_probs.append(self.device.download("log_probs", len(chunk))[scored])
                greedy.append((self.device.download("argmax", len(chunk)) == expected)[scored])
            return ScoreResult(np.concatenate(log_probs).astype(np.float32, copy=False), np.concatenate(greedy))

    def save(self) -> Session:
        """What the KV cache holds, copied."""
        with self._alone():
            n_tokens = len(self._tokens)
            if stale := self._forget_stale(n_tokens):  # whoever restores it knows its length alone
                self._append(np.array(stale, np.int32))
            rows = []
            for cache, layer, _ in cache_shapes(self.program):
                window = self.program.kv_layers[layer].window
                count = min(n_tokens, self.program.slot_rows(layer, self.context))
                held = self.device.download_rows(cache, layer, count)
                rows.append(held[places(window, kept_positions(window, n_tokens))] if window else held)
            return Session(np.array(self._tokens, np.int32), rows)

    def restore(self, session: Session) -> None:
        """Makes the KV cache hold a session that was read for this program and context."""
        with self._alone():
            self._tokens.clear()
            n_tokens = len(session.tokens)
            self._use_ropes(n_tokens)
            for (cache, layer, width), rows in zip(cache_shapes(self.program), session.rows, strict=True):
                window, slot = self.program.kv_layers[layer].window, rows
                if window:
                    slot = np.zeros((min(n_tokens, self.program.slot_rows(layer, self.context)), width), rows.dtype)
                    slot[places(window, kept_positions(window, n_tokens))] = rows
                self.device.upload_rows(cache, layer, slot)
            self._tokens.extend(session.tokens.tolist())
            self._window_rows.restore(n_tokens)

    def close(self) -> None:
        """Closes the device, once it has finished what it runs: a long prompt ends after its next chunk."""
        self._closed = True
        with self._lock:
            self.device.close()

    @contextmanager
    def _alone(self) -> Iterator[Sequence | None]:
        """The device for one caller. Gives the resident sequence, which only `extend` makes resident again."""
        with self._lock:
            self._check_open()
            if self._failure is not None:
                raise DeviceError(f"the device failed before, and nothing runs on it any more: {self._failure}")
            resident, self._resident = self._resident, None
            try:
                yield resident
            except DeviceError as error:
                self._failure = error
                raise

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the model is closed")

    def _keep_shared(self, ids: np.ndarray) -> int:
        """Forgets all but the beginning that the cache shares with ids; returns its length.

        It is 0 where layers with a window have lost what comes next sees of it.
        """
        held = np.array(self._tokens[: len(ids)], np.int32)
        differs = held != ids[: len(held)]
        n_shared = int(differs.argmax()) if differs.any() else len(held)
        if not self._window_rows.hold(n_shared):
            n_shared = 0
        del self._tokens[n_shared:]
        return n_shared

    def _use_ropes(self, n_tokens: int) -> list[int]:
        """Gives the device the rotary tables that a sequence of n_tokens has.

        Where it had others, the cache's rows are of no use: returns the tokens that it held, and forgets them.
        """
        long = long_ropes(self.program.ropes, n_tokens)
        if long == self._long_ropes:
            return []
        stale, self._tokens, self._long_ropes = self._tokens, [], None
        self.device.fill_ropes(long)
        self._long_ropes = long
        return stale

    def _forget_stale(self, n_tokens: int) -> list[int]:
        """Makes the cache fit for a sequence of n_tokens.

        Where its rows are of no use, because of rotary tables or of windows, returns the tokens that it held, and
        forgets them.
        """
        if stale := self._use_ropes(n_tokens):
            return stale
        if not self._window_rows.hold(len(self._tokens)):
            stale, self._tokens = self._tokens, []
        return stale

    def _append(self, ids: np.ndarray, draw: np.ndarray = GREEDY, cancelled: Callable[[], bool] = _never) -> int:
        """Runs tokens; returns how many that the cache held ran again, see `_forget_stale`."""
        stale = self._forget_stale(self.position + len(ids))
        ids = np.concatenate([np.array(stale, np.int32), ids]) if stale else ids
        if len(ids) == 1:
            self._launch(ids, "decode", draw=draw)
        else:
            chunks = list(_chunks(ids, self.device.plan.prefill_chunk))
            for i, chunk in enumerate(chunks):
                if cancelled():
                    raise Cancelled
                last = ("last_logits",) if i == len(chunks) - 1 else ()
                self._launch(chunk, _body(chunk), *last, draw=draw)
        return len(stale)

    def _launch(self, ids: np.ndarray, *phases: str, draw: np.ndarray = GREEDY) -> None:
        self._check_open()
        self._upload(ids, draw)
        self.device.launch(*phases)
        if not self._tokens:
            self._window_rows.clear()
        self._tokens.extend(ids.tolist())
        self._window_rows.append(len(self._tokens))

    def _upload(self, ids: np.ndarray, draw: np.ndarray = GREEDY) -> None:
        """Tokens and the state of a launch that appends them."""
        self.device.upload("tokens", ids)
        positions = np.arange(self.position, self.position + len(ids))
        self.device.upload("state", launch_state(self.context, 0, positions, draw))

    def _logits(self) -> np.ndarray:
        return self.device.download("logits", self.program.vocab_size)

    def _chosen(self, draw: np.ndarray) -> int:
        if not self.device.plan.chooses:
            return choose(self._logits(), draw)
        token = int(self.device.download("argmax", 1)[0])
        if token < 0:
            raise not_finite()
        return token

    def _checked(self, tokens: Tokens, room: int) -> np.ndarray:
        """Tokens as int32 [n], all in the vocabulary and n no more than the room."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0:
            raise InputError(f"the tokens have the shape {list(ids.shape)}, expected at least one in a row")
        if ids.dtype.kind not in "iu":
            raise InputError(f"the tokens are {ids.dtype}, expected integers")
        if len(ids) > room:
            held = f" after the {self.context - room} that it holds" if room < self.context else ""
            raise InputError(
                f"{len(ids)} tokens do not fit the context of {self.context}{held}; "
                "shorten the text or open the model with a larger context"
            )
        outside = (ids < 0) | (ids >= self.program.vocab_size)
        if outside.any():
            index = int(outside.argmax())
            raise InputError(
                f"token {ids[index]} at place {index} is outside the vocabulary of {self.program.vocab_size}; "
                f"expected 0 to {self.program.vocab_size - 1}"
            )
        return ids.astype(np.int32)


def _body(chunk: np.ndarray) -> str:
    """The phase that appends a chunk of a prompt."""
    return "few_body" if len(chunk) <= FEW_TOKENS else "prefill_body"


def _chunks(ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
