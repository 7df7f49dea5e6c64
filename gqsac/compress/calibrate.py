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
    tokenizer: Tokenizer, files: list[str] | None, samples: int, seq_len: int, seed: int
) -> np.ndarray:
    """Seeded windows of text, int64 [samples, seq_len], none overlapping another.

    files: UTF-8 text files, or None for the built-in text (public-domain novels, see gqsac/data).
    If the tokenizer starts a text with special tokens, every window starts with them.
    Raises InputError for unreadable or too short texts.
    """
    text = "\n\n".join(read_text(file) for file in files) if files else _built_in_text()
    prefix = tokenizer.encode("").ids
    body = seq_len - len(prefix)
    slots = _slots(text, tokenizer, samples, body)
    if len(slots) < samples:
        where = ", ".join(map(str, files)) if files else f"the {BUILT_IN}"
        raise InputError(
            f"calibration needs {samples} samples of {seq_len} tokens = {samples * seq_len} tokens, but {where} "
            f"gives {len(slots)} such samples; give more text, or fewer or shorter samples"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(len(slots), samples, replace=False))
    return np.array([prefix + slots[i] for i in chosen], np.int64)


def read_text(file) -> str:
    """A UTF-8 text file. Raises InputError if it is missing, empty or not UTF-8."""
    path = Path(file)
    if not path.is_file():
        raise InputError(f"the text {path} does not exist or is not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8 first") from error
    if not text.strip():
        raise InputError(f"{path} is empty; expected text")
    return text


def _built_in_text() -> str:
    return (resources.files("gqsac") / "data" / "calibration.txt").read_text(encoding="utf-8")


def _slots(text: str, tokenizer: Tokenizer, samples: int, body: int) -> list[list[int]]:
    """Windows of `body` tokens. A long text is not tokenised whole: an even spread of slices is."""
    wanted = samples * body * _SLICE_CHARACTERS_PER_TOKEN
    if len(text) <= 2 * wanted:
        return _windows(tokenizer.encode(text, add_special_tokens=False).ids, body)
    size = body * _SLICE_CHARACTERS_PER_TOKEN
    starts = np.linspace(0, len(text) - size, samples).astype(int)
    slots = []
    for start in starts:
        piece = text[start : start + size]
        slots += _windows(tokenizer.encode(piece, add_special_tokens=False).ids, body)[:1]
    return slots


def _windows(ids: list[int], body: int) -> list[list[int]]:
    return [ids[start : start + body] for start in range(0, len(ids) - body + 1, body)]
