"""Tiny random checkpoints of the architectures that the end-to-end tests compile."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gqsac.bsr import BsrStream, pack_values
from tests.unit import version_1
from tests.unit.compress_models import byte_tokenizer

VOCABULARY = 256  # one token a byte
CONTEXT = 320
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"

_BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": 255,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": {"model_type": "llama", **_BASE, "tie_word_embeddings": True, "rope_scaling": _LLAMA3_ROPE},
    "qwen2": {"model_type": "qwen2", **_BASE, "tie_word_embeddings": False},
    "opt": {
        "model_type": "opt",
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "word_embed_proj_dim": 64,
        "bos_token_id": None,
        "eos_token_id": 255,
        "pad_token_id": None,
    },
}


def save_checkpoint(folder: Path, name: str, seed: int = 1, **changes) -> Path:
    """Saves a model whose every parameter is random, norms and biases too, with a byte tokenizer."""
    fields = {**CONFIGS[name], **changes}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in sorted(model.named_parameters()):
        # Large enough that the best token stands out from the second best, whatever the rounding.
        spread = 0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5
        parameter.data = spread * torch.randn(parameter.shape, generator=generator)
        if "norm" in path and path.endswith("weight"):
            parameter.data += 1.0
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return folder


def save_multi_stream(folder: Path, source: Path, group_size: int = 16) -> Path:
    """A compressed checkpoint of format version 1, made by hand: every second linear of a block is a 4-bit and an
    8-bit stream of different groups, and some rows have no group in one of them or in both."""
    random = np.random.default_rng(3)
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    shapes, stored = {}, {}
    for name, array in sorted(tensors.items()):
        if ".layers." not in name or array.ndim != 2:
            stored[name] = array.astype(np.float16 if array.ndim == 2 else np.float32)
            continue
        module = name.removesuffix(".weight")
        shapes[module] = array.shape
        # Siblings that share an input alternate too, so that stacking meets unequal layouts.
        bits = (4, 8) if len(shapes) % 2 else (4,)
        part = random.integers(0, len(bits) + 1, (array.shape[0], array.shape[1] // group_size))
        part[::7] = len(bits)
        streams = tuple(_stream(array, part == number, width, group_size) for number, width in enumerate(bits))
        stored.update(version_1.stream_tensors(module, streams))
    quantization = version_1.config(group_size, shapes)
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    return folder


def _stream(weight: np.ndarray, keep: np.ndarray, bits: int, group_size: int) -> BsrStream:
    """The kept groups of a weight [rows, columns], keep bool [rows, groups], rounded about the middle level."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, group_size)[keep]
    zero = 1 << (bits - 1)
    scales = (np.abs(groups).max(axis=1) / (zero - 1)).astype(np.float16)
    levels = np.clip(np.rint(groups / scales[:, None].astype(np.float32)) + zero, 0, 2 * zero - 1)
    return BsrStream(
        rows=rows,
        columns=columns,
        group_size=group_size,
        bits=bits,
        crow_indices=np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int32),
        col_indices=np.nonzero(keep)[1].astype(np.int32),
        values=pack_values(levels.astype(np.uint8), bits),
        scales=scales,
        zeros=np.full(len(groups), zero, np.uint8),
    )
