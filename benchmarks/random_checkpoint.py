"""Writes a compressed checkpoint with random weights of a known model's shapes, to measure speed with.

    python benchmarks/random_checkpoint.py llama-7b out/ --sparsity 0.5
    python benchmarks/random_checkpoint.py llama-7b out/ --sparsity 0.5 --quant-group-size 64 --tiles
    python benchmarks/random_checkpoint.py path/to/config.json out/ --bits 2 --group-size 64 --skew 0.5

The text it generates is noise; shapes, bytes and the spread of groups over rows are what matter. Weights are
made and written shard by shard, so a model of 7B parameters needs under 3 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import gqsac
from gqsac import codec
from gqsac.bsr import GROUP_SIZES, unpack_values
from gqsac.compress.blocks import find_blocks, linears_of
from gqsac.compress.write import ShardWriter, write_json
from gqsac.errors import GqsaError, InputError
from gqsac.quantization_config import QuantizationConfig
from gqsac.quantized_matrix import QUANT_GROUP_SIZES, ROW_BITS, ZERO_STEPS, QuantizedMatrix

TILE = (16, 64)  # rows, columns

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 32768, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
_LLAMA_3_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _sizes(hidden, intermediate, layers, heads, kv_heads, vocab, **more) -> dict:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, **more,
    }  # fmt: skip


CONFIGS = {
    "llama-7b": {**_LLAMA, **_sizes(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=2048, rms_norm_eps=1e-6)},
    "llama-2-7b": {**_LLAMA, **_sizes(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096)},
    "llama-3-8b": {
        **_LLAMA,
        **_sizes(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=8192, rope_theta=5e5),
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        **_sizes(2048, 8192, 16, 32, 8, 128256, max_position_embeddings=131072, rope_theta=5e5, head_dim=64),
        "rope_scaling": _LLAMA_3_ROPE,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "qwen2.5-7b": {**_QWEN, **_sizes(3584, 18944, 28, 28, 4, 152064), "tie_word_embeddings": False},
    "qwen2.5-0.5b": {**_QWEN, **_sizes(896, 4864, 24, 14, 2, 151936), "tie_word_embeddings": True},
    "opt-6.7b": {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50272, "max_position_embeddings": 2048,
        "word_embed_proj_dim": 4096, "activation_function": "relu", "do_layer_norm_before": True,
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
    },  # fmt: skip
}  # fmt: skip


def random_checkpoint(
    model: str,
    out,
    *,
    bits=4,
    group_size=16,
    quant_group_size=None,
    sparsity=0.5,
    skew=0.0,
    tiles=False,
    seed=0,
    progress=True,
) -> Path:
    """Writes the folder `out` whole or not at all and returns its path.

    model: a key of CONFIGS or the path of a config.json. quant_group_size: columns that share a scale, by default a
    group's. skew: standard deviation of the logarithm of a row's share of the kept groups; 0 gives all rows the same
    number, 1 gives some rows none and some all. tiles: remove whole tiles of TILE rows and columns, not single groups.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists already; choose another folder or delete it first")
    if not 0 <= sparsity < 1 or skew < 0:
        raise InputError(f"sparsity is {sparsity} and skew {skew}, expected 0 to below 1 and at least 0")
    quant_group_size = quant_group_size or group_size
    if quant_group_size % group_size and group_size % quant_group_size:
        raise InputError(f"groups of {quant_group_size} columns that share a scale do not fit groups of {group_size}")
    if tiles and TILE[1] % group_size:
        raise InputError(f"a tile of {TILE[1]} columns holds no whole groups of {group_size}; leave the tiles out")
    config = _config(model)
    skeleton = _skeleton(config)
    block_path, blocks = find_blocks(skeleton)
    linears = {
        f"{block_path}.{i}.{path}": tuple(linear.weight.shape)
        for i, block in enumerate(blocks)
        for path, linear in linears_of(block, f"{block_path}.{i}", ()).items()
    }
    for name, (_, columns) in linears.items():
        for size in (group_size, quant_group_size, *TILE[1:] * tiles):
            if columns % size:
                raise InputError(f"{name} has {columns} columns, which groups of {size} do not divide")
    rng = np.random.default_rng(seed)
    folder = out.parent / f"{out.name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, shard_bytes=512 << 20)
    parameters = dict(skeleton.named_parameters())  # tied weights once
    for name, parameter in tqdm(parameters.items(), desc="tensors", disable=None if progress else True):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in linears:
            sizes = bits, group_size, quant_group_size
            matrix = random_matrix(rng, *linears[module], *sizes, sparsity, skew, tiles)
            writer.add({f"{module}.{part}": array for part, array in codec.pack(matrix).items()})
        else:
            writer.add({name: _dense(rng, name, tuple(parameter.shape))})
    writer.finish()
    details = {"name": Path(model).stem if model not in CONFIGS else model, "gqsac": gqsac.__version__,
               "weights": "random", "skew": skew, "tiles": tiles, "seed": seed}  # fmt: skip
    quantization = QuantizationConfig(bits, group_size, sparsity, (), linears, details, quant_group_size)
    write_json(folder / "config.json", {**config, "dtype": "float16", "quantization_config": quantization.to_dict()})
    (folder / "tokenizer.json").write_text(_tokenizer_json(config["vocab_size"]), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    os.rename(folder, out)
    return out


def random_matrix(
    rng, rows, columns, bits, group_size, quant_group_size, sparsity, skew=0.0, tiles=False
) -> QuantizedMatrix:
    """A matrix whose rows, or rows of tiles, keep unequal numbers of groups, as skew says, at random columns.

    Scales keep the outputs about as large as the inputs.
    """
    if tiles:
        kept = _random_mask(rng, -(-rows // TILE[0]), columns // TILE[1], sparsity, skew)
        keep = np.repeat(np.repeat(kept, TILE[0], axis=0)[:rows], TILE[1] // group_size, axis=1)
    else:
        keep = _random_mask(rng, rows, columns // group_size, sparsity, skew)
    share = max(np.count_nonzero(keep), 1) / keep.size
    # The middle of the levels, and below it at random where a level below is left.
    shape = (rows, columns // quant_group_size)
    zeros = np.full(shape, ZERO_STEPS // 2 if bits > 1 else ZERO_STEPS // 4, np.uint8)
    if bits in (2, 3, 4):
        zeros -= rng.integers(0, 2, shape, dtype=np.uint8) * np.uint8(ZERO_STEPS >> bits)
    deviation = 2**bits / np.sqrt(12)  # of uniform levels
    scale = 1 / (deviation * np.sqrt(columns * share))
    values = np.frombuffer(rng.bytes(rows * columns * bits // 8), np.uint8)
    return QuantizedMatrix(
        group_size=group_size,
        quant_group_size=quant_group_size,
        row_bits=np.full(rows, bits, np.uint8),
        levels=unpack_values(values.reshape(rows, -1), bits, columns),
        scales=((rng.random(shape, dtype=np.float32) + 0.5) * np.float32(scale)).astype(np.float16),
        zeros=zeros,
        keep=None if keep.all() else keep,
    )


def _random_mask(rng, rows, n_groups, sparsity, skew) -> np.ndarray:
    """bool [rows, n_groups], True where a group is kept."""
    counts = _row_counts(rng, rows, n_groups, sparsity, skew)
    keep = np.empty((rows, n_groups), bool)
    for start in range(0, rows, 4096):
        wanted = counts[start : start + 4096]
        keys = rng.integers(0, 1 << 32, (len(wanted), n_groups), dtype=np.uint32)
        ordered = np.sort(keys, axis=1)
        last = np.take_along_axis(ordered, np.maximum(wanted - 1, 0)[:, None], axis=1)
        keep[start : start + 4096] = (keys <= last) & (wanted > 0)[:, None]
    return keep


def _row_counts(rng, rows, n_groups, sparsity, skew) -> np.ndarray:
    """Kept groups of each row, int64 [rows], 0 .. n_groups, whose sum is the layer's total, to rounding."""
    shares = np.exp(skew * rng.standard_normal(rows))
    target = round((1 - sparsity) * rows * n_groups)
    low, high = 0.0, float(n_groups) / shares.min()
    for _ in range(60):  # the factor whose clipped shares give the total, by bisection
        factor = (low + high) / 2
        if np.minimum(shares * factor, n_groups).sum() < target:
            low = factor
        else:
            high = factor
    cumulative = np.rint(np.cumsum(np.minimum(shares * high, n_groups)))
    return np.clip(np.diff(cumulative, prepend=0), 0, n_groups).astype(np.int64)


def _config(model: str) -> dict:
    if model in CONFIGS:
        return dict(CONFIGS[model])
    if not Path(model).is_file():
        raise InputError(f"{model} is neither a config.json nor one of {', '.join(CONFIGS)}")
    config = json.loads(Path(model).read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    return config


def _skeleton(config: dict):
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **options))
    model.tie_weights()
    return model


def _dense(rng, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norm weights near 1, other vectors near 0, matrices of standard deviation 0.02 made piece by piece."""
    if len(shape) < 2:
        offset = 1 if "norm" in name and name.endswith("weight") else 0
        return (offset + 0.01 * rng.standard_normal(shape)).astype(np.float32)
    tensor = np.empty(shape, np.float16)
    step = max(1, (1 << 24) // int(np.prod(shape[1:])))
    for start in range(0, shape[0], step):
        rows = tensor[start : start + step]
        rows[...] = 0.02 * rng.standard_normal(rows.shape, dtype=np.float32)
    return tensor


def _tokenizer_json(vocab_size: int) -> str:
    """A byte-level tokenizer: 256 tokens of one byte each, the rest named <256>, <257>, …"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"<{i}>" for i in range(len(alphabet), vocab_size))][:vocab_size]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"config.json, or one of {', '.join(CONFIGS)}")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--bits", type=int, default=4, choices=ROW_BITS)
    parser.add_argument("--group-size", type=int, default=16, choices=GROUP_SIZES)
    parser.add_argument(
        "--quant-group-size", type=int, choices=sorted(QUANT_GROUP_SIZES),
        help="columns that share a scale; default: the group size",
    )  # fmt: skip
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--skew", type=float, default=0.0, help="how unequal the rows' kept counts are, 0 to about 1")
    parser.add_argument("--tiles", action="store_true", help="remove whole tiles of 16 rows and 64 columns")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    started = time.monotonic()
    try:
        out = random_checkpoint(**arguments)
    except GqsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e9:.2f} GB in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
