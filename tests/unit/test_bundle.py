"""The artifact on disk: whole or not at all, with true digests, the same bytes for the same input."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gqsa_runtime.errors import FormatError
from gqsa_runtime.facts import facts_json
from gqsa_runtime.format import ALIGNMENT, DIGESTS_TENSOR
from gqsa_runtime.reader import ArtifactFile

from gqsac.compiler.passes.bundle import Content, bundle, check_output
from gqsac.compiler.passes.pack import PackedTensor
from gqsac.errors import DeviceError, InputError
from tests.format import tiny

ARRAYS = {
    "a": np.arange(33, dtype=np.float32),
    "b": np.arange(-30, 30, dtype=np.int32).reshape(6, 10),
    "c": np.arange(7, dtype=np.int8),
    "d": np.linspace(0, 1, 64).astype(np.float16).reshape(4, 16),
}
NAMES = {np.dtype(np.float32): "f32", np.dtype(np.int32): "i32", np.dtype(np.int8): "i8", np.dtype(np.float16): "f16"}


def tensors(**replaced):
    """The packed form of ARRAYS; replaced: name -> another maker."""
    return [
        PackedTensor(name, NAMES[array.dtype], array.shape, replaced.get(name, lambda array=array: array))
        for name, array in ARRAYS.items()
    ]


def write(path, made=None, chat_template=tiny.CHAT_TEMPLATE, **options):
    content = Content(
        name="tiny",
        program_json=tiny.program().to_json(),
        compiler_json='{"gqsac":"test"}',
        facts_json=facts_json(0.5, None),
        tokenizer_json=tiny.tokenizer_json(),
        chat_template=chat_template,
        tensors=tuple(tensors() if made is None else made),
    )
    return bundle(path, content, **options)


def test_what_was_written_is_read_back(tmp_path):
    counted = []
    size = write(tmp_path / "m.gqsa", progress=lambda *told: counted.append(told))
    assert size == (tmp_path / "m.gqsa").stat().st_size
    sizes = [array.nbytes for array in ARRAYS.values()]
    assert counted == [("write", sum(sizes[: n + 1]), sum(sizes)) for n in range(len(sizes))]
    with ArtifactFile.open(tmp_path / "m.gqsa") as file:
        assert list(file.tensors) == list(ARRAYS)
        for name, array in ARRAYS.items():
            read = file.read(name)
            assert read.dtype == array.dtype and (read == array).all()
            assert file.tensors[name].offset % ALIGNMENT == 0
        assert file.program == tiny.program()
        assert file.metadata["general.name"] == "tiny"
        assert file.metadata["tokenizer.chat_template"] == tiny.CHAT_TEMPLATE


def test_a_chat_template_may_be_missing(tmp_path):
    write(tmp_path / "m.gqsa", chat_template=None)
    with ArtifactFile.open(tmp_path / "m.gqsa") as file:
        assert "tokenizer.chat_template" not in file.metadata


def test_the_digest_table_is_that_of_the_bytes(tmp_path):
    write(tmp_path / "m.gqsa")
    data = (tmp_path / "m.gqsa").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "m.gqsa")  # another's reader of the same format
    *stored, table = reader.tensors
    assert table.name == DIGESTS_TENSOR and [tensor.name for tensor in stored] == list(ARRAYS)
    expected = [hashlib.sha256(data[: stored[0].data_offset]).digest()]
    expected += [hashlib.sha256(array.tobytes()).digest() for array in ARRAYS.values()]
    assert table.data.tobytes() == b"".join(expected)


def test_a_flipped_bit_is_found(tmp_path):
    write(tmp_path / "m.gqsa")
    data = bytearray((tmp_path / "m.gqsa").read_bytes())
    with ArtifactFile.open(tmp_path / "m.gqsa") as file:
        offset = file.tensors["b"].offset
    data[offset + 5] ^= 4
    (tmp_path / "m.gqsa").write_bytes(data)
    with ArtifactFile.open(tmp_path / "m.gqsa") as file:
        assert (file.read("a") == ARRAYS["a"]).all()
        with pytest.raises(FormatError, match="'b' is damaged"):
            file.read("b")


def test_the_same_input_gives_the_same_bytes(tmp_path):
    write(tmp_path / "one.gqsa")
    write(tmp_path / "two.gqsa")
    assert (tmp_path / "one.gqsa").read_bytes() == (tmp_path / "two.gqsa").read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "m.gqsa")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.gqsa").stat().st_mode) == 0o666 & ~umask


def raising(error):
    def make():
        raise error

    return make


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), MemoryError()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error, first):
    path = tmp_path / "m.gqsa"
    write(path)
    old = path.read_bytes()
    with pytest.raises(type(error)):
        write(path, tensors(**{"a" if first else "d": raising(error)}))
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == ["m.gqsa"]


@pytest.mark.parametrize("place", ["write_tensor_data", "write_header_to_file", "fsync", "replace"])
@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("64 requested and 0 written"), "the disk is full"),  # as numpy puts it
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, place, error, words):
    def fail(*args, **options):
        raise error

    path = tmp_path / "m.gqsa"
    monkeypatch.setattr(os if place in ("fsync", "replace") else gguf.GGUFWriter, place, fail)
    with pytest.raises(DeviceError, match=f"writing .*m.gqsa failed: {words} .*MB free in"):
        write(path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_not_as_planned_is_a_bug(tmp_path):
    for wrong in (np.zeros(34, np.float32), np.zeros(33, np.float64)):
        with pytest.raises(AssertionError, match="a: made"):
            write(tmp_path / "m.gqsa", tensors(a=lambda wrong=wrong: wrong))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_went_away(tmp_path):
    with pytest.raises(DeviceError, match="cannot write in .*gone"):
        write(tmp_path / "gone" / "m.gqsa")


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path, monkeypatch):
    check_output(tmp_path / "new.gqsa")
    write(tmp_path / "old.gqsa")
    check_output(tmp_path / "old.gqsa")
    (tmp_path / "empty.gqsa").touch()
    check_output(tmp_path / "empty.gqsa")
    with pytest.raises(InputError, match="which is a folder"):
        check_output(tmp_path)
    with pytest.raises(InputError, match="no/folder does not exist"):
        check_output(tmp_path / "no/folder/m.gqsa")
    with pytest.raises(InputError, match="not a regular file"):
        check_output("/dev/null")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a .gqsa file"):
        check_output(tmp_path / "notes.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DeviceError, match="cannot be written"):
        check_output(tmp_path / "new.gqsa")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_that_fails_its_check_is_not_published(tmp_path):
    seen = []

    def check(path):
        with ArtifactFile.open(path) as file:  # finished and readable, but not yet under its name
            seen.append(list(file.tensors))
        raise FormatError("it is not sound")

    with pytest.raises(FormatError, match="not sound"):
        write(tmp_path / "m.gqsa", check=check)
    assert seen == [list(ARRAYS)] and list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path):
    code = "import os; from tests.unit.test_bundle import write; from pathlib import Path; import sys\n"
    code += "write(Path(sys.argv[1]), check=lambda path: os.kill(os.getpid(), 9))"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "runtime")])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.gqsa")], env=environment, timeout=60)
    assert done.returncode == -9 and len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".other.gqsa.x.partial").write_text("of another file")
    held = []

    def check(path):  # a build of the same file that begins meanwhile leaves this one alone
        if not held:
            held.append(path)
            write(tmp_path / "m.gqsa")
            assert path.exists()

    write(tmp_path / "m.gqsa", check=check)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.gqsa.x.partial", "m.gqsa"]
