"""Checks what a compression is asked to do, before any work: options, device, layers, calibration tokens."""

from __future__ import annotations

import numpy as np
import torch
from gqsa_runtime.errors import DeviceError, InputError, ModelError
from gqsa_runtime.layouts.group_words import MAX_COLUMNS
from tokenizers import Tokenizer

from gqsac.bsr import GROUP_SIZES
from gqsac.compiler.passes.choose_layouts import MAX_COLUMNS as RECORD_COLUMNS
from gqsac.compress.blocks import is_skipped, linears_of
from gqsac.compress.calibrate import calibration_tokens
from gqsac.compress.options import SCALE_COLUMNS, Options
from gqsac.source import Source

DEFAULT_SEQ_LEN = 1024


def choose_device(device: str) -> torch.device:
    """The torch device of a name, or for "auto" a GPU if there is one. Raises DeviceError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise DeviceError(f"the device is {device!r}, expected auto, cpu, cuda or cuda:N")
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"torch cannot use the device {device!r} ({reason}); use the device cpu") from error


def compressed_shapes(source: Source, block_path: str, blocks, options: Options) -> dict[str, tuple[int, int]]:
    """Full path -> (rows, columns) of every linear to compress. Raises errors that name the layer."""
    shapes, passed = {}, []
    for index, block in enumerate(blocks):
        name = f"{block_path}.{index}"
        passed += [f"{name}.{path}" for path, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
        for path, linear in linears_of(block, name, options.skip).items():
            rows, columns = linear.weight.shape
            _check_columns(f"{name}.{path}", columns, options)
            shapes[f"{name}.{path}"] = (rows, columns)
    for pattern in options.skip:
        if not any(is_skipped(path, (pattern,)) for path in passed):
            example = f"; one of them is {passed[0]}" if passed else ""
            raise InputError(f"the pattern {pattern!r} to skip matches no linear of the blocks{example}")
    if not shapes:
        raise InputError(f"{source.name} has no linear left to compress in {block_path}")
    return shapes


def _check_columns(path: str, columns: int, options: Options) -> None:
    if columns % options.group_size:
        fitting = [size for size in GROUP_SIZES if columns % size == 0]
        raise InputError(
            f"{path} has {columns} input columns, which groups of {options.group_size} do not divide; "
            f"use a group size of {' or '.join(map(str, fitting)) or 'none: skip it'}, or skip the layer"
        )
    if options.quant_group_size is not None and columns % options.quant_group_size:
        raise InputError(
            f"{path} has {columns} input columns, which quantisation groups of {options.quant_group_size} do not "
            "divide; use smaller ones, or skip the layer"
        )
    if options.by_rows and (columns % SCALE_COLUMNS or columns > RECORD_COLUMNS):
        raise InputError(
            f"{path} has {columns} input columns, and rows of different widths need a multiple of {SCALE_COLUMNS}, "
            f"up to {RECORD_COLUMNS}; leave the linear dense with --skip, or give --bits in place of a target"
        )
    if columns // options.group_size > MAX_COLUMNS:
        raise InputError(
            f"{path} has {columns // options.group_size} groups in a row, and the format holds at most "
            f"{MAX_COLUMNS}; use a larger group size than {options.group_size}"
        )


def sample_length(source: Source, seq_len: int | None) -> int:
    """Tokens of a sample: what is asked for, else 1024 or the model's context. Raises InputError for too many."""
    config = source.model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    if seq_len is None:
        return min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
    if longest is not None and seq_len > longest:
        raise InputError(f"samples of {seq_len} tokens do not fit the model's context of {longest}; use shorter ones")
    return seq_len


def source_tokens(
    source: Source, texts, samples: int, seq_len: int, seed: int, purpose: str = "calibration"
) -> np.ndarray:
    """Calibration windows in the source's own tokens, int64 [samples, seq_len]. Raises InputError, ModelError.

    purpose: what the windows are for, "calibration" or "training".
    """
    if "tokenizer.json" not in source.files:
        raise ModelError(f"{source.name} has no tokenizer.json; calibration needs the model's tokenizer")
    try:
        tokenizer = Tokenizer.from_str(source.tokenizer_json)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{source.name}: tokenizer.json cannot be read ({error}); is it damaged?") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokens = calibration_tokens(tokenizer, texts or None, samples, seq_len, seed, purpose)
    vocabulary = len(source.model.get_input_embeddings().weight)
    if tokens.max() >= vocabulary:
        raise ModelError(
            f"{source.name}: the tokenizer gives token {tokens.max()}, but the model has {vocabulary} embeddings; "
            "is it another model's tokenizer?"
        )
    return tokens
