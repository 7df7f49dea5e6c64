"""The benchmarks' random checkpoints have the shapes, counts and spread that were asked for."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.random_checkpoint import CONFIGS, random_checkpoint, random_matrix
from gqsac.checkpoint import Checkpoint
from gqsac.codec import MatrixHeader
from gqsac.errors import InputError
from gqsac.quantized_matrix import ROW_BITS
from tests.unit.compress_models import CONFIGS as TINY
from tests.unit.compress_models import folder_bytes


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("bits", [3, 8])
def test_it_loads_and_runs(tmp_path, name, bits):
    (tmp_path / "config.json").write_text(json.dumps(TINY[name]))
    options = {"bits": bits, "sparsity": 0.5, "skew": 0.5, "progress": False}
    random_checkpoint(str(tmp_path / "config.json"), tmp_path / "a", **options)
    checkpoint = Checkpoint.open(tmp_path / "a")
    for module in checkpoint.modules():
        (stream,) = checkpoint.streams(module)
        assert stream.bits == bits
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
    random_checkpoint(str(tmp_path / "config.json"), tmp_path / "b", **options)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


@pytest.mark.parametrize("skew", [0.0, 0.3, 1.0])
def test_skew_spreads_the_counts_and_keeps_the_total(skew):
    matrix = random_matrix(np.random.default_rng(0), 500, 1024, 4, 16, 16, 0.5, skew)
    counts = matrix.keep.sum(1)
    assert abs(matrix.n_groups - 500 * 64 // 2) <= 1
    spread = counts.std() / 32
    assert spread == 0 if skew == 0 else 0.6 * skew < spread < 1.4 * skew
    assert 0.5 < matrix.dequantize().std() * np.sqrt(512) * np.sqrt(2) < 2  # outputs as large as inputs


@pytest.mark.parametrize("bits", ROW_BITS)
def test_scales_may_be_shared_and_outputs_are_as_large_as_inputs(bits):
    matrix = random_matrix(np.random.default_rng(0), 200, 512, bits, 16, 64, 0.0)
    assert matrix.keep is None and matrix.scales.shape == matrix.zeros.shape == (200, 8)
    assert matrix.levels.max() == 2**bits - 1
    assert 0.8 < matrix.dequantize().std() * np.sqrt(512) < 1.3


def test_tiles_are_removed_whole():
    matrix = random_matrix(np.random.default_rng(0), 40, 512, 4, 16, 64, 0.5, tiles=True)
    tiles = matrix.keep[:32].reshape(2, 16, 8, 4)
    assert (tiles == tiles[:, :1, :, :1]).all()
    assert (matrix.keep[32:] == matrix.keep[32]).all()  # the rows that are left make smaller tiles
    assert matrix.n_groups * 2 == matrix.keep.size


def test_a_checkpoint_of_tiles_and_shared_scales(tmp_path):
    config = {**TINY["llama"], "hidden_size": 128, "intermediate_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"quant_group_size": 64, "tiles": True, "bits": 1, "progress": False}
    checkpoint = Checkpoint.open(random_checkpoint(str(tmp_path / "config.json"), tmp_path / "out", **options))
    header = checkpoint.matrix_header("model.layers.0.mlp.up_proj")
    assert header == MatrixHeader(256, 128, 16, 64, (1,), 256 * 8 // 2)
    assert checkpoint.matrix("model.layers.0.mlp.up_proj").n_groups == header.nnz


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY["llama"]))
    for options, message in [
        ({"group_size": 64}, "has 96 columns, which groups of 64 do not divide"),
        ({"quant_group_size": 64}, "has 96 columns, which groups of 64 do not divide"),
        ({"tiles": True}, "has 96 columns, which groups of 64 do not divide"),
        ({"tiles": True, "group_size": 128}, "holds no whole groups of 128"),
        ({"quant_group_size": 24}, "do not fit groups of 16"),
    ]:
        with pytest.raises(InputError, match=message):
            random_checkpoint(str(tmp_path / "config.json"), tmp_path / "out", **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_known_models_have_their_parameters(name):
    from benchmarks.random_checkpoint import _skeleton

    parameters = sum(p.numel() for p in _skeleton(CONFIGS[name]).parameters())
    billions = {"llama-7b": 6.74, "llama-2-7b": 6.74, "llama-3-8b": 8.03, "llama-3.2-1b": 1.24, "qwen2.5-7b": 7.62,
                "qwen2.5-0.5b": 0.494, "opt-6.7b": 6.66}  # fmt: skip
    assert parameters / 1e9 == pytest.approx(billions[name], rel=5e-3)


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="neither a config.json nor one of llama-7b"):
        random_checkpoint("llama-13b", tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        random_checkpoint("llama-7b", tmp_path)
    with pytest.raises(InputError, match="sparsity is 1.5"):
        random_checkpoint("llama-7b", tmp_path / "out", sparsity=1.5)
