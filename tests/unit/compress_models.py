"""Tiny random models with tokenizers, saved as Hugging Face folders, for the tests of compression."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

_BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": {"model_type": "llama", **_BASE, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **_BASE, "tie_word_embeddings": False},
    "gemma3": {
        "model_type": "gemma3_text",
        **_BASE,
        "head_dim": 16,
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}
TEXT = "The quick brown fox jumps over the lazy dog; then it sleeps, dreams and wakes up hungry. " * 40


def save_model(folder, name="llama", dtype=torch.float32, **options):
    """Saves a random model with a byte tokenizer and returns the folder."""
    raw = {key: value for key, value in CONFIGS[name].items() if key != "model_type"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(CONFIGS[name]["model_type"], **raw)).to(dtype)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # zero otherwise, which would hide a lost bias
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder, **options)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    return folder


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def folder_bytes(folder) -> dict[str, bytes]:
    """Every file of a checkpoint but the report, which holds times."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.startswith("report.")}


def random_stream(rng, rows=6, n_groups=4, group_size=16, bits=4, empty_rows=()):
    """A BsrStream with about half of the groups kept."""
    from gqsac.bsr import BsrStream, pack_values

    keep = rng.random((rows, n_groups)) < 0.5
    keep[list(empty_rows)] = False
    nnz = int(keep.sum())
    zeros = np.full(nnz, 128) if bits == 8 else rng.integers(0, 1 << bits, nnz)
    return BsrStream(
        rows=rows,
        columns=n_groups * group_size,
        group_size=group_size,
        bits=bits,
        crow_indices=np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32),
        col_indices=np.nonzero(keep)[1].astype(np.int32),
        values=pack_values(rng.integers(0, 1 << bits, (nnz, group_size)).astype(np.uint8), bits),
        scales=rng.uniform(0.01, 0.1, nnz).astype(np.float16),
        zeros=zeros.astype(np.uint8),
    )
