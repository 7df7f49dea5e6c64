"""compressed-tensors' `pack-quantized`: by hand-made words, there and back, and one refusal per rule."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from gqsac.checkpoint import Checkpoint
from gqsac.codec import MatrixHeader
from gqsac.compress.run import compress
from gqsac.compressed_tensors import export, pack, read_schemes
from gqsac.errors import FormatError, GqsaError, InputError, ModelError, UnsupportedError
from tests.unit.compress_models import save_model
from tests.unit.random_matrices import random_matrix
from tests.unit.test_checkpoint import write_matrices

MODULE = "model.layers.0.mlp.up_proj"


def config(bits=4, group_size=32, symmetric=False, targets=("Linear",), **changes):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}
    group = {"targets": list(targets), "weights": {**weights, **changes}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


def open_packed(folder, tensors, quantization):
    folder.mkdir()
    save_file({f"{MODULE}.{name}": array for name, array in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return Checkpoint.open(folder)


def test_words_made_by_hand(tmp_path):
    tensors = {  # level 3 in column 0 and 15 in column 7, the rest 8; zeros 7 and 9
        "weight_packed": np.array([[0xF8888883, 0x88888888]] * 2, np.uint32).view(np.int32),
        "weight_scale": np.array([[0.5], [2.0]], np.float16),
        "weight_shape": np.array([2, 16]),
        "weight_zero_point": np.array([[0x97]], np.int32),
    }
    checkpoint = open_packed(tmp_path / "m", tensors, config(group_size=16))
    assert checkpoint.compressed and checkpoint.modules() == [MODULE]
    assert checkpoint.matrix_header(MODULE) == MatrixHeader(2, 16, 16, 16, (4,), 2)
    weight = checkpoint.matrix(MODULE).dequantize()
    np.testing.assert_array_equal(weight[:, [0, 7, 8]], [[-2, 4, 0.5], [-12, 12, -2]])
    (stream,) = checkpoint.streams(MODULE)
    np.testing.assert_array_equal(stream.dequantize(), weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 9])
def test_matrices_come_back(tmp_path, bits, symmetric, rows):
    matrix = random_matrix(rows, 192, 32, 32, (bits,), kept=1)
    if symmetric:
        matrix.zeros[:] = 8
    checkpoint = open_packed(tmp_path / "m", pack(matrix, symmetric), config(bits, symmetric=symmetric))
    np.testing.assert_array_equal(checkpoint.matrix(MODULE).dequantize(), matrix.dequantize())


def test_channels_and_bf16_scales(tmp_path):
    matrix = random_matrix(6, 192, 32, 192, kept=1)
    tensors = {name: torch.from_numpy(array) for name, array in pack(matrix, False).items()}
    tensors["weight_scale"] = tensors["weight_scale"].bfloat16()
    save_torch({f"{MODULE}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    quantization = config(strategy="channel", group_size=None)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.matrix_header(MODULE) == MatrixHeader(6, 192, 64, 192, (4,), 18)
    np.testing.assert_allclose(checkpoint.matrix(MODULE).dequantize(), matrix.dequantize(), rtol=2**-8)


def test_a_name_goes_before_the_class(tmp_path):
    quantization = config(8)
    quantization["config_groups"]["group_1"] = config(4, targets=["re:.*up_proj"])["config_groups"]["group_0"]
    matrix = random_matrix(6, 192, 32, 32, kept=1)
    assert open_packed(tmp_path / "m", pack(matrix, False), quantization).matrix_header(MODULE).widths == (4,)


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("weight_packed", lambda a: a.astype(np.int64), "of type I64, expected I32"),
        ("weight_packed", np.ravel, "weight_packed has shape"),
        ("weight_packed", lambda a: a[:, 1:], "weight_packed has 6 x 184 levels, expected groups of 32"),
        ("weight_packed", None, "weight_packed is missing"),
        ("weight_scale", lambda a: a[1:], "weight_scale has shape \\[5, 6\\], expected \\[6, 6\\]"),
        ("weight_scale", lambda a: a * np.float16(np.nan), "weight_scale holds a NaN"),
        ("weight_shape", lambda a: a + 1, "weight_shape is \\[7, 193\\], expected \\[6, 192\\]"),
        ("weight_zero_point", lambda a: a[:, 1:], "weight_zero_point has shape \\[1, 5\\], expected \\[1, 6\\]"),
        ("weight_zero_point", None, "weight_zero_point is missing"),
        ("weight_g_idx", lambda a: np.zeros(192, np.int32), "weight_g_idx is there"),
    ],
)
def test_damaged_tensors_are_refused_by_name(tmp_path, part, change, message):
    tensors = pack(random_matrix(6, 192, 32, 32, kept=1), False)
    if change is None:
        del tensors[part]
    else:
        tensors[part] = np.ascontiguousarray(change(tensors.get(part)))
    with pytest.raises(GqsaError, match=f"tensor {MODULE}.*{message}") as caught:
        open_packed(tmp_path / "m", tensors, config()).matrix(MODULE)
    assert isinstance(caught.value, FormatError) or part == "weight_g_idx"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_bits": 3}, "weights of 3 bits"),
        ({"type": "float"}, "type 'float'"),
        ({"actorder": "group"}, "actorder 'group'"),
        ({"strategy": "tensor"}, "scales by 'tensor'"),
        ({"group_size": 4}, "of 4 columns"),
    ],
)
def test_other_schemes_are_refused(changes, message):
    with pytest.raises(UnsupportedError, match=message):
        read_schemes(config() | config(**changes), "config.json")


def test_damaged_schemes_are_refused():
    with pytest.raises(FormatError, match="config_groups"):
        read_schemes({}, "config.json")
    with pytest.raises(FormatError, match="no weights or no list"):
        read_schemes({"format": "pack-quantized", "config_groups": {"a": {"targets": []}}}, "config.json")
    with pytest.raises(FormatError, match=re.escape("the target 're:(', which is no pattern")):
        read_schemes(config(targets=["re:("]), "config.json")
    with pytest.raises(UnsupportedError, match="it is stored as 'float-quantized'"):
        read_schemes(config() | {"format": "float-quantized"}, "config.json")


@pytest.mark.parametrize(
    "matrix, message",
    [
        (random_matrix(6, 192, 32, 32, (2,), kept=1), "up_proj cannot be stored as .* rows have 2 bits"),
        (random_matrix(6, 192, 32, 32, (4, 8), kept=1), "up_proj cannot be stored as .* rows have 4 and 8 bits"),
        (random_matrix(6, 192, 32, 32), "up_proj cannot be stored as .* groups of it are removed"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(tmp_path, matrix, message):
    checkpoint = Checkpoint.open(write_matrices(tmp_path / "m", {MODULE: matrix}))
    with pytest.raises(ModelError, match=message):
        export(checkpoint, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_linears_that_differ_are_refused_by_name(tmp_path):
    other = "model.layers.1.mlp.up_proj"
    matrices = {MODULE: random_matrix(6, 192, 32, 32, kept=1), other: random_matrix(6, 192, 32, 64, kept=1)}
    with pytest.raises(ModelError, match=f"{other} and {MODULE} differ"):
        export(Checkpoint.open(write_matrices(tmp_path / "m", matrices)), tmp_path / "out")


def test_a_compressed_model_is_exported_whole(tmp_path):
    compress(
        save_model(tmp_path / "source", "qwen2"), tmp_path / "m", sparsity=0, samples=2, seq_len=32, progress=False
    )
    source = Checkpoint.open(tmp_path / "m")
    checkpoint = Checkpoint.open(export(source, tmp_path / "out"))
    assert checkpoint.modules() == source.modules()
    for module in source.modules():
        np.testing.assert_array_equal(checkpoint.matrix(module).dequantize(), source.matrix(module).dequantize())
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "m", tmp_path / "out"))
    parts = {part for module in source.modules() for part in source.parts_of(module)}
    for name in set(first) - parts:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert checkpoint.tokenizer_json() == source.tokenizer_json()
    assert checkpoint.config["quantization_config"]["ignore"] == ["lm_head", "model.embed_tokens"]
    with pytest.raises(InputError, match="exists already"):
        export(source, tmp_path / "out")
    with pytest.raises(ModelError, match="is not compressed"):
        export(Checkpoint.open(tmp_path / "source"), tmp_path / "other")
