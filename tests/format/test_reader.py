"""One test per rule of the format: what breaks the rule is refused with a sentence that names it."""

import json
import os
import struct

import numpy as np
import pytest
from gqsa_runtime.errors import FormatError, InputError
from gqsa_runtime.program import Program
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.validate import ContentChecks, validate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.format import gguf_bytes, tiny

SOUND = tiny.file_bytes()


def write(tmp_path, data: bytes) -> str:
    path = tmp_path / "model.gqsa"
    path.write_bytes(data)
    return str(path)


def refuse(tmp_path, data: bytes, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        ArtifactFile.open(write(tmp_path, data))


def raw(pairs=None, infos=(), data=b"", **options) -> bytes:
    """A file from parts, no digests: for rules that are checked before them."""
    return gguf_bytes.header(list((tiny.metadata() if pairs is None else pairs).items()), list(infos), **options) + data


def test_sound_file_reads_back(tmp_path):
    with ArtifactFile.open(write(tmp_path, SOUND)) as file:
        assert file.program == tiny.program()
        assert file.metadata["gqsa.format_version"] == 4
        assert list(file.tensors) == list(tiny.tensors())
        for name, expected in tiny.tensors().items():
            array = file.read(name)
            assert array.dtype == expected.dtype and array.shape == expected.shape
            assert array.ctypes.data % 64 == 0
            np.testing.assert_array_equal(array, expected)
        validate(file.program, file.tensors)
        assert file.code(file.program.binaries[0]) == tiny.CODE


def test_what_the_gguf_package_writes_is_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gqsa"
    writer = gguf.GGUFWriter(path, "gqsa")
    writer.add_custom_alignment(64)
    for key, item in tiny.metadata().items():
        if key not in ("general.architecture", "general.alignment"):
            writer.add_uint32(key, item) if isinstance(item, int) else writer.add_string(key, item)
    arrays = tiny.tensors()
    own = gguf_bytes.gguf(tiny.metadata(), arrays)
    table = np.frombuffer(own[-gguf_bytes.ALIGNMENT * -(-32 * (len(arrays) + 1) // 64) :], np.int8)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.add_tensor("gqsa.digests", table[: 32 * (len(arrays) + 1)].reshape(-1, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert path.read_bytes() == own


def test_empty_stream_is_allowed(tmp_path):
    data = gguf_bytes.gguf(tiny.metadata(), {"none": np.empty((0, 8), np.int8), "one": np.ones(3, np.float32)})
    with ArtifactFile.open(write(tmp_path, data)) as file:
        assert file.read("none").shape == (0, 8)
        assert file.read("one").tolist() == [1, 1, 1]


def test_missing_file_and_folder_and_pipe(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        ArtifactFile.open(tmp_path / "nothing.gqsa")
    with pytest.raises(InputError):
        ArtifactFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="regular file"):
        ArtifactFile.open(tmp_path / "pipe")


@pytest.mark.parametrize("length", [0, 3])
def test_too_short_for_magic(tmp_path, length):
    refuse(tmp_path, SOUND[:length], "not a .gqsa file")


def test_foreign_magic(tmp_path):
    refuse(tmp_path, b"PK\x03\x04" + SOUND[4:], "not a .gqsa file")


def test_other_gguf_version(tmp_path):
    refuse(tmp_path, raw(version=2), "GGUF version 2, expected 3")


def test_other_architecture(tmp_path):
    # A foreign file is named as such before its unknown value types are met.
    pairs = {"general.architecture": "llama", "tokenizer.ggml.tokens": struct.pack("<IIQ", 9, 8, 0)}
    refuse(tmp_path, raw(pairs), "GGUF file for 'llama'.*gqsac build")


def test_newer_format_version(tmp_path):
    refuse(tmp_path, tiny.file_bytes(**{"gqsa.format_version": 5}), "format version 5.*pip install ./runtime")


def test_older_format_version(tmp_path):
    for version in (1, 2, 3):
        message = f"format version {version}, .*rebuild it with `gqsac build`"
        refuse(tmp_path, tiny.file_bytes(**{"gqsa.format_version": version}), message)


def test_format_version_zero_or_wrong_type(tmp_path):
    refuse(tmp_path, tiny.file_bytes(**{"gqsa.format_version": 0}), "format_version")
    refuse(tmp_path, tiny.file_bytes(**{"gqsa.format_version": True}), "format_version")


@pytest.mark.parametrize("key", ["general.architecture", "general.alignment", "gqsa.format_version", "gqsa.program"])
def test_missing_key(tmp_path, key):
    refuse(tmp_path, tiny.file_bytes(**{key: None}), key)


def test_other_alignment(tmp_path):
    refuse(tmp_path, tiny.file_bytes(**{"general.alignment": 32}), "alignment.*32, expected 64")


def test_duplicate_key(tmp_path):
    pairs = [*tiny.metadata().items(), ("general.name", "again")]
    refuse(tmp_path, gguf_bytes.gguf(pairs, {}), "'general.name' occurs twice")


def test_unknown_value_type(tmp_path):
    refuse(tmp_path, tiny.file_bytes(**{"x.array": struct.pack("<IIQ", 9, 4, 0)}), "value type 9")


def test_boolean_of_two(tmp_path):
    refuse(tmp_path, tiny.file_bytes(**{"x.flag": struct.pack("<IB", 7, 2)}), "boolean 'x.flag' is 2")


def test_key_not_utf8(tmp_path):
    refuse(tmp_path, tiny.file_bytes(**{"x.text": struct.pack("<I", 8) + gguf_bytes.string(b"\xff\xfe")}), "not UTF-8")


def test_huge_counts_are_refused_before_anything_is_read(tmp_path):
    refuse(tmp_path, raw(n_tensors=1 << 60), "tensors, allowed are")
    refuse(tmp_path, raw(n_pairs=1 << 60), "metadata keys, allowed are")


@pytest.mark.parametrize(
    ("key", "most"), [("gqsa.program", 32 << 20), ("tokenizer.chat_template", 1 << 20), ("general.name", 1024)]
)
def test_a_value_that_is_too_long_is_not_read(tmp_path, key, most):
    refuse(tmp_path, tiny.file_bytes(**{key: "x" * (most + 1)}), f"'{key}' is {most + 1} bytes long, allowed are 0 to")


def test_huge_string(tmp_path):
    huge = struct.pack("<IQ", 8, 1 << 62)
    refuse(tmp_path, tiny.file_bytes(**{"x.text": huge}), "truncated")


def test_header_larger_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("gqsa_runtime.format.MAX_HEADER_BYTES", 256)
    refuse(tmp_path, SOUND, "header is larger")


def test_header_padding_not_zero(tmp_path):
    head = gguf_bytes.header(list(tiny.metadata(**{"x": "y"}).items()), [])
    unpadded = head.rstrip(b"\0")
    assert len(unpadded) < len(head)
    refuse(tmp_path, head[:-1] + b"\1", "padding after the header")


def test_rank(tmp_path):
    for shape in ((), (1, 1, 1, 1, 1)):
        refuse(tmp_path, raw(infos=[gguf_bytes.tensor_info("t", shape, 0, 0)]), "dimensions, expected 1 to 4")


def test_tensor_type(tmp_path):
    refuse(tmp_path, raw(infos=[gguf_bytes.tensor_info("t", (1,), 2, 0)]), "type 2, expected one of")


def test_tensor_name_length(tmp_path):
    refuse(tmp_path, raw(infos=[gguf_bytes.tensor_info("t" * 64, (1,), 0, 0)]), "64 bytes long, allowed are 1 to 63")
    refuse(tmp_path, raw(infos=[gguf_bytes.tensor_info("", (1,), 0, 0)]), "0 bytes long")


def test_tensor_name_twice(tmp_path):
    infos = [gguf_bytes.tensor_info("t", (1,), 0, 0), gguf_bytes.tensor_info("t", (1,), 0, 64)]
    refuse(tmp_path, raw(infos=infos, data=b"\0" * 128), "tensor name 't' occurs twice")


@pytest.mark.parametrize("shape", [(1 << 62,), (1 << 32, 1 << 32), (0, 1 << 63)])
def test_tensor_larger_than_the_file(tmp_path, shape):
    refuse(tmp_path, raw(infos=[gguf_bytes.tensor_info("t", shape, 0, 0)]), "truncated: tensor 't'")


@pytest.mark.parametrize("offset", [32, 128, 0, 1 << 63])  # misaligned, a gap, overlapping, overflowing
def test_tensor_offset(tmp_path, offset):
    infos = [gguf_bytes.tensor_info("t", (16,), 0, 0), gguf_bytes.tensor_info("u", (16,), 0, offset)]
    refuse(tmp_path, raw(infos=infos, data=b"\0" * 192), "starts at byte .* expected 64")


def test_trailing_data(tmp_path):
    refuse(tmp_path, SOUND + b"\0", "1 bytes follow the last tensor")


def test_padding_between_tensors(tmp_path):
    data = bytearray(SOUND)
    start = SOUND.index(tiny.tensors()["binary.cpu"].tobytes()) + tiny.tensors()["binary.cpu"].nbytes
    assert data[start] == 0
    data[start] = 7
    refuse(tmp_path, bytes(data), "padding after tensor 'binary.cpu'")


@pytest.mark.parametrize("cut", [1, 64, 1000, len(SOUND) - 40])
def test_truncated(tmp_path, cut):
    refuse(tmp_path, SOUND[:-cut], "truncated")


def test_digests_missing_or_not_last(tmp_path):
    refuse(
        tmp_path, gguf_bytes.gguf(tiny.metadata(), {"t": np.ones(1, np.float32)}, digests=False), "last tensor is not"
    )
    arrays = {"gqsa.digests": np.zeros((2, 32), np.int8), "t": np.ones(1, np.float32)}
    refuse(tmp_path, gguf_bytes.gguf(tiny.metadata(), arrays, digests=False), "last tensor is not")


def test_digests_of_other_shape(tmp_path):
    arrays = {"t": np.ones(1, np.float32), "gqsa.digests": np.zeros((3, 32), np.int8)}
    refuse(tmp_path, gguf_bytes.gguf(tiny.metadata(), arrays, digests=False), r"expected i8 \[2, 32\]")


def test_header_digest(tmp_path):
    data = SOUND.replace(b"TinyForCausalLM", b"TinyForCausalML")
    assert data != SOUND
    refuse(tmp_path, data, "header is damaged")


def test_tensor_digest(tmp_path):
    data = bytearray(SOUND)
    data[SOUND.index(tiny.tensors()["embed"].tobytes()) + 5] ^= 1
    with ArtifactFile.open(write(tmp_path, bytes(data))) as file:
        with pytest.raises(FormatError, match="tensor 'embed' is damaged"):
            file.read("embed")
        assert file.read("embed", verify=False).shape == (tiny.VOCAB, tiny.WIDTH)
        assert file.read("norm").shape == (tiny.WIDTH,)


def test_unknown_tensor_and_shrunken_file(tmp_path):
    path = write(tmp_path, SOUND)
    with ArtifactFile.open(path) as file:
        with pytest.raises(FormatError, match="'nothing' is missing"):
            file.read("nothing")
        os.truncate(path, len(SOUND) // 2)
        with pytest.raises(FormatError, match="truncated"):
            file.read("binary.cpu")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, '{"name": 1}', "{" * 10])
def test_program_that_is_none(tmp_path, text):
    refuse(tmp_path, tiny.file_bytes(**{"gqsa.program": text}), "program is not one")


def outcome(path: str) -> str:
    """Reads all of a file as a runtime would; any other exception than FormatError fails the test."""
    try:
        with ArtifactFile.open(path) as file:
            validate(file.program, file.tensors)
            checks = ContentChecks(file.program, file.tensors)
            for name in file.tensors:
                checks.check(name, file.read(name), file.read)
        return "sound"
    except FormatError as error:
        assert len(str(error)) < 1000
        return "refused"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("key", ["general.architecture", "gqsa.format_version"])
def test_a_long_value_is_told_in_short(tmp_path, key):
    data = gguf_bytes.gguf({**tiny.metadata(), key: "x\x1b[2J" * 100_000}, tiny.tensors())
    (tmp_path / "long.gqsa").write_bytes(data)
    with pytest.raises(FormatError) as refused:
        ArtifactFile.open(tmp_path / "long.gqsa")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


def test_names_of_others_move_no_terminal(tmp_path, capsys):
    from gqsa_runtime.cli import main

    data = gguf_bytes.gguf(tiny.metadata(), {**tiny.tensors(), "\x1b[2J\u202e": np.zeros(1, np.float32)})
    (tmp_path / "names.gqsa").write_bytes(data)
    with pytest.raises(SystemExit) as ended:
        main(args=["inspect", str(tmp_path / "names.gqsa"), "--tensors"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "\\x1b[2J\\u202e" in shown
    assert all(line.isprintable() for line in shown.split("\n"))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(1, 255)), max_size=4), st.data())
def test_flipped_and_cut_files_are_refused(scratch, flips, data):
    changed = bytearray(SOUND)
    for place, mask in flips:
        changed[place] ^= mask
    length = data.draw(st.one_of(st.just(len(SOUND)), st.integers(0, len(SOUND))))
    changed = bytes(changed[:length])
    assert outcome(write(scratch, changed)) == ("sound" if changed == SOUND else "refused")


HEADER_LENGTH = len(gguf_bytes.header(list(tiny.metadata().items()), [])) - 64


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 23 + 400), st.binary(min_size=1, max_size=8))
def test_overwritten_header_never_crashes(scratch, place, patch):
    changed = SOUND[:place] + patch + SOUND[place + len(patch) :]
    outcome(write(scratch, changed))


JSON_VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 2**64), st.floats(), st.text(max_size=3),
                        st.lists(st.integers(0, 3), max_size=3), st.just({}))  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_program_with_one_value_changed_never_crashes(data):
    """The digests of a hostile file are right: its program must be caught by its rules alone."""
    raw_program = json.loads(tiny.program().to_json())
    node = raw_program
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 9)):
            node = node[key]
            continue
        node[key] = data.draw(JSON_VALUES)
        break
    arrays = {name: _Info(array) for name, array in tiny.tensors().items()}
    try:
        program = Program.from_json(json.dumps(raw_program))
        validate(program, arrays)
        ContentChecks(program, arrays)
    except FormatError:
        pass


class _Info:
    def __init__(self, array: np.ndarray):
        self.shape, self.elements, self.size = array.shape, array.size, array.nbytes
        self.dtype = {"float32": "f32", "float16": "f16", "int8": "i8", "int16": "i16", "int32": "i32"}[
            array.dtype.name
        ]
