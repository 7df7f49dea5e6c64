"""Checks the table of SentencePiece's normalisation: a double-array trie of byte strings and what they become.

Layout (SentencePiece, normalizer.cc): uint32 size of the trie in bytes, the trie as uint32 units (Darts-clone), then
UTF-8 strings that end with a zero byte each. A reader walks the trie without looking where its array ends.
"""

from __future__ import annotations

import base64
import binascii

import numpy as np

_MAX_BYTES = 4 << 20  # that of nmt_nfkc_cf, the largest in use, has 320 KB
_MAX_REPLACEMENT = 256


class CharsmapError(ValueError):
    """A table that is refused; the message says why."""


def check(text: str) -> float:
    """By how much a table lengthens a text at most: bytes after per byte before. Raises CharsmapError.

    text: base64, as tokenizer.json has it.
    """
    try:
        data = base64.b64decode(text[: _MAX_BYTES * 2], validate=True)
    except (binascii.Error, ValueError):
        raise CharsmapError("it is not base64") from None
    if not 4 <= len(data) <= _MAX_BYTES:
        raise CharsmapError(f"it has {len(data)} bytes, expected 4 to {_MAX_BYTES}")
    n_bytes = int.from_bytes(data[:4], "little")
    if n_bytes < 4 or n_bytes % 4 or n_bytes > len(data) - 4:
        raise CharsmapError(f"its trie has {n_bytes} bytes of {len(data)}")
    units = np.frombuffer(data, "<u4", n_bytes // 4, 4).astype(np.int64)
    strings = data[4 + n_bytes :]
    try:
        strings.decode()
    except UnicodeDecodeError:
        raise CharsmapError("its strings are not UTF-8") from None
    return _growth(units, strings)


def _growth(units: np.ndarray, strings: bytes) -> float:
    """Walks every path of the trie, a byte deeper at a time."""
    growth, depth = 1.0, 0
    seen = np.zeros(len(units), bool)
    bases = _children(units, np.zeros(1, np.int64))
    letters = np.arange(1, 256)
    while len(bases):
        places = bases[:, None] ^ letters  # [nodes, 255]
        if places.max() >= len(units):
            raise CharsmapError("its trie points past its end")
        nodes = places[(units[places] & (1 << 31 | 0xFF)) == letters]
        nodes = np.unique(nodes[~seen[nodes]])  # equal endings may share their nodes
        seen[nodes] = True
        depth += 1
        bases = _children(units, nodes)
        leaves = bases[(units[nodes] >> 8 & 1).astype(bool)]
        if len(leaves) and leaves.max() >= len(units):
            raise CharsmapError("its trie points past its end")
        for start in np.unique(units[leaves] & ((1 << 31) - 1)).tolist():
            if start >= len(strings) or strings[start] & 0xC0 == 0x80:
                raise CharsmapError("its trie points to no string")
            length = strings.find(b"\0", start) - start
            if not 0 <= length <= _MAX_REPLACEMENT:
                raise CharsmapError(f"one of its strings has more than {_MAX_REPLACEMENT} bytes")
            growth = max(growth, length / depth)
    return growth


def _children(units: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Where the children of nodes are counted from."""
    values = units[nodes]
    first: np.ndarray = nodes ^ (values >> 10 << ((values & 1 << 9) >> 6))
    return first
