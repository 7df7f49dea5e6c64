"""Perplexity of a text under a model, over windows that every engine of a comparison shares."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gqsa_runtime.errors import InputError

if TYPE_CHECKING:
    from gqsa_runtime.model import Model

# Wraps a list of what is to be done, as `tqdm.tqdm` does.
Progress = Callable[[list[Any]], Iterable[Any]]

_CHARACTERS_PER_TOKEN = 8  # more than most texts have, so that one try suffices
_MARGIN_TOKENS = 16
_WORD_ENDS = re.compile(r"\w(?= \w)|\S\n(?=\w)")


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity: exp of the mean negative log-probability of the n_tokens scored tokens."""

    perplexity: float
    n_tokens: int
    n_windows: int
    seconds: float


def windows(n_tokens: int, window: int, stride: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Cuts a text of n_tokens into windows: yields (start, stop, first_scored), positions in the text.

    Full windows start every `stride` tokens (default: window, no overlap); the tail that fills no
    window is dropped, unless the whole text is shorter than one window. Tokens first_scored .. stop - 1
    are scored, each with the context start .. itself: all but the first token of a window, and no
    token twice. Raises InputError where the numbers make no window.
    """
    stride = window if stride is None else stride
    if n_tokens < 2:
        raise InputError(f"the text has {n_tokens} token(s), but perplexity needs at least 2; use a longer text")
    if window < 2:
        raise InputError(f"the window is {window} tokens, expected at least 2")
    if not 1 <= stride <= window:
        raise InputError(f"the stride is {stride} tokens, expected 1 to the window's {window}")
    return _windows(n_tokens, min(window, n_tokens), stride)


def needed_tokens(window: int, stride: int | None, max_windows: int | None) -> int | None:
    """How many tokens the first so many windows have; None for all of a text."""
    return None if max_windows is None else window + (max_windows - 1) * (window if stride is None else stride)


def _windows(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    previous_stop = 0
    for start in range(0, n_tokens - window + 1, stride):
        yield start, start + window, max(start + 1, previous_stop)
        previous_stop = start + window


def first_tokens(tokenize: Callable[[str], list[int]], text: str, count: int | None) -> list[int]:
    """The tokens of a text, or of a beginning of it that has more than `count` of them.

    A beginning ends before a space or after a line break between words, where every tokenizer parts them, and a few
    tokens more than `count` are asked for, such as one that ends a text.
    """
    length = len(text) if count is None else _CHARACTERS_PER_TOKEN * max(count, _MARGIN_TOKENS)
    while count is not None and length < len(text):
        cut = _WORD_ENDS.search(text, length)
        if cut is None:
            break
        tokens = tokenize(text[: cut.end()])
        if len(tokens) >= count + _MARGIN_TOKENS:
            return tokens
        length *= 2
    return tokenize(text)


def perplexity(
    model: Model,
    text: str,
    window: int = 2048,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Scores `text` with a `Model` window by window.

    max_windows: score only the first so many. progress: wraps the list of windows, as `tqdm.tqdm` does.
    Raises InputError where the window does not fit the model's context.
    """
    if window > model.context:
        raise InputError(
            f"the window is {window} tokens, but the model is open with a context of {model.context}; "
            f"use a window of at most {model.context} or a larger context"
        )
    if max_windows is not None and max_windows < 1:
        raise InputError(f"the number of windows is {max_windows}, expected at least 1")
    tokens = first_tokens(model.tokenize, text, needed_tokens(window, stride, max_windows))
    cuts = list(windows(len(tokens), window, stride))[:max_windows]
    total, n_scored, began_s = 0.0, 0, time.perf_counter()
    for start, stop, first_scored in progress(cuts) if progress else cuts:
        # log_probs[i] belongs to token start + 1 + i.
        scored = model.score(tokens[start:stop]).log_probs[first_scored - start - 1 :]
        total += float(scored.astype("float64").sum())
        n_scored += len(scored)
    mean = -total / n_scored
    value = math.exp(mean) if mean < 700 else math.inf  # exp overflows a float64 near 709
    return PerplexityResult(value, n_scored, len(cuts), time.perf_counter() - began_s)
