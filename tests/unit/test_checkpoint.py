"""Reading checkpoint folders of both format versions: what comes back, and one refusal per rule."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_torch

from gqsac import codec
from gqsac.bsr import BITS
from gqsac.checkpoint import Checkpoint
from gqsac.codec import MatrixHeader
from gqsac.compress.write import ShardWriter, dense_tensor, write_json
from gqsac.errors import FormatError, ModelError
from gqsac.quantization_config import QuantizationConfig
from gqsac.quantized_matrix import ROW_BITS, QuantizedMatrix
from tests.unit import version_1
from tests.unit.compress_models import random_stream
from tests.unit.damage import change, put
from tests.unit.random_matrices import random_matrix

MODULE = "model.layers.0.mlp.up_proj"


def write(folder, tensors, shard_bytes=1 << 30, quantization=None, **changes):
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, shard_bytes)
    writer.add(tensors)
    writer.finish()
    quantization = {**(quantization or version_1.config(16, {MODULE: (6, 64)})), **changes}
    write_json(folder / "config.json", {"model_type": "llama", "quantization_config": quantization})
    return folder


def tensors_of(*streams):
    return {**version_1.stream_tensors(MODULE, streams), "model.norm.weight": np.ones(4, np.float32)}


def write_matrices(folder, matrices, tensors=None, **changes):
    """matrices: module -> QuantizedMatrix; the first one's group sizes are the checkpoint's."""
    first = next(iter(matrices.values()))
    sizes = {name: (matrix.group_size, matrix.quant_group_size) for name, matrix in matrices.items()}
    quantization = QuantizationConfig(
        4, first.group_size, 0.5, (), {name: matrix.levels.shape for name, matrix in matrices.items()}, {},
        first.quant_group_size, {name: own for name, own in sizes.items() if own != sizes[next(iter(sizes))]},
    ).to_dict()  # fmt: skip
    if tensors is None:
        tensors = stored(matrices)
    return write(folder, tensors, quantization=quantization, **changes)


def stored(matrices):
    return {f"{name}.{part}": array for name, matrix in matrices.items() for part, array in codec.pack(matrix).items()}


@pytest.mark.parametrize("bits", ROW_BITS)
def test_matrices_come_back(tmp_path, bits):
    other = "model.layers.0.mlp.down_proj"
    matrices = {
        MODULE: random_matrix(6, 256, 16, 64, (bits,)),
        other: random_matrix(5, 128, 32, 32, (2, 8), kept=1),
    }
    checkpoint = Checkpoint.open(write_matrices(tmp_path / "m", matrices, shard_bytes=200))
    assert checkpoint.modules() == [other, MODULE] and checkpoint.is_compressed(other)
    assert checkpoint.matrix_header(MODULE) == MatrixHeader(6, 256, 16, 64, (bits,), matrices[MODULE].n_groups)
    assert checkpoint.matrix_header(other) == MatrixHeader(5, 128, 32, 32, (2, 8), 5 * 4)
    for name, matrix in matrices.items():
        found = checkpoint.matrix(name)
        np.testing.assert_array_equal(found.dequantize(), matrix.dequantize())
        assert (found.group_size, found.quant_group_size) == (matrix.group_size, matrix.quant_group_size)


@pytest.mark.parametrize("bits", BITS)
def test_matrices_come_as_streams_where_they_can(tmp_path, bits):
    matrix = random_matrix(6, 256, 16, 64, (bits,))
    matrix.zeros[:] = 8
    checkpoint = Checkpoint.open(write_matrices(tmp_path / "m", {MODULE: matrix}))
    (stream,) = checkpoint.streams(MODULE)
    np.testing.assert_array_equal(stream.dequantize(), matrix.dequantize())
    (header,) = checkpoint.stream_headers(MODULE)
    assert (header.rows, header.columns, header.group_size, header.bits, header.nnz) == (6, 256, 16, bits, stream.nnz)


def test_matrices_that_are_no_streams_are_refused_by_name(tmp_path):
    whole = {"kept": 1}
    for number, (matrix, message) in enumerate(
        [
            (random_matrix(6, 128, 16, 64, (2, 4), **whole), "up_proj has rows of 2 and 4 bits"),
            (random_matrix(6, 128, 64, 32, **whole), "up_proj has several scales in a group of 64"),
            (
                random_matrix(6, 128, 16, 64, (2,), **whole),
                "up_proj is not stored as .*: a BSR stream's zeros are levels",
            ),
            (random_matrix(6, 128, 16, 64, (8,), **whole), "up_proj has 8-bit rows with zeros other than 128"),
        ]
    ):
        checkpoint = Checkpoint.open(write_matrices(tmp_path / str(number), {MODULE: matrix}))
        assert checkpoint.matrix(MODULE).rows == 6
        with pytest.raises(ModelError, match=message):
            checkpoint.streams(MODULE)


@pytest.mark.parametrize("bits", BITS)
def test_version_1_comes_as_matrices(tmp_path, bits):
    stream = random_stream(np.random.default_rng(0), bits=bits, empty_rows=(0, 5))
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors_of(stream)))
    assert checkpoint.quantization.to_dict() == checkpoint.config["quantization_config"]
    assert checkpoint.matrix_header(MODULE) == MatrixHeader(6, 64, 16, 16, (bits,), stream.nnz)
    matrix = checkpoint.matrix(MODULE)
    assert isinstance(matrix, QuantizedMatrix)
    np.testing.assert_array_equal(matrix.dequantize(), stream.dequantize())


def test_damaged_matrices_are_refused_by_name(tmp_path):
    matrices = {MODULE: random_matrix(6, 256, 16, 64)}
    for number, (part, how, message) in enumerate(
        [
            ("levels.4", lambda a: a[:, :4], "levels.4 has 4 bytes a group"),  # of headers: refused when opened
            ("scales", lambda a: a.astype(np.float32), "scales is of type F32, expected F16"),
            ("keep", lambda a: a[1:], "keep has 11 entries"),
        ]
    ):
        tensors = stored(matrices)
        tensors[f"{MODULE}.{part}"] = how(tensors[f"{MODULE}.{part}"])
        folder = write_matrices(tmp_path / str(number), matrices, tensors)
        with pytest.raises(FormatError, match=f"{folder}: tensor {MODULE}.{message}"):
            Checkpoint.open(folder)
    tensors = stored(matrices)
    tensors[f"{MODULE}.scales"][3] = np.nan
    folder = write_matrices(tmp_path / "nan", matrices, tensors)
    with pytest.raises(FormatError, match=f"{folder}: tensor {MODULE}.scales holds a NaN"):
        Checkpoint.open(folder).matrix(MODULE)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format_version": 3}, "format version 3, this gqsac reads versions 1 and 2"),
        ({"format_version": True}, "format version True"),
        ({"bits": 0.5}, "bits is 0.5, expected a number from 1 to 8"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 24}, "group_size is 24"),
        ({"group_size": 16.0}, "group_size is 16.0"),
        ({"quant_group_size": 24}, "quant_group_size is 24, expected a multiple or a divisor of the group size 16"),
        ({"quant_group_size": 0}, "quant_group_size is 0"),
        ({"modules": []}, "modules is list"),
        ({"modules": {MODULE: [6, 256]}}, "the entry of model.layers.0.mlp.up_proj is \\[6, 256\\]"),
        ({"modules": {MODULE: {}}}, "the shape of model.layers.0.mlp.up_proj is None"),
        ({"modules": {MODULE: {"shape": [6, 0]}}}, "the shape of model.layers.0.mlp.up_proj is \\[6, 0\\]"),
        ({"modules": {MODULE: {"shape": [6, 96]}}}, "columns a multiple of the group size 64"),
        ({"modules": {MODULE: {"shape": [6, 256], "group_size": 12}}}, "up_proj: group_size is 12"),
        ({"modules": {MODULE: {"shape": [6, 256], "quant_group_size": "x"}}}, "up_proj: quant_group_size is 'x'"),
        ({"modules": {}}, "gives no shape for the compressed linear model.layers.0.mlp.up_proj"),
        (
            {"modules": {MODULE: {"shape": [6, 256]}, "other": {"shape": [6, 256]}}},
            "compressed linear other are missing",
        ),
        ({"modules": {MODULE: {"shape": [6, 256], "group_size": 32}}}, "levels.4 has 8 bytes a group, expected 16"),
    ],
)
def test_a_bad_config_of_matrices_is_refused(tmp_path, changes, message):
    folder = write_matrices(tmp_path / "m", {MODULE: random_matrix(6, 256, 16, 64)}, **changes)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(folder)


def test_dense_parameters_named_like_parts_stay_dense(tmp_path):
    matrices = {MODULE: random_matrix(6, 256, 16, 64)}
    tensors = stored(matrices) | {"model.gate.scales": np.ones(3, np.float32)}
    checkpoint = Checkpoint.open(write_matrices(tmp_path / "m", matrices, tensors))
    assert checkpoint.modules() == [MODULE]
    np.testing.assert_array_equal(checkpoint.read("model.gate.scales"), np.ones(3))


@pytest.mark.parametrize("bits", BITS)
def test_streams_come_back(tmp_path, bits):
    stream = random_stream(np.random.default_rng(0), bits=bits, empty_rows=(0, 5))
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors_of(stream)))
    (read,) = checkpoint.streams(MODULE)
    assert read.bits == bits
    np.testing.assert_array_equal(read.dequantize(), stream.dequantize())
    np.testing.assert_array_equal(read.crow_indices, stream.crow_indices)
    (header,) = checkpoint.stream_headers(MODULE)
    assert (header.rows, header.columns, header.group_size, header.bits, header.nnz) == (6, 64, 16, bits, stream.nnz)
    assert checkpoint.is_compressed(MODULE)
    assert not checkpoint.is_compressed("model.norm")
    assert checkpoint.quantization.bits == 4


def test_several_streams_and_shards_come_back(tmp_path):
    rng = np.random.default_rng(1)
    streams = [random_stream(rng, bits=2), random_stream(rng, bits=8)]
    folder = write(tmp_path / "m", tensors_of(*streams), shard_bytes=200)
    assert (folder / "model.safetensors.index.json").exists()
    checkpoint = Checkpoint.open(folder)
    assert [stream.bits for stream in checkpoint.streams(MODULE)] == [2, 8]
    for read, stream in zip(checkpoint.streams(MODULE), streams, strict=True):
        np.testing.assert_array_equal(read.dequantize(), stream.dequantize())
    for read in (checkpoint.matrix, checkpoint.matrix_header):
        with pytest.raises(ModelError, match="up_proj is the sum of 2 streams, and one is expected"):
            read(MODULE)


def test_uncompressed_folder_with_bfloat16(tmp_path):
    weight = torch.randn(3, 5).to(torch.bfloat16)
    save_torch({"a.weight": weight, "b": torch.ones(2, dtype=torch.float16)}, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.quantization is None
    assert checkpoint.names() == ["a.weight", "b"]
    assert checkpoint.shape("a.weight") == (3, 5)
    np.testing.assert_array_equal(checkpoint.read("a.weight"), weight.float().numpy())
    assert checkpoint.read("a.weight").dtype == np.float32
    assert checkpoint.read("b").dtype == np.float16


def test_tokenizer_and_chat_template(tmp_path):
    folder = write(tmp_path / "m", tensors_of(random_stream(np.random.default_rng(0))))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(ModelError, match="no tokenizer.json"):
        checkpoint.tokenizer_json()
    assert checkpoint.chat_template() is None
    assert checkpoint.generation_config == {}
    (folder / "tokenizer.json").write_text('{"é": 1}', encoding="utf-8")
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert checkpoint.tokenizer_json() == '{"é": 1}'
    assert checkpoint.chat_template() == "y"
    (folder / "chat_template.jinja").write_text("{{ z }}")
    assert checkpoint.chat_template() == "{{ z }}"


def damage(name, how):
    return change(f"{MODULE}.streams.0.{name}", how)


DAMAGES = {
    "crow does not start at 0": (damage("crow_indices", put(0, 1)), "crow_indices is not a list of row starts"),
    "crow falls": (damage("crow_indices", put(2, -1)), "crow_indices is not a list of row starts"),
    "crow rises too fast": (damage("crow_indices", put(slice(1, 6), 100)), "crow_indices is not a list of row starts"),
    "crow ends elsewhere": (damage("crow_indices", lambda a: np.append(a[:-1], a[-2])), "ends at"),
    "crow has too few rows": (damage("crow_indices", lambda a: a[:-1]), "expected rows \\+ 1 = 7"),
    "crow of another type": (damage("crow_indices", lambda a: a.astype(np.int64)), "of type I64, expected I32"),
    "column too large": (damage("col_indices", put(0, 4)), "col_indices leaves the range 0 to 3"),
    "column negative": (damage("col_indices", put(0, -1)), "col_indices leaves the range"),
    "columns not ascending": (damage("col_indices", lambda a: a[::-1].copy()), "not ascending within row"),
    "column twice": (damage("col_indices", lambda a: np.zeros_like(a)), "not ascending within row"),
    "columns of another rank": (damage("col_indices", lambda a: a[None]), "shape"),
    "width of no bit count": (damage("values", lambda a: a[:, :5].copy()), "values has shape"),
    "too few values": (damage("values", lambda a: a[:-1]), "values has"),
    "too few scales": (damage("scales", lambda a: a[:-1]), "scales has"),
    "scale is NaN": (damage("scales", put(0, np.nan)), "scales holds a NaN"),
    "scale is infinite": (damage("scales", put(0, np.inf)), "scales holds a NaN or an infinity"),
    "scales of another type": (damage("scales", lambda a: a.astype(np.float32)), "of type F32, expected F16"),
    "zero too large": (damage("zeros", put(0, 16)), "zeros reaches 16, expected at most 15"),
    "a tensor is missing": (lambda t: t.pop(f"{MODULE}.streams.0.zeros"), "streams.0.zeros is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_streams_are_refused_by_name(tmp_path, name):
    apply, message = DAMAGES[name]
    tensors = tensors_of(random_stream(np.random.default_rng(3), rows=6, empty_rows=()))
    apply(tensors)
    with pytest.raises(FormatError, match=message) as caught:
        Checkpoint.open(write(tmp_path / "m", tensors)).streams(MODULE)
    assert MODULE in str(caught.value)


def test_eight_bit_groups_must_be_symmetric(tmp_path):
    tensors = tensors_of(random_stream(np.random.default_rng(0), bits=8))
    damage("zeros", put(0, 127))(tensors)
    with pytest.raises(FormatError, match="zeros is not 128"):
        Checkpoint.open(write(tmp_path / "m", tensors)).streams(MODULE)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quant_method": "fp8"}, "stored as 'fp8'"),
        ({"format_version": 0}, "format version 0"),
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 24}, "group_size is 24"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"skip": "lm_head"}, "skip is 'lm_head'"),
        ({"details": []}, "details is list"),
        ({"shapes": None}, "shapes is NoneType"),
        ({"shapes": {MODULE: [6]}}, "the shape of model.layers.0.mlp.up_proj"),
        ({"shapes": {MODULE: [6, 60]}}, "multiple of the group size"),
        ({"shapes": {}}, "gives no shape for the compressed linear"),
        ({"shapes": {MODULE: [6, 64], "other": [6, 64]}}, "tensors of the compressed linear other are missing"),
    ],
)
def test_bad_config_is_refused(tmp_path, changes, message):
    folder = write(tmp_path / "m", tensors_of(random_stream(np.random.default_rng(0))), **changes)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(folder)


def test_gap_between_streams_is_refused(tmp_path):
    tensors = tensors_of(random_stream(np.random.default_rng(0)))
    tensors = {name.replace(".streams.0.", ".streams.1."): array for name, array in tensors.items()}
    with pytest.raises(FormatError, match="streams are \\[1\\], expected 0, 1"):
        Checkpoint.open(write(tmp_path / "m", tensors))


def test_missing_things_are_named(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(ModelError, match="no config.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no weights"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    with pytest.raises(FormatError, match="damaged or cut off"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(FormatError, match="shard '../../etc/passwd'"):
        Checkpoint.open(tmp_path)


def test_unknown_names_are_refused(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors_of(random_stream(np.random.default_rng(0)))))
    with pytest.raises(ModelError, match="no tensor nothing"):
        checkpoint.read("nothing")
    with pytest.raises(ModelError, match="not a compressed linear"):
        checkpoint.streams("model.norm")


def test_dense_tensors_are_stored_in_half_and_vectors_in_full():
    assert dense_tensor("w", np.ones((2, 2), np.float64)).dtype == np.float16
    assert dense_tensor("b", np.ones(2, np.float16)).dtype == np.float32
    with pytest.raises(ModelError, match="tensor w reaches 7e\\+04"):
        dense_tensor("w", np.full((2, 2), 7e4, np.float32))
    with pytest.raises(ModelError, match="tensor w holds a NaN"):
        dense_tensor("w", np.full((2, 2), np.nan, np.float32))


def test_shards_of_the_same_tensors_are_the_same_bytes(tmp_path):
    stream = random_stream(np.random.default_rng(0))
    first = write(tmp_path / "a", tensors_of(stream), shard_bytes=100)
    second = write(tmp_path / "b", tensors_of(stream), shard_bytes=100)
    names = sorted(file.name for file in first.iterdir())
    assert len(names) > 3
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    with pytest.raises(ValueError, match="written twice"):
        writer = ShardWriter(tmp_path)
        writer.add({"a": np.ones(2)})
        writer.add({"a": np.ones(2)})
