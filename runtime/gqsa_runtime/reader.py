"""Reads .gqsa files, hostile ones included: every rule of the format is checked before it is relied on.

Nothing is allocated before its size is checked against the file, and tensors are read into memory
rather than mapped: a mapped file that shrinks kills the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import stat
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from gqsa_runtime import format as gqsa
from gqsa_runtime.errors import FormatError, InputError, SignatureError
from gqsa_runtime.machine_code import unpack
from gqsa_runtime.program import Binary, Program
from gqsa_runtime.signature import Signature, check_signature
from gqsa_runtime.typecheck import brief

MAX_TENSORS = 1 << 16
MAX_METADATA = 1 << 10
MAX_KEY_BYTES = 128
MAX_DIMENSIONS = 4

_VALUE_UINT32, _VALUE_BOOL, _VALUE_STRING = 4, 7, 8
_NUMPY_TYPES = {"f32": np.float32, "f16": np.float16, "i8": np.int8, "i16": np.int16, "i32": np.int32}
_DIGEST_BYTES = 32
_HASHED_BYTES = 4 << 20  # of a signed file, at a time
# Refused before it is read: a character has up to 4 bytes.
_MAX_VALUE_BYTES = {
    gqsa.KEY_NAME: 4 * gqsa.MAX_NAME_CHARACTERS,
    gqsa.KEY_PROGRAM: 4 * gqsa.MAX_PROGRAM_CHARACTERS,
    gqsa.KEY_COMPILER: 1 << 20,
    gqsa.KEY_CHAT_TEMPLATE: 4 << 18,
    gqsa.KEY_FACTS: 4 * gqsa.FACTS_CHARACTERS,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. shape: as numpy orders it. offset: from the start of the file. Both sizes in bytes."""

    shape: tuple[int, ...]
    dtype: str  # key of program.DTYPE_BYTES
    offset: int
    size: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class ArtifactFile:
    """An open .gqsa file whose header has passed every check.

    program: the launch plan, not yet validated (see `validate.validate`). Any number of threads may `read`.
    metadata: key -> int, bool or str. tensors: name -> TensorInfo in file order, without the digests. digest: SHA-256
    of the digests of the header and of every tensor, which tells files of different contents apart.
    """

    def __init__(self, path: str | os.PathLike[str], signature: Signature | None = None) -> None:
        self.path = os.fspath(path)
        self._file = _open_regular(self.path)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            header = _Header(self._file, self.path, self.size)
            self.metadata: dict[str, int | bool | str] = header.metadata
            tensors = header.tensors
            _check_padding(self._file, self.path, tensors)
            table = _read_table(self._file, self.path, tensors)
            if signature is not None:
                # Before anything of the header is used but where its parts lie.
                self._check_signature(signature, header, table, tensors)
            self._digests = self._read_digests(table, tensors, header.digest)
            with naming(self.path):
                self.program = Program.from_json(self.text(gqsa.KEY_PROGRAM))
        except BaseException:
            self._file.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for name, info in tensors.items() if name != gqsa.DIGESTS_TENSOR
        }

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        require_signature: str | os.PathLike[str] | bytes | None = None,
        signature: str | os.PathLike[str] | None = None,
    ) -> ArtifactFile:
        """Opens a file and reads its header. Raises InputError (no such file) or FormatError.

        require_signature: a trusted key or certificate; then the whole file is hashed, and SignatureError raised where
        its signature does not vouch for it; parameters as in `signature.check_signature`. What is read later, is of
        those bytes, whatever becomes of the file on disk.
        """
        signed = None if require_signature is None else check_signature(path, require_signature, signature)
        return cls(path, signed)

    def close(self) -> None:
        """Closes the file; `read` fails afterwards."""
        self._file.close()

    def __enter__(self) -> ArtifactFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def text(self, key: str) -> str:
        """A metadata string that must be there. Raises FormatError where it is not."""
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise FormatError(f"{self.path}: the metadata string {key!r} is missing; rebuild it with `gqsac build`")
        return value

    def read(self, name: str, verify: bool = True) -> np.ndarray:
        """A tensor as a fresh array, its first byte aligned to 64. verify: check its sha256 digest.

        Raises FormatError where the tensor is missing, the file has shrunk, or the digest differs.
        """
        if name not in self.tensors:
            raise FormatError(f"{self.path}: tensor {name!r} is missing; rebuild the file with `gqsac build`")
        info = self.tensors[name]
        data = _read_exactly(self._file, self.path, info.offset, info.size)
        if verify and hashlib.sha256(data.data).digest() != self._digests[name]:
            raise FormatError(
                f"{self.path}: tensor {name!r} is damaged: its sha256 differs from the file's digest table; "
                "copy or download the file again"
            )
        return data.view(_NUMPY_TYPES[info.dtype]).reshape(info.shape)

    def code(self, binary: Binary) -> bytes:
        """The machine code of a binary of a validated program, its kernels at the places that the binary names.

        Raises FormatError as `read` does, and where the code is not of the length and digest that the program states.
        """
        with naming(self.path):
            return unpack(self.read(binary.tensor).data, binary.n_bytes, binary.sha256)

    def _check_signature(
        self, signature: Signature, header: _Header, table: bytes, tensors: Mapping[str, TensorInfo]
    ) -> None:
        """Hashes the file with the very bytes of header and table that this object holds.

        Every tensor is checked against the table when it is read, so all that is ever used of the file is signed.
        """
        place = tensors[gqsa.DIGESTS_TENSOR]
        sha256 = header.sha256.copy()
        for start, stop in ((header.n_bytes, place.offset), (place.offset + place.size, self.size)):
            for offset in range(start, stop, _HASHED_BYTES):
                sha256.update(_read_exactly(self._file, self.path, offset, min(_HASHED_BYTES, stop - offset)).data)
            if stop == place.offset:
                sha256.update(table)
        if sha256.digest() != signature.sha256:
            raise SignatureError(
                f"{self.path}: its SHA-256 is {sha256.hexdigest()}, but {signature.path} is of a file with "
                f"{signature.sha256.hex()}; get both again from whoever made them"
            )

    def _read_digests(self, table: bytes, tensors: Mapping[str, TensorInfo], header_digest: bytes) -> dict[str, bytes]:
        names = list(tensors)
        self.digest = hashlib.sha256(table).digest()
        rows = [table[start : start + _DIGEST_BYTES] for start in range(0, len(table), _DIGEST_BYTES)]
        if rows[0] != header_digest:
            raise FormatError(
                f"{self.path}: the header is damaged: its sha256 differs from the file's digest table; "
                "copy or download the file again"
            )
        return dict(zip(names[:-1], rows[1:], strict=True))


