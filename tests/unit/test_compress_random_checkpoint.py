"""The benchmarks' random checkpoints have the shapes, counts and spread that were asked for."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.random_checkpoint import CONFIGS, random_checkpoint, random_stream
from gqsac.checkpoint import Checkpoint
from gqsac.errors import InputError
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
    stream = random_stream(np.random.default_rng(0), 500, 1024, 4, 16, 0.5, skew)
    counts = np.diff(stream.crow_indices)
    assert abs(stream.nnz - 500 * 64 // 2) <= 1
    spread = counts.std() / 32
    assert spread == 0 if skew == 0 else 0.6 * skew < spread < 1.4 * skew
    assert 0.5 < stream.dequantize().std() * np.sqrt(512) * np.sqrt(2) < 2  # outputs as large as inputs


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
