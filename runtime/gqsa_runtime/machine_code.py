"""How a file keeps the machine code of a target: one LZMA2 stream, of a length and a SHA-256 that the plan states.

The kernels of a model are much alike, so a target's code shrinks to an eighth. The parameters below are the format's:
nothing that a file says decides how much memory its decompression takes.
"""

from __future__ import annotations

import hashlib
from types import ModuleType

from gqsa_runtime.errors import DeviceError, FormatError

MAX_BYTES = 64 << 20  # of the code of one target
DICTIONARY_BYTES = 8 << 20  # what a decompressor keeps
_PIECE_BYTES = 1 << 20


def pack(code: bytes) -> bytes:
    """The code compressed: the same bytes for the same code and version of liblzma."""
    lzma = _lzma()
    packed: bytes = lzma.compress(code, format=lzma.FORMAT_RAW, filters=_filters(lzma))
    return packed


def unpack(packed: bytes | memoryview, n_bytes: int, sha256: str) -> bytes:
    """What `pack` was given. n_bytes: its length, at most MAX_BYTES; sha256: in hexadecimal digits.

    Never makes more than a piece above n_bytes. Raises FormatError where the stream is damaged, longer or shorter, or
    its content has another digest.
    """
    if not 1 <= n_bytes <= MAX_BYTES:
        raise _wrong(f"it is said to have {n_bytes} bytes, allowed are 1 to {MAX_BYTES}")
    lzma = _lzma()
    pieces, held = [], 0
    try:
        stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(lzma))
        piece = stream.decompress(packed, _PIECE_BYTES)
        while piece and held <= n_bytes:
            pieces.append(piece)
            held += len(piece)
            piece = b"" if stream.eof else stream.decompress(b"", _PIECE_BYTES)
    except lzma.LZMAError as error:
        raise _wrong(f"it is no LZMA2 stream ({error})") from error
    except MemoryError:
        raise _wrong(f"there is no memory for its {n_bytes} bytes") from None
    if held != n_bytes or not stream.eof or stream.unused_data:
        raise _wrong(f"its stream does not hold exactly the {n_bytes} bytes that the launch plan states")
    code = b"".join(pieces)
    if hashlib.sha256(code).hexdigest() != sha256:
        raise _wrong("its sha256 differs from the launch plan's")
    return code


def _filters(lzma: ModuleType) -> list[dict[str, int]]:
    return [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": DICTIONARY_BYTES}]


def _lzma() -> ModuleType:
    try:
        import lzma
    except ImportError as error:  # a Python that was built where liblzma was missing
        raise DeviceError(
            f"this Python has no module lzma ({error}), which reads the kernels of a file; use another Python, or "
            "install liblzma's headers and build this one again"
        ) from error
    return lzma


def _wrong(what: str) -> FormatError:
    return FormatError(f"the machine code is damaged: {what}; copy or download the file again, or build it again")
