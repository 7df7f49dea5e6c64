"""How machine code is kept: it comes back as it was, and one test for each way in which a stream may be wrong."""

import builtins
import hashlib
import lzma
import tracemalloc

import numpy as np
import pytest
from gqsa_runtime import machine_code
from gqsa_runtime.errors import DeviceError, FormatError
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.verify import verify_file

from tests.format import tiny

CODE = np.random.default_rng(0).integers(0, 4, 3 << 20, np.uint8).tobytes()
PACKED = machine_code.pack(CODE)


def unpack(packed: bytes = PACKED, n_bytes: int = len(CODE), code: bytes = CODE) -> bytes:
    return machine_code.unpack(packed, n_bytes, hashlib.sha256(code).hexdigest())


def refuse(match: str, *given) -> None:
    with pytest.raises(FormatError, match=f"machine code is damaged: .*{match}.*download the file again"):
        unpack(*given)


def test_code_comes_back():
    assert unpack() == CODE and len(PACKED) < len(CODE) / 3
    assert machine_code.pack(CODE) == PACKED
    assert unpack(machine_code.pack(b"x"), 1, b"x") == b"x"


@pytest.mark.parametrize("n_bytes", [0, -1, machine_code.MAX_BYTES + 1])
def test_a_length_out_of_range(n_bytes):
    refuse(f"said to have {n_bytes} bytes", PACKED, n_bytes)


@pytest.mark.parametrize("n_bytes", [1, len(CODE) - 1, len(CODE) + 1, machine_code.MAX_BYTES])
def test_another_length(n_bytes):
    refuse(f"does not hold exactly the {n_bytes} bytes", PACKED, n_bytes)


@pytest.mark.parametrize(
    "packed", [PACKED[:-1], PACKED[: len(PACKED) // 2], PACKED + b"\0", PACKED + PACKED, b"", b"\0"]
)
def test_a_stream_that_ends_too_early_or_too_late(packed):
    refuse("does not hold exactly", packed)


def test_what_is_no_stream():
    refuse("no LZMA2 stream", b"\xff" + PACKED[1:])
    refuse("no LZMA2 stream", lzma.compress(CODE))


def test_other_code():
    refuse("sha256 differs", machine_code.pack(CODE[:-1] + b"\4"))


def test_a_bomb_takes_no_memory():
    bomb = machine_code.pack(bytes(200 << 20))
    tracemalloc.start()
    refuse("exactly the 1000 bytes", bomb, 1000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(bomb) < 1 << 20 and most < 2 * machine_code.DICTIONARY_BYTES


def test_a_python_without_lzma(monkeypatch):
    found = builtins.__import__

    def without(name, *given):
        if name == "lzma":
            raise ImportError("No module named '_lzma'")
        return found(name, *given)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DeviceError, match="no module lzma .*another Python"):
        unpack()


def test_verify_reads_all_code(tmp_path):
    """Digests of the file may be right where the code is not what the plan states."""
    path = tmp_path / "odd.gqsa"
    path.write_bytes(tiny.file_bytes(arrays={**tiny.tensors(), "binary.cpu": tiny.packed(tiny.CODE[::-1])}))
    with ArtifactFile.open(path) as file, pytest.raises(FormatError, match="odd.gqsa: .*sha256 differs"):
        file.code(file.program.binaries[0])
    with pytest.raises(FormatError, match="odd.gqsa: .*sha256 differs"):
        verify_file(path)
