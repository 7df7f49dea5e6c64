"""GGUF files as the model to compress: k-quants are dequantised, and the user is told that they are rounded again."""

import json

import gguf
import numpy as np
import pytest

from gqsac.compress.run import compress
from gqsac.source import load_source
from tests.unit.compress_models import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 256  # of everything: a block of a k-quant


def k_quant(kind: gguf.GGMLQuantizationType, rows: int) -> np.ndarray:
    """Random blocks of Q4_K or Q6_K, uint8 [rows, bytes], whose scales are small."""
    _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (rows, n_bytes), np.uint8)
    small = np.full((rows, 1), 1e-4, np.float16).view(np.uint8)
    if kind == gguf.GGMLQuantizationType.Q4_K:
        blocks[:, 0:2] = blocks[:, 2:4] = small
    else:
        blocks[:, -2:] = small
    return blocks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(file, name -> array as stored) of a llama of one layer, its matrices in Q4_K, one of them in Q6_K."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {"context_length": 64, "embedding_length": SIZE, "block_count": 1, "feed_forward_length": SIZE,
                        "head_count": 4, "head_count_kv": 4, "vocab_size": SIZE}.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary = json.loads(byte_tokenizer().to_str())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.get)[:-1], "th"])
    writer.add_token_types([gguf.TokenType.NORMAL] * SIZE)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    stored = {}
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        kind = gguf.GGMLQuantizationType.Q6_K if part == "ffn_down" else gguf.GGMLQuantizationType.Q4_K
        stored[part] = k_quant(kind, SIZE), kind
        writer.add_tensor(f"blk.0.{part}.weight", stored[part][0], raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(SIZE, np.float32))
    embeddings = np.random.default_rng(1).normal(0, 0.1, (SIZE, SIZE)).astype(np.float16)
    writer.add_tensor("token_embd.weight", embeddings)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, stored


def test_k_quants_are_dequantised(model):
    path, stored = model
    source = load_source(path)
    for ours, theirs in (("up_proj", "ffn_up"), ("down_proj", "ffn_down")):
        weight = source.model.get_submodule(f"model.layers.0.mlp.{ours}").weight.detach().numpy()
        np.testing.assert_array_equal(weight, gguf.dequantize(*stored[theirs]).astype(np.float16))
    assert source.rounded == {"Q4_K": 6 / 8, "Q6_K": 1 / 8}


def test_a_second_rounding_is_told(model, tmp_path, capfd):
    report = compress(model[0], tmp_path / "out", samples=2, seq_len=16)
    assert (
        "warning: the weights of the source were rounded before (75% Q4_K, 12% Q6_K) and are rounded a second time"
    ) in capfd.readouterr().err
    assert report["rounded_before"] == {"Q4_K": 6 / 8, "Q6_K": 1 / 8}
