"""Checkpoints of GPTQ and AWQ: packed bit by bit, there and back, imported without loss, and one refusal per rule."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from gqsac.checkpoint import Checkpoint
from gqsac.cli import cli
from gqsac.codec import MatrixHeader
from gqsac.compiler.pipeline import BuildOptions, build
from gqsac.errors import FormatError, GqsaError, InputError, UnsupportedError
from gqsac.import_checkpoint import import_checkpoint
from tests.unit.compress_models import save_model

MODULE = "model.layers.0.mlp.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}
GPTQ_V2 = GPTQ | {"checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def words(numbers: np.ndarray, bits: int, order=None) -> np.ndarray:
    """int32 [n, m * bits / 32] of numbers [n, m], bit by bit. order: which of a word's numbers stands where."""
    per_word = 32 // bits
    packed = np.zeros((len(numbers), numbers.shape[1] // per_word), np.uint64)
    for row in range(len(numbers)):
        for word in range(packed.shape[1]):
            for place in range(per_word):
                number = int(numbers[row, word * per_word + (order[place] if order else place)])
                packed[row, word] |= np.uint64(number << (place * bits))
    return packed.astype(np.uint32).view(np.int32)


def packed(levels, zeros, scales, quantization, bits=4):
    """Tensors of levels [out, in], zeros and scales [out, groups]."""
    if quantization["quant_method"] == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        tensors = {"qweight": words(levels.T, 4, order), "qzeros": words(zeros.T, 4, order)}
    else:
        less = 1 if quantization["checkpoint_format"] == "gptq" else 0
        stored = (zeros.T.astype(np.int64) - less) % 2**bits
        tensors = {
            "qweight": np.ascontiguousarray(words(levels, bits).T),
            "qzeros": words(stored, bits),
            "g_idx": (np.arange(levels.shape[1]) // (levels.shape[1] // zeros.shape[1])).astype(np.int32),
        }
    return tensors | {"scales": np.ascontiguousarray(scales.T)}


def linear(rows=16, columns=96, group_size=32, bits=4, seed=0):
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 2**bits, (rows, columns))
    zeros = rng.integers(0, 16, (rows, columns // group_size)) * max(1, 2**bits // 16) % 2**bits
    return levels, zeros, rng.uniform(0.001, 0.1, zeros.shape).astype(np.float16)


def weights(levels, zeros, scales):
    groups = levels.reshape(*scales.shape, -1).astype(np.float32) - zeros[..., None]
    return (groups * scales[..., None].astype(np.float32)).reshape(levels.shape)


def opened(folder, tensors, quantization):
    folder.mkdir()
    save_file({f"{MODULE}.{name}": array for name, array in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("group_size", [32, 96])
@pytest.mark.parametrize(
    ("quantization", "bits"), [(GPTQ, 4), (GPTQ_V2, 4), (AWQ, 4), (GPTQ, 8), (GPTQ, 2), (GPTQ_V2, 2)]
)
def test_weights_are_those_that_were_packed(tmp_path, quantization, bits, group_size):
    levels, zeros, scales = linear(bits=bits, group_size=group_size)
    checkpoint = opened(tmp_path / "m", packed(levels, zeros, scales, quantization, bits), quantization)
    assert checkpoint.compressed and checkpoint.modules() == [MODULE]
    assert checkpoint.matrix_header(MODULE) == MatrixHeader(16, 96, 32, group_size, (bits,), 48)
    np.testing.assert_array_equal(checkpoint.matrix(MODULE).dequantize(), weights(levels, zeros, scales))
    row_bits, keep = checkpoint.pattern(MODULE)
    assert (row_bits == bits).all() and len(row_bits) == 16 and keep is None


def test_words_of_awq_by_hand(tmp_path):
    """Eight outputs of levels 0 to 7 and zeros 0 in one group: from the low bits up 0, 2, 4, 6, 1, 3, 5, 7."""
    tensors = {
        "qweight": np.array([[0x75316420]] * 8, np.uint32).view(np.int32),
        "qzeros": np.array([[0]], np.int32),
        "scales": np.ones((1, 8), np.float16),
    }
    weight = opened(tmp_path / "m", tensors, AWQ).matrix(MODULE).dequantize()
    np.testing.assert_array_equal(weight, np.repeat(np.arange(8)[:, None], 8, 1))


def test_words_of_gptq_by_hand(tmp_path):
    """Eight inputs of levels 0 to 7 in each of eight outputs; zeros of 8 are stored as 7."""
    tensors = {
        "qweight": np.array([[0x76543210] * 8], np.uint32).view(np.int32),
        "qzeros": np.array([[0x77777777]], np.int32),
        "scales": np.ones((1, 8), np.float16),
    }
    weight = opened(tmp_path / "m", tensors, GPTQ).matrix(MODULE).dequantize()
    np.testing.assert_array_equal(weight, np.repeat(np.arange(-8, 0)[None], 8, 0))


def quantised_model(folder, quantization):
    """A tiny model, all of whose linears are rounded and packed, and their weights by module."""
    source = save_model(folder.with_name("source"), "qwen2")
    tensors, expected = {}, {}
    for number, (name, array) in enumerate(load_file(source / "model.safetensors").items()):
        if not name.endswith("_proj.weight"):
            tensors[name] = array
            continue
        module = name.removesuffix(".weight")
        levels, zeros, scales = linear(*array.shape, seed=number)
        expected[module] = weights(levels, zeros, scales)
        parts = packed(levels, zeros, scales, quantization)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return expected


@pytest.mark.parametrize("quantization", [GPTQ, AWQ])
def test_a_model_is_imported_without_loss(tmp_path, quantization):
    expected = quantised_model(tmp_path / "m", quantization)
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "m"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "14 linears of 4 bits written to" in result.stderr
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.modules() == sorted(expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for module, weight in expected.items():
        np.testing.assert_array_equal(checkpoint.matrix(module).dequantize(), weight)
        np.testing.assert_array_equal(model.get_submodule(module).weight.detach().numpy(), weight)
    source = load_file(tmp_path / "source/model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.bias"):
        np.testing.assert_array_equal(checkpoint.read(name), source[name].astype(checkpoint.read(name).dtype))
    assert checkpoint.quantization.details == {"name": "m", "imported_from": quantization["quant_method"]}
    options = BuildOptions(dry_run=True, targets=("x86_64_v3",))
    direct, imported = (build(tmp_path / folder, None, options) for folder in ("m", "out"))
    assert direct.counts == imported.counts
    with pytest.raises(InputError, match="out exists already"):
        import_checkpoint(Checkpoint.open(tmp_path / "m"), tmp_path / "out")
    with pytest.raises(InputError, match="out is a gqsa checkpoint already; checkpoints of GPTQ, AWQ and"):
        import_checkpoint(checkpoint, tmp_path / "other")
    with pytest.raises(InputError, match="source is not compressed; .*others are made by `gqsac compress`"):
        import_checkpoint(Checkpoint.open(tmp_path / "source"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_act_order_is_refused_by_the_layers_name(tmp_path):
    tensors = packed(*linear(), GPTQ)
    tensors["g_idx"][[0, 50]] = tensors["g_idx"][[50, 0]]
    checkpoint = opened(tmp_path / "m", tensors, GPTQ | {"desc_act": True})
    for read in (checkpoint.matrix, checkpoint.pattern):
        with pytest.raises(UnsupportedError, match=rf"{MODULE}\.g_idx is not in order \(act-order, desc_act\)"):
            read(MODULE)
    with pytest.raises(UnsupportedError, match=MODULE):
        import_checkpoint(checkpoint, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_act_order_whose_groups_are_in_order_is_read(tmp_path):
    levels, zeros, scales = linear()
    checkpoint = opened(tmp_path / "m", packed(levels, zeros, scales, GPTQ), GPTQ | {"desc_act": True})
    np.testing.assert_array_equal(checkpoint.matrix(MODULE).dequantize(), weights(levels, zeros, scales))


def edited(**changes):
    """Tensors of a GPTQ linear with some replaced, or without those that are None."""
    tensors = packed(*linear(), GPTQ) | changes
    return {name: array for name, array in tensors.items() if array is not None}


def zeros_of_8_bits():
    levels, zeros, scales = linear(bits=8)
    zeros[3, 1] = 130
    return packed(levels, zeros, scales, GPTQ, 8)


@pytest.mark.parametrize(
    ("tensors", "quantization", "error", "message"),
    [
        (edited(qzeros=None), GPTQ, FormatError, "qzeros is missing"),
        (edited(scales=np.ones((3, 16), np.int32)), GPTQ, FormatError, "scales is of type I32, expected F16 or BF16"),
        (edited(g_idx=np.zeros(4, np.int32)), GPTQ, FormatError, r"g_idx has shape \[4\], expected \[96\]"),
        (edited(qweight=np.zeros(12, np.int32)), GPTQ, FormatError, "qweight has shape .*number of dimensions"),
        (edited(qweight=np.zeros((12, 8), np.int32)), GPTQ, FormatError, r"qweight has shape \[12, 8\], expected"),
        (edited(qzeros=np.zeros((2, 2), np.int32)), GPTQ, FormatError, r"qzeros has shape \[2, 2\], expected \[3, 2\]"),
        (edited(scales=np.full((3, 16), np.inf, np.float16)), GPTQ, FormatError, "scales holds a NaN, an infinity"),
        (
            edited(scales=np.ones((3, 32), np.float16), qzeros=np.zeros((3, 3), np.int32)),
            GPTQ, UnsupportedError, "qzeros has 3 bits a zero, and of gptq 2, 4, 8 are read",
        ),
        (
            edited(scales=np.ones((24, 16), np.float16), qzeros=np.zeros((24, 2), np.int32)),
            GPTQ, UnsupportedError, "scales has 24 groups of 96 columns, expected groups of a multiple of 8",
        ),
        (zeros_of_8_bits(), GPTQ, UnsupportedError, "qzeros has 8-bit zeros that are no multiples of 16 levels"),
        (edited(), GPTQ | {"checkpoint_format": "marlin"}, UnsupportedError, "stored as checkpoint_format 'marlin'"),
        (edited(), AWQ | {"version": "gemv"}, UnsupportedError, "awq is stored as version 'gemv'; gemm is read"),
        ({"weight": np.ones((4, 4), np.float16)}, GPTQ, FormatError, "says gptq, but no linear is stored so"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, tensors, quantization, error, message):
    with pytest.raises(GqsaError, match=message) as found:
        opened(tmp_path / "m", tensors, quantization).matrix(MODULE)
    assert found.type is error and str(tmp_path / "m") in str(found.value)
