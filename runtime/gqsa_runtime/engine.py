"""One sequence on one device: which tokens the KV cache holds, and the launches that extend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gqsa_runtime.errors import InputError
from gqsa_runtime.program import Program


class Device(Protocol):
    """What runs a program: CpuDevice and CudaDevice.

    Reserved buffers: tokens i32 [chunk], targets i32 [chunk], state i32 [2] {n_tokens, position},
    logits f32 [chunk or 1, vocab], log_probs f32 [chunk], argmax i32 [chunk].
    """

    name: str

    def upload(self, buffer: str, values: np.ndarray) -> None:
        """Copies values to the start of a buffer."""

    def launch(self, phase: str) -> None:
        """Runs the steps of a phase of `program.PHASES`."""

    def download(self, buffer: str, count: int) -> np.ndarray:
        """The first `count` elements of a buffer, flat, after all work before."""

    def close(self) -> None:
        """Frees all that the device holds."""


@dataclass(frozen=True)
class ScoreResult:
    """Of a text of n tokens. log_probs: f32 [n - 1], of tokens 1 .. n - 1, each given those before it.

    greedy: bool [n - 1], whether the token was the likeliest one.
    """

    log_probs: np.ndarray
    greedy: np.ndarray


class Engine:
    """Feeds tokens to a device. context: positions of the KV cache that the device was opened with."""

    def __init__(self, program: Program, device: Device, context: int):
        self.program, self.device, self.context = program, device, context
        self._tokens: list[int] = []

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
        self._tokens.clear()

    def rewind(self, n_tokens: int) -> None:
        """Keeps the first n_tokens only; their rows of the cache stay valid. Raises InputError."""
        if not 0 <= n_tokens <= len(self._tokens):
            raise InputError(f"cannot rewind to {n_tokens} tokens: the cache holds {len(self._tokens)}")
        del self._tokens[n_tokens:]

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Appends tokens, any number up to the context; returns the last one's logits, f32 [vocab].

        Raises InputError for no tokens, a token outside the vocabulary, or too many for the context.
        """
        ids = self._checked(tokens)
        if len(ids) == 1:
            return self._decode(ids)
        for chunk in self._chunks(ids):
            self._launch(chunk, "prefill_body")
        self.device.launch("last_logits")
        return self._logits()

    def prefill_sequence(self, tokens: Sequence[int]) -> tuple[np.ndarray, int]:
        """Makes the sequence exactly `tokens`, keeping the beginning that the cache already holds.

        Returns the last token's logits, f32 [vocab], and how many tokens were kept.
        """
        kept, most = 0, min(len(self._tokens), len(tokens) - 1)  # the last token must run for its logits
        while kept < most and self._tokens[kept] == tokens[kept]:
            kept += 1
        self.rewind(max(kept, 0))
        return self.prefill(tokens[kept:]), kept

    def decode(self, token: int) -> np.ndarray:
        """Appends one token; returns its logits, f32 [vocab]. Raises InputError as prefill does."""
        return self._decode(self._checked([token]))

    def score(self, tokens: Sequence[int]) -> ScoreResult:
        """Log-probabilities of a text of at most `context` tokens. The sequence before is forgotten."""
        self.reset()
        ids = self._checked(tokens)
        log_probs, greedy = [], []
        inputs, targets = ids[:-1], ids[1:]
        for chunk in self._chunks(inputs):
            expected = targets[self.position : self.position + len(chunk)]
            self.device.upload("targets", expected)
            self._launch(chunk, "prefill_body")
            self.device.launch("all_log_probs")
            log_probs.append(self.device.download("log_probs", len(chunk)))
            greedy.append(self.device.download("argmax", len(chunk)) == expected)
        empty = len(inputs) == 0
        return ScoreResult(
            np.empty(0, np.float32) if empty else np.concatenate(log_probs).astype(np.float32, copy=False),
            np.empty(0, bool) if empty else np.concatenate(greedy),
        )

    def _decode(self, ids: np.ndarray) -> np.ndarray:
        self._launch(ids, "decode")
        return self._logits()

    def _launch(self, ids: np.ndarray, phase: str) -> None:
        self.device.upload("tokens", ids)
        self.device.upload("state", np.array([len(ids), self.position], np.int32))
        self.device.launch(phase)
        self._tokens.extend(ids.tolist())

    def _logits(self) -> np.ndarray:
        return self.device.download("logits", self.program.vocab_size)

    def _chunks(self, ids: np.ndarray):
        size = self.program.prefill_chunk
        return (ids[start : start + size] for start in range(0, len(ids), size))

    def _checked(self, tokens: Sequence[int]) -> np.ndarray:
        """Tokens as int32 [n], all in the vocabulary and n no more than the room left in the cache."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0:
            raise InputError(f"the tokens have the shape {list(ids.shape)}, expected at least one in a row")
        if ids.dtype.kind not in "iu":
            raise InputError(f"the tokens are {ids.dtype}, expected integers")
        if len(ids) > self.context - self.position:
            held = f" after the {self.position} that it holds" if self.position else ""
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
