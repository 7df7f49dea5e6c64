"""Calibrate, step 1: the token windows on which the layers' inputs are observed."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
from gqsa_runtime.errors import InputError
from tokenizers import Tokenizer

BUILT_IN = "built-in text"
_SLICE_CHARACTERS_PER_TOKEN = 12  # more than any common tokenizer makes of running text


def calibration_tokens(
    tokenizer: Tokenizer,
    files: list[str] | None,
    samples: int,
    seq_len: int,
    seed: int,
    purpose: str = "calibration",
) -> np.ndarray:
    """Seeded windows of text, int64 [samples, seq_len], none overlapping another.

    files: UTF-8 text files, or None for the built-in text (public-domain novels, see gqsac/data).
    purpose: "calibration" or "training", for messages.
    If the tokenizer starts a text with special tokens, every window starts with them.
    Raises InputError for unreadable or too short texts.
    """
    text = "\n\n".join(read_text(file) for file in files) if files else _built_in_text()
    prefix = tokenizer.encode("").ids
    body = seq_len - len(prefix)
    if body < 1:
        raise InputError(
            f"samples of {seq_len} tokens leave no room for text behind the {len(prefix)} with which the tokenizer "
            "starts one; use longer samples"
        )
    rng = np.random.default_rng(seed)
    slots = _slots(text, tokenizer, samples, body, rng)
    if len(slots) < samples:
        ids = _encode(tokenizer, text)  # a slice of a long text may have had fewer tokens than one window
        slots = _windows(ids, body)
    if len(slots) < samples:
        where = ", ".join(map(str, files)) if files else f"the {BUILT_IN}"
        raise InputError(
            f"{purpose} needs {samples} samples of {body} tokens = {samples * body} tokens, but {where} gives "
            f"{len(ids)} tokens, enough for {len(slots)}; give more text, or ask for fewer "
            f"(--{'train-' if purpose == 'training' else ''}samples) or shorter samples"
        )
    chosen = np.sort(rng.choice(len(slots), samples, replace=False))
    return np.array([prefix + slots[i] for i in chosen], np.int64)


def read_text(file) -> str:
    """A UTF-8 text file. Raises InputError if it is missing, no file, not readable, not text, or empty."""
    path = Path(file)
    if not path.exists():
        raise InputError(f"the text {path} does not exist; expected a UTF-8 text file")
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'no plain file'}; expected a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8 first") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); expected a UTF-8 text file") from error
    if "\0" in text:
        raise InputError(f"{path} holds zero bytes, so it is a binary file; expected a UTF-8 text file")
    if not text.strip():
        raise InputError(f"{path} is empty; expected text")
    return text


def _built_in_text() -> str:
    return (resources.files("gqsac") / "data" / "calibration.txt").read_text(encoding="utf-8")


def _slots(text: str, tokenizer: Tokenizer, samples: int, body: int, rng) -> list[list[int]]:
    """Windows of `body` tokens. Of a long text only a slice at a random place in each `samples`-th is tokenised."""
    size = body * _SLICE_CHARACTERS_PER_TOKEN
    if len(text) <= 2 * samples * size:
        return _windows(_encode(tokenizer, text), body)
    part = len(text) // samples
    starts = np.arange(samples) * part + rng.integers(0, part - size, samples)
    slices = [text[start : start + size] for start in starts.tolist()]
    return [window for piece in slices for window in _windows(_encode(tokenizer, piece), body)[:1]]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _windows(ids: list[int], body: int) -> list[list[int]]:
    return [ids[start : start + body] for start in range(0, len(ids) - body + 1, body)]
