"""`gqsac compress` as a whole, on tiny random models."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gqsac.checkpoint import Checkpoint
from gqsac.compress import blockwise, run
from gqsac.compress.run import compress
from gqsac.errors import InputError, ModelError, UnsupportedError
from tests.unit.compress_models import CONFIGS, TEXT, folder_bytes, save_model

SMALL = {"bits": 4, "samples": 4, "seq_len": 32, "progress": False}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.mark.parametrize("name", CONFIGS)
def test_every_block_linear_is_compressed_and_the_rest_kept(tmp_path, name):
    source = save_model(tmp_path / "source", name)
    report = compress(source, tmp_path / "out", sparsity=0.25, **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linears.pop("lm_head")
    assert checkpoint.modules() == sorted(linears)
    kept = total = 0
    for path, module in linears.items():
        (stream,) = checkpoint.streams(path)
        assert (stream.rows, stream.columns) == tuple(module.weight.shape)
        counts = np.diff(stream.crow_indices)
        assert counts.max() - counts.min() <= 1
        n_groups = stream.columns // 16
        assert stream.nnz == stream.rows * n_groups - round(0.25 * stream.rows * n_groups)
        kept, total = kept + stream.nnz, total + stream.rows * n_groups
    assert (report["kept_groups"], report["groups"]) == (kept, total)
    compressed = {f"{path}.weight" for path in linears}
    for tensor, value in model.named_parameters():  # a tied head is stored once
        if tensor not in compressed:
            np.testing.assert_allclose(checkpoint.read(tensor), value.detach().numpy(), rtol=1e-3, atol=1e-6)
    assert checkpoint.config["model_type"] == CONFIGS[name]["model_type"]
    assert checkpoint.tokenizer_json() == (source / "tokenizer.json").read_text()
    assert checkpoint.chat_template() == "{{ messages[0].content }}"
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("bits, worst", [(8, 0.012), (4, 0.12), (3, 0.25), (2, 0.6)])
def test_dense_weights_come_back_as_well_as_the_bits_allow(tmp_path, llama, bits, worst):
    compress(llama, tmp_path / "out", sparsity=0.0, **{**SMALL, "bits": bits})
    checkpoint = Checkpoint.open(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(llama)
    for path in checkpoint.modules():
        weight = model.get_submodule(path).weight.detach().numpy()
        (stream,) = checkpoint.streams(path)
        assert stream.bits == bits
        error = np.linalg.norm(stream.dequantize() - weight) / np.linalg.norm(weight)
        assert worst / 20 < error < worst


def test_a_stopped_run_goes_on_and_makes_the_same_bytes(tmp_path, llama, monkeypatch):
    reference = compress(llama, tmp_path / "whole", **SMALL)
    assert reference["resumed_blocks"] == 0
    calls = []
    real = blockwise.collect_hessians

    def stop_at_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(blockwise, "collect_hessians", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        compress(llama, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="another sparsity: 0.02 there, 0.5 now"):
        compress(llama, tmp_path / "out", sparsity=0.5, **SMALL)
    other = save_model(tmp_path / "other", "qwen2")
    with pytest.raises(InputError, match="another model"):
        compress(other, tmp_path / "out", **SMALL)
    report = compress(llama, tmp_path / "out", **SMALL)
    assert report["resumed_blocks"] == 1
    assert len(calls) == 3
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_damaged_block_file_is_made_again(tmp_path, llama, monkeypatch):
    compress(llama, tmp_path / "whole", **SMALL)
    with monkeypatch.context() as patch:

        def stop(self):
            raise KeyboardInterrupt

        patch.setattr(run.PartialFolder, "new_model_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(llama, tmp_path / "out", **SMALL)
    block = tmp_path / "out.partial" / "block-00001.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    assert compress(llama, tmp_path / "out", **SMALL)["resumed_blocks"] == 1
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_skipped_linears_stay_dense(tmp_path, llama):
    compress(llama, tmp_path / "out", skip=("down_proj", "model.layers.0.*"), **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert {path.split(".")[2] for path in checkpoint.modules()} == {"1"}
    assert not any("down_proj" in path for path in checkpoint.modules())
    assert checkpoint.shape("model.layers.1.mlp.down_proj.weight") == (64, 96)
    with pytest.raises(InputError, match="'nothing' to skip matches no linear"):
        compress(llama, tmp_path / "other", skip=("nothing",), **SMALL)
    with pytest.raises(InputError, match="no linear left"):
        compress(llama, tmp_path / "other", skip=("*",), **SMALL)


def test_allocation_by_layer_lets_rows_differ(tmp_path, llama):
    compress(llama, tmp_path / "out", sparsity=0.5, allocation="layer", **SMALL)
    (stream,) = Checkpoint.open(tmp_path / "out").streams("model.layers.0.mlp.up_proj")
    assert stream.nnz == 96 * 4 // 2
    assert len(set(np.diff(stream.crow_indices))) > 2


def test_options_out_of_range_are_refused(tmp_path, llama, text):
    for options, message in [
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 12}, "group size is 12"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"samples": 0}, "samples is 0"),
        ({"allocation": "column"}, "allocation is 'column'"),
        ({"damping": 0}, "damping is 0"),
        ({"seed": -1}, "the seed is -1, expected 0 or more"),
        ({"seed": 2**64}, "the seed is"),
        ({"seq_len": 65}, "context of 64"),
        ({"group_size": 64}, "down_proj has 96 input columns.*group size of 8 or 16 or 32"),
        ({"calibration": text, "samples": 4000}, "4000 samples of 32 tokens = 128000 tokens, but .*text.txt gives"),
        ({"calibration": tmp_path / "none.txt"}, "none.txt does not exist"),
    ]:
        with pytest.raises(InputError, match=message):
            compress(llama, tmp_path / "out", **{**SMALL, **options})
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 100)
    with pytest.raises(InputError, match="latin.txt is not UTF-8 text"):
        compress(llama, tmp_path / "out", calibration=tmp_path / "latin.txt", **SMALL)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        compress(llama, tmp_path / "out", **SMALL)


def test_bad_sources_are_named(tmp_path, llama):
    def refused(kind, message, source):
        with pytest.raises(kind, match=message):
            compress(source, tmp_path / "out", **SMALL)
        assert not (tmp_path / "out").exists()

    def edited(name, **changes):
        folder = shutil.copytree(llama, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    refused(ModelError, "does not exist", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(ModelError, "empty folder", tmp_path / "empty")
    (tmp_path / "broken.gguf").write_bytes(b"GGML0000")
    refused(ModelError, "not a GGUF file", tmp_path / "broken.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    refused(ModelError, "could not load", tmp_path / "cut.gguf")
    refused(ModelError, "nothere.gguf does not exist", tmp_path / "nothere.gguf")
    refused(UnsupportedError, "model_type 'martian'", edited("martian", model_type="martian"))
    gptq = {"quant_method": "gptq", "bits": 4}
    message = r"quant_method 'gptq'\); .* or give it to `gqsac build` as it is"
    refused(UnsupportedError, message, edited("gptq", quantization_config=gptq))
    weightless = edited("weightless")
    (weightless / "model.safetensors").unlink()
    refused(ModelError, "no weights", weightless)
    damaged = edited("damaged")
    (damaged / "model.safetensors").write_bytes(b"\0" * 100)
    refused(ModelError, "could not load the model", damaged)
    refused(ModelError, "weights lack model.layers.2", edited("longer", num_hidden_layers=3))


def test_a_nan_is_named(tmp_path, llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "source")
    shutil.copy(llama / "tokenizer.json", tmp_path / "source")
    with pytest.raises(ModelError, match="tensor model.layers.1.mlp.up_proj.weight holds a NaN"):
        compress(tmp_path / "source", tmp_path / "out", **SMALL)


def test_a_weight_beyond_fp16_is_named(tmp_path, llama):
    folder = _with_weights(llama, tmp_path / "large", "model.layers.0.mlp.up_proj.weight", lambda weight: weight + 3e6)
    with pytest.raises(ModelError, match="largest weight of model.layers.0.mlp.up_proj.weight is 3e"):
        compress(folder, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_shape_are_named(tmp_path, llama):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = _with_weights(llama, tmp_path / "other", name, lambda weight: weight[:8].clone())
    with pytest.raises(ModelError, match=rf"tensor {name} has shape \[8, \d+\], config.json needs"):
        compress(folder, tmp_path / "out", **SMALL)


def _with_weights(source, folder, name, change):
    """A copy of a model folder with one tensor changed."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_compressed_model_is_not_compressed_again(tmp_path, llama):
    compress(llama, tmp_path / "out", **SMALL)
    with pytest.raises(InputError, match="already compressed"):
        compress(tmp_path / "out", tmp_path / "again", **SMALL)


def test_sharded_bfloat16_source(tmp_path):
    source = save_model(tmp_path / "source", "qwen2", dtype=torch.bfloat16, max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    compress(source, tmp_path / "out", **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "out")
    embedding = Checkpoint.open(source).read("model.embed_tokens.weight")
    np.testing.assert_allclose(checkpoint.read("model.embed_tokens.weight"), embedding, atol=1e-6)
