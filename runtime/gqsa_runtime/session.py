"""Session files: what the KV cache holds of one text, to go on from in another process.

    8 B       "GQSASESS"
    u32       version, 1
    u32       tokens n
    32 B      digest of the .gqsa file that made it, see `ArtifactFile.digest`
    32 B      SHA-256 of all that follows
    i32 [n]   the tokens
    for each layer its keys, then its values: n rows as the cache holds them, see kv_cache.py, or, of a layer with a
    sliding window, the last that are seen through it

Numbers are little-endian. The rows belong to the weights and to the order of every sum, so another file's session is
refused; the device may be another.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gqsa_runtime.errors import FormatError, InputError
from gqsa_runtime.program import NUMPY_DTYPES, Program

CACHES = ("k_cache", "v_cache")
_MAGIC, _VERSION = b"GQSASESS", 1
_HEADER = struct.Struct("<8sII32s32s")


@dataclass(frozen=True)
class Session:
    """tokens: int32 [n]. rows: of each layer its keys and its values, [rows_kept, Program.kv_row] each."""

    tokens: np.ndarray
    rows: list[np.ndarray]


def cache_shapes(program: Program) -> list[tuple[str, int, int]]:
    """(cache, layer, elements of a row) in the order of the file."""
    return [(cache, layer, program.kv_row(layer)) for layer in range(len(program.kv_layers)) for cache in CACHES]


def rows_kept(program: Program, n_tokens: int) -> list[int]:
    """How many rows each piece of a session has, in the order of the file."""
    windows = [program.kv_layers[layer].window for _, layer, _ in cache_shapes(program)]
    return [min(n_tokens, window or n_tokens) for window in windows]


def check_session_path(path: str | os.PathLike[str]) -> None:
    """Raises InputError where no session could be written, before there is one to lose."""
    folder = Path(path).parent
    if not folder.is_dir():
        why, what = f"there is no folder {folder}", "make it first, or choose another path"
    elif not os.access(folder, os.W_OK | os.X_OK):
        why, what = f"the folder {folder} cannot be written", "choose another path"
    else:
        return
    raise InputError(f"{os.fspath(path)}: the session cannot be written: {why}; {what}")


def write_session(path: str | os.PathLike[str], digest: bytes, session: Session) -> None:
    """Writes the file whole or not at all. digest: of the .gqsa file. Raises InputError where it cannot be written."""
    temporary = Path(f"{os.fspath(path)}.{secrets.token_hex(4)}.partial")
    pieces = [np.ascontiguousarray(session.tokens, np.int32), *map(np.ascontiguousarray, session.rows)]
    try:
        with open(temporary, "xb") as file:
            file.write(_HEADER.pack(_MAGIC, _VERSION, len(session.tokens), digest, _digest(pieces)))
            for piece in pieces:
                file.write(piece.view(np.uint8).reshape(-1).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{os.fspath(path)}: the session cannot be written: {error.strerror or error}; "
            "choose another path or free space"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_session(path: str | os.PathLike[str], digest: bytes, program: Program, context: int) -> Session:
    """The session of a file, checked: of this model, whole, and no longer than the context.

    Raises InputError where it cannot be read or does not fit, FormatError where it is damaged or another model's.
    """
    where = os.fspath(path)
    shapes, dtype = cache_shapes(program), np.dtype(NUMPY_DTYPES[program.kv_element])
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                raise FormatError(f"{where} is not a session file; name one that --session made, or a new path")
            _, version, n_tokens, of, expected_digest = _HEADER.unpack(header)
            if version != _VERSION:
                raise FormatError(
                    f"{where} is a session of version {version}, this runtime reads {_VERSION}; delete it"
                )
            if of != digest:
                raise FormatError(
                    f"{where} is a session of another model file, or of another build; delete it or choose another path"
                )
            if n_tokens > context:
                raise InputError(
                    f"{where} holds {n_tokens} tokens, the context is {context}; open the model with --context "
                    f"{n_tokens} or more (up to {program.max_context})"
                )
            counts = rows_kept(program, n_tokens)
            elements = [count * width for count, (*_, width) in zip(counts, shapes, strict=True)]
            n_bytes = 4 * n_tokens + sum(elements) * dtype.itemsize
            found = os.fstat(file.fileno()).st_size - _HEADER.size
            if found != n_bytes:
                raise FormatError(
                    f"{where} is damaged: {found} bytes of cache, expected {n_bytes} for {n_tokens} tokens; "
                    "delete it and begin anew"
                )
            pieces = [np.fromfile(file, np.int32, n_tokens)]
            for count, (*_, width) in zip(elements, shapes, strict=True):
                pieces.append(np.fromfile(file, dtype, count).reshape(-1, width))
    except OSError as error:
        raise InputError(f"{where}: the session cannot be read: {error.strerror or error}; check the path") from None
    if sum(piece.nbytes for piece in pieces) != n_bytes or _digest(pieces) != expected_digest:
        raise FormatError(f"{where} is damaged: its SHA-256 differs from its header's; delete it and begin anew")
    tokens, *rows = pieces
    if n_tokens and not 0 <= tokens.min() <= tokens.max() < program.vocab_size:
        raise FormatError(f"{where} is damaged: it holds tokens outside the vocabulary; delete it and begin anew")
    return Session(tokens, rows)


def _digest(pieces: Iterable[np.ndarray]) -> bytes:
    sha256 = hashlib.sha256()
    for piece in pieces:
        sha256.update(piece.view(np.uint8).reshape(-1).data)
    return sha256.digest()
