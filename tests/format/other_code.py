"""A copy of a file in which a target's machine code is another, with a plan and digests that agree with it."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from gqsa_runtime.reader import ArtifactFile

from tests.format import gguf_bytes, tiny


def with_code(built: Path, path: Path, target: str, change: Callable[[bytearray], bytes | bytearray]) -> Path:
    """Writes the copy and returns its path."""
    with ArtifactFile.open(built) as file:
        (held,) = (binary for binary in file.program.binaries if binary.target == target)
        code = bytes(change(bytearray(file.code(held))))
        made = dataclasses.replace(held, n_bytes=len(code), sha256=hashlib.sha256(code).hexdigest())
        binaries = tuple(made if binary == held else binary for binary in file.program.binaries)
        program = dataclasses.replace(file.program, binaries=binaries)
        arrays = {name: file.read(name) for name in file.tensors} | {held.tensor: tiny.packed(code)}
        path.write_bytes(gguf_bytes.gguf({**file.metadata, "gqsa.program": program.to_json()}, arrays))
    return path
