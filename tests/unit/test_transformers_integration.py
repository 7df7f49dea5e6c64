"""Compressed checkpoints in transformers: plain dequantised linears, no key left over or missing."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import gqsac  # noqa: F401  registers the quantisation method
from gqsac.checkpoint import Checkpoint
from gqsac.compress.run import compress
from gqsac.compress.write import ShardWriter, write_json
from tests.unit import version_1
from tests.unit.compress_models import CONFIGS, random_stream, save_model


@pytest.mark.parametrize("name", CONFIGS)
def test_from_pretrained_gives_the_dequantised_model(tmp_path, name):
    source = save_model(tmp_path / "source", name)
    compress(source, tmp_path / "out", sparsity=0.25, samples=2, seq_len=32, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, output_loading_info=True
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind]
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert len(checkpoint.modules()) >= 12
    for path in checkpoint.modules():
        linear = model.get_submodule(path)
        assert type(linear) is torch.nn.Linear
        (stream,) = checkpoint.streams(path)
        np.testing.assert_array_equal(linear.weight.detach().numpy(), stream.dequantize())
        reference.get_submodule(path).weight.data = linear.weight.data
    tied = CONFIGS[name].get("tie_word_embeddings", True)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, rtol=1e-2, atol=1e-2)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")  # an ordinary model again
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_bfloat16_weights_are_rounded_once(tmp_path):
    compress(save_model(tmp_path / "source"), tmp_path / "out", bits=4, samples=2, seq_len=32, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    (stream,) = Checkpoint.open(tmp_path / "out").streams("model.layers.1.self_attn.o_proj")
    weight = model.model.layers[1].self_attn.o_proj.weight
    assert torch.equal(weight, torch.from_numpy(stream.dequantize()).to(torch.bfloat16))


def test_streams_of_several_widths_are_summed(tmp_path):
    compress(save_model(tmp_path / "source"), tmp_path / "out", bits=4, samples=2, seq_len=32, progress=False)
    checkpoint = Checkpoint.open(tmp_path / "out")
    path, rng = "model.layers.0.self_attn.q_proj", np.random.default_rng(0)
    streams = [random_stream(rng, rows=64, bits=2), random_stream(rng, rows=64, bits=8)]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    writer = ShardWriter(mixed, shard_bytes=20_000)  # several shards
    writer.add({name: checkpoint.read(name) for name in checkpoint.names() if ".layers." not in name or "norm" in name})
    writer.add(version_1.stream_tensors(path, streams))
    for other in set(checkpoint.modules()) - {path}:
        writer.add(version_1.stream_tensors(other, checkpoint.streams(other)))
    writer.finish()
    quantization = version_1.config(16, checkpoint.quantization.shapes)
    write_json(mixed / "config.json", {**checkpoint.config, "quantization_config": quantization})
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32)
    expected = sum(stream.dequantize() for stream in streams)
    np.testing.assert_array_equal(model.get_submodule(path).weight.detach().numpy(), expected)


def test_importing_gqsac_is_cheap_and_registers_whatever_the_order():
    script = """
import sys
{first}
import gqsac
if {cheap}: assert not any(name in sys.modules for name in ("torch", "transformers")), "gqsac imported them"
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "gqsa" in AUTO_QUANTIZER_MAPPING
import transformers.modeling_utils
"""
    for first, cheap in (("", True), ("import transformers.quantizers.auto", False)):
        code = script.format(first=first, cheap=cheap)
        path = f"import sys; sys.path[:0] = {[entry for entry in sys.path if entry]!r}\n"
        result = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