class _Header:
    """Parses the header; metadata, tensors, and the sha256 of its n_bytes, all before the tensor data."""

    def __init__(self, file: io.FileIO, path: str, file_size: int) -> None:
        self._file, self._path, self._file_size = file, path, file_size
        self._position = 0
        self.sha256 = hashlib.sha256()
        magic = self._take(4, "the magic number") if file_size >= 4 else b""
        if magic != gqsa.GGUF_MAGIC:
            raise FormatError(
                f"{path}: this is not a .gqsa file: it starts with {magic!r}, expected {gqsa.GGUF_MAGIC!r}; "
                "make one with `gqsac build`"
            )
        version = self._number("<I", "the GGUF version")
        if version != gqsa.GGUF_VERSION:
            raise FormatError(
                f"{path}: this is GGUF version {version}, expected {gqsa.GGUF_VERSION}; rebuild it with `gqsac build`"
            )
        n_tensors = self._count(MAX_TENSORS, "tensors")
        n_metadata = self._count(MAX_METADATA, "metadata keys")
        self.metadata: dict[str, int | bool | str] = {}
        for _ in range(n_metadata):
            self._read_metadata()
        self._check_required()
        infos = [self._read_tensor_info() for _ in range(n_tensors)]
        padding = self._take(-self._position % gqsa.ALIGNMENT, "the padding after the header")
        if any(padding):
            self._fail("the padding after the header is not zero")
        self.tensors = self._place(infos)
        self.n_bytes, self.digest = self._position, self.sha256.digest()

    def _fail(self, what: str) -> NoReturn:
        raise FormatError(f"{self._path}: {what}; the file is damaged or foreign: build or download it again")

    def _take(self, n_bytes: int, what: str) -> bytes:
        if n_bytes > self._file_size - self._position:
            raise FormatError(
                f"{self._path}: the file is truncated: {what} needs {n_bytes} bytes at byte {self._position}, "
                f"the file has {self._file_size}; copy or download it again"
            )
        if n_bytes > gqsa.MAX_HEADER_BYTES - self._position:
            self._fail(f"the header is larger than the {gqsa.MAX_HEADER_BYTES >> 20} MiB allowed")
        data: bytes = self._file.read(n_bytes)
        if len(data) != n_bytes:
            self._fail("the file shrank while it was read")
        self._position += n_bytes
        self.sha256.update(data)
        return data

    def _number(self, layout: str, what: str) -> int:
        (number,) = struct.unpack(layout, self._take(struct.calcsize(layout), what))
        return int(number)

    def _count(self, most: int, what: str) -> int:
        count = self._number("<Q", f"the number of {what}")
        if count > most:
            self._fail(f"the header announces {count} {what}, allowed are {most}")
        return count

    def _string(self, what: str, most: int | None = None, shortest: int = 1) -> str:
        length = self._number("<Q", f"the length of {what}")
        if most is not None and not shortest <= length <= most:
            self._fail(f"{what} is {length} bytes long, allowed are {shortest} to {most}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is not UTF-8")

    def _read_metadata(self) -> None:
        key = self._string("a metadata key", MAX_KEY_BYTES)
        if key in self.metadata:
            self._fail(f"the metadata key {key!r} occurs twice")
        kind = self._number("<I", f"the type of {key!r}")
        value: int | bool | str
        if kind == _VALUE_UINT32:
            value = self._number("<I", f"the value of {key!r}")
        elif kind == _VALUE_STRING:
            value = self._string(f"the value of {key!r}", _MAX_VALUE_BYTES.get(key), shortest=0)
        elif kind == _VALUE_BOOL:
            value = self._number("<B", f"the value of {key!r}")
            if value > 1:
                self._fail(f"the boolean {key!r} is {value}, expected 0 or 1")
            value = bool(value)
        else:
            # A newer or foreign file is the likelier cause: those are told apart as soon as their keys are read.
            self._fail(f"the metadata key {key!r} has value type {kind}, expected uint32 (4), bool (7) or string (8)")
        self.metadata[key] = value
        if key == gqsa.KEY_ARCHITECTURE and value != gqsa.ARCHITECTURE:
            raise FormatError(
                f"{self._path}: this is a GGUF file for {brief(value)}, not {gqsa.ARCHITECTURE!r}; "
                "compile it with `gqsac build` first"
            )
        if key == gqsa.KEY_FORMAT_VERSION and type(value) is int and 1 <= value < gqsa.FORMAT_VERSION:
            raise FormatError(
                f"{self._path}: the file has format version {value}, this runtime reads version {gqsa.FORMAT_VERSION}; "
                "rebuild it with `gqsac build`"
            )
        if key == gqsa.KEY_FORMAT_VERSION and type(value) is int and value > gqsa.FORMAT_VERSION:
            raise FormatError(
                f"{self._path}: the file has format version {value}, this runtime reads up to {gqsa.FORMAT_VERSION}; "
                "update the checkout of gqsac and install it again with `pip install ./runtime`"
            )

    def _check_required(self) -> None:
        if gqsa.KEY_ARCHITECTURE not in self.metadata:
            self._fail(f"the metadata key {gqsa.KEY_ARCHITECTURE!r} is missing")
        for key, expected in ((gqsa.KEY_FORMAT_VERSION, gqsa.FORMAT_VERSION), (gqsa.KEY_ALIGNMENT, gqsa.ALIGNMENT)):
            value = self.metadata.get(key)
            if type(value) is not int or value != expected:
                self._fail(f"the metadata key {key!r} is {brief(value)}, expected {expected}")

    def _read_tensor_info(self) -> tuple[str, tuple[int, ...], str, int, int]:
        name = self._string("a tensor name", gqsa.MAX_NAME_BYTES)
        n_dimensions = self._number("<I", f"the rank of {name!r}")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            self._fail(f"tensor {name!r} has {n_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
        reversed_shape = [self._number("<Q", f"the shape of {name!r}") for _ in range(n_dimensions)]
        type_id = self._number("<I", f"the type of {name!r}")
        offset = self._number("<Q", f"the offset of {name!r}")
        if type_id not in gqsa.TENSOR_TYPES:
            self._fail(f"tensor {name!r} has type {type_id}, expected one of {sorted(gqsa.TENSOR_TYPES)}")
        dtype, element_bytes = gqsa.TENSOR_TYPES[type_id]
        # Each dimension alone is bounded too: a zero elsewhere must not hide one that overflows 64 bits.
        if max(reversed_shape) > self._file_size or math.prod(reversed_shape) * element_bytes > self._file_size:
            raise FormatError(
                f"{self._path}: the file is truncated: tensor {name!r} of shape {reversed_shape[::-1]} {dtype} "
                f"does not fit the file's {self._file_size} bytes; copy or download it again"
            )
        return name, tuple(reversed_shape[::-1]), dtype, math.prod(reversed_shape) * element_bytes, offset

    def _place(self, infos: list[tuple[str, tuple[int, ...], str, int, int]]) -> dict[str, TensorInfo]:
        """Tensors must cover the rest of the file exactly, in order, each padded to the alignment."""
        tensors: dict[str, TensorInfo] = {}
        start = end = self._position
        for name, shape, dtype, size, offset in infos:
            if name in tensors:
                self._fail(f"the tensor name {name!r} occurs twice")
            if start + offset != end:
                self._fail(f"tensor {name!r} starts at byte {offset} of the data, expected {end - start}")
            tensors[name] = TensorInfo(shape, dtype, end, size)
            end += size + -size % gqsa.ALIGNMENT
        if end > self._file_size:
            raise FormatError(
                f"{self._path}: the file is truncated: it has {self._file_size} bytes, its tensors need {end}; "
                "copy or download it again"
            )
        if end < self._file_size:
            self._fail(f"{self._file_size - end} bytes follow the last tensor, expected none")
        return tensors


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """FormatErrors within say of which file they are."""
    try:
        yield
    except FormatError as error:
        if os.fspath(path) in str(error):
            raise
        raise FormatError(f"{os.fspath(path)}: {error}") from error


def _open_regular(path: str) -> io.FileIO:
    try:
        # O_NONBLOCK: a named pipe must be refused, not waited for. O_BINARY exists on Windows alone.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = io.FileIO(os.open(path, flags))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder, expected a .gqsa file; make one with `gqsac build`") from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: the file cannot be opened: {reason}; check it and its permissions") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InputError(f"{path}: this is not a regular file, expected a .gqsa file on disk")
    return file


def _read_table(file: io.FileIO, path: str, tensors: Mapping[str, TensorInfo]) -> bytes:
    """The bytes of the digest table, which is the last tensor."""
    info = tensors.get(gqsa.DIGESTS_TENSOR)
    if info is None or list(tensors)[-1] != gqsa.DIGESTS_TENSOR:
        raise FormatError(f"{path}: the last tensor is not {gqsa.DIGESTS_TENSOR!r}; rebuild the file")
    if info.dtype != "i8" or info.shape != (len(tensors), _DIGEST_BYTES):
        raise FormatError(
            f"{path}: the digest table is {info.dtype} {list(info.shape)}, "
            f"expected i8 [{len(tensors)}, {_DIGEST_BYTES}]; rebuild the file"
        )
    return _read_exactly(file, path, info.offset, info.size).tobytes()


def _check_padding(file: io.FileIO, path: str, tensors: Mapping[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        n_bytes = -info.size % gqsa.ALIGNMENT
        if n_bytes and _read_exactly(file, path, info.offset + info.size, n_bytes).any():
            raise FormatError(
                f"{path}: the padding after tensor {name!r} is not zero; the file is damaged: download it again"
            )


def _read_exactly(file: io.FileIO, path: str, offset: int, n_bytes: int) -> np.ndarray:
    """uint8 [n_bytes] from the file, the first byte aligned in memory as tensors are in the file."""
    try:
        room = np.empty(n_bytes + gqsa.ALIGNMENT, np.uint8)
    except MemoryError:
        raise FormatError(f"{path}: there is no memory for the {n_bytes} bytes of a tensor; free some") from None
    shift = -room.ctypes.data % gqsa.ALIGNMENT
    data = room[shift : shift + n_bytes]
    view, done = data.data, 0
    while done < n_bytes:  # a raw file may return less than asked, 2 GiB at most on Linux
        count = _read_at(file, view[done:], offset + done)
        if not count:
            raise FormatError(f"{path}: the file is truncated: it ended at byte {offset + done} while it was read")
        done += count
    return data


_seeking = threading.Lock()


def _read_at(file: io.FileIO, view: memoryview, offset: int) -> int:
    """Reads from a place of the file into the view; returns how many bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [view], offset)
    with _seeking:  # Windows has one position for all threads
        file.seek(offset)
        return file.readinto(view) or 0
