"""Compresses a model: calibrate, then block by block Hessian, saliency, select, quantise; then write.

This is the one-shot part of GQSA (arXiv 2412.17560): no training. Blocks run in float32 one at a time, so
memory holds the model as it is stored, one block's Hessians and the calibration samples' activations.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from gqsa_runtime.errors import DeviceError, GqsaError, InputError, ModelError
from gqsa_runtime.format import MAX_GROUP_COLUMNS
from tokenizers import Tokenizer
from tqdm import tqdm

import gqsac
from gqsac.bsr import BITS, GROUP_SIZES, BsrStream, pack_values
from gqsac.compress.blocks import BlockRunner, find_blocks, is_skipped, linears_of
from gqsac.compress.calibrate import BUILT_IN, calibration_tokens
from gqsac.compress.hessian import collect_hessians, inverse
from gqsac.compress.partial import PartialFolder
from gqsac.compress.quantize import QuantizedLinear, quantize
from gqsac.compress.saliency import group_saliency
from gqsac.compress.select import SELECTIONS, select_groups
from gqsac.compress.write import ShardWriter, dense_tensor, stream_tensors, write_json
from gqsac.quantization_config import QuantizationConfig
from gqsac.source import Source, load_source

DEFAULT_SEQ_LEN = 1024


def compress(
    src,
    out,
    *,
    bits: int = 4,
    group_size: int = 16,
    sparsity: float = 0.05,
    calibration=None,
    samples: int = 16,
    seq_len: int | None = None,
    seed: int = 0,
    skip: tuple[str, ...] = (),
    selection: str = "row",
    damping: float = 0.01,
    device: str = "auto",
    progress: bool = True,
) -> dict:
    """Writes the compressed checkpoint of `src` to the folder `out` and returns a report for people and tools.

    src: model folder, hub id or .gguf file. bits: 2, 3, 4 or 8 (symmetric). group_size: 8, 16, 32, 64 or 128
    columns. sparsity: share of all groups to remove, 0 to below 1. calibration: UTF-8 text file or files, None
    for the built-in text. samples, seq_len: how many windows of how many tokens (default 1024, or the model's
    context if that is shorter). skip: patterns of linears to leave dense, such as "down_proj" or
    "model.layers.0.*"; output head and embeddings always stay dense. selection: "row" or "layer", see select.py.
    damping: added to the Hessian's diagonal, relative to its mean. device: "auto", "cpu", "cuda".

    A run that was stopped goes on where it was when called again with the same arguments, and makes the same
    bytes. Raises InputError, ModelError and their kin.
    """
    started = time.monotonic()
    out = Path(out)
    _check_options(bits, group_size, sparsity, samples, seq_len, selection, damping)
    if out.exists():
        raise InputError(f"{out} exists already; choose another output folder or delete it first")
    texts = [calibration] if isinstance(calibration, (str, Path)) else list(calibration or [])
    target = _device(device)

    source = load_source(src)
    model = source.model
    block_path, blocks = find_blocks(model)
    shapes = _compressed_shapes(source, block_path, blocks, tuple(skip), group_size)
    tokens = _tokens(source, texts, samples, seq_len, seed)
    described = ", ".join(Path(text).name for text in texts) or BUILT_IN
    options = {
        "bits": bits,
        "group_size": group_size,
        "sparsity": sparsity,
        "skip": list(skip),
        "selection": selection,
        "damping": damping,
        "seed": seed,
        "calibration": described,
        "samples": tokens.shape[0],
        "seq_len": tokens.shape[1],
    }
    identity = {"model": source.fingerprint(), "tokens": _digest(tokens), "gqsac": gqsac.__version__, **options}
    partial = PartialFolder(out, identity)

    dense = _dense_names(model)
    runner = BlockRunner(model, blocks, torch.from_numpy(tokens), target)
    kept = groups = resumed = 0
    bar = tqdm(total=len(blocks), desc="compress", unit="block", disable=None if progress else True)
    with bar:
        for index, block in enumerate(blocks):
            name = f"{block_path}.{index}"
            block.float().to(target)
            linears = linears_of(block, name, tuple(skip))
            stored = partial.load_block(index)
            resumed += stored is not None
            if stored is None:
                try:
                    streams = _compress_block(runner, index, block, linears, options)
                except GqsaError as error:
                    raise type(error)(f"{name}: {error}") from error
                stored = _stored_block(name, block, streams, dense)
                partial.save_block(index, stored)
            _load_linears(name, linears, stored, group_size)
            if index + 1 < len(blocks):
                runner.run(index, block, keep=True)
                runner.check(name)
            for linear in linears:
                groups += shapes[f"{name}.{linear}"][0] * shapes[f"{name}.{linear}"][1] // group_size
                kept += len(stored[f"{name}.{linear}.streams.0.col_indices"])
            block.to("meta")  # its memory is not needed any more
            bar.update()
            bar.set_postfix_str(f"peak {_peak_gib():.1f} GiB")

    quantization = QuantizationConfig(
        bits=bits,
        group_size=group_size,
        sparsity=sparsity,
        skip=tuple(skip),
        shapes=shapes,
        details={
            "name": source.name,
            "gqsac": gqsac.__version__,
            **{key: options[key] for key in ("selection", "damping", "seed", "calibration", "samples", "seq_len")},
        },
    )
    folder = partial.new_model_folder()
    writer = ShardWriter(folder)
    inside = f"{block_path}."
    for name in dense:
        if not name.startswith(inside):
            writer.add({name: dense_tensor(name, _numpy(model.state_dict()[name]))})
    for index in range(len(blocks)):
        writer.add(partial.load_block(index))
    writer.finish()
    write_json(folder / "config.json", {**source.config, "quantization_config": quantization.to_dict()})
    for name, content in source.files.items():
        (folder / name).write_bytes(content)
    total_bytes = sum(file.stat().st_size for file in folder.iterdir())
    partial.publish(folder)

    parameters = sum(rows * columns for rows, columns in shapes.values())
    packed = kept * (group_size * bits // 8 + 4) + sum(4 * (rows + 1) for rows, _ in shapes.values())
    return {
        "out": str(out),
        "model": source.name,
        "linears": len(shapes),
        "parameters": parameters,
        "groups": groups,
        "kept_groups": kept,
        "bits_per_weight": round(8 * packed / parameters, 4),  # as `gqsac build` packs them
        "bytes": total_bytes,
        "calibration": f"{described}: {tokens.shape[0]} samples of {tokens.shape[1]} tokens",
        "resumed_blocks": resumed,
        "seconds": round(time.monotonic() - started, 1),
        "options": options,
    }


def _check_options(bits, group_size, sparsity, samples, seq_len, selection, damping) -> None:
    if bits not in BITS:
        raise InputError(f"bits is {bits}, expected one of {', '.join(map(str, BITS))}")
    if group_size not in GROUP_SIZES:
        raise InputError(f"the group size is {group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}")
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity is {sparsity}, expected a share of groups to remove from 0 to below 1")
    if samples < 1:
        raise InputError(f"samples is {samples}, expected at least 1")
    if seq_len is not None and seq_len < 2:
        raise InputError(f"the sample length is {seq_len} tokens, expected at least 2")
    if selection not in SELECTIONS:
        raise InputError(f"selection is {selection!r}, expected one of {', '.join(SELECTIONS)}")
    if not 0 < damping <= 1:
        raise InputError(f"damping is {damping}, expected above 0 and at most 1")


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"torch cannot use the device {device!r} ({reason}); use the device cpu") from error


def _compressed_shapes(source: Source, block_path: str, blocks, skip, group_size) -> dict[str, tuple[int, int]]:
    """Full path -> (rows, columns) of every linear to compress. Raises errors that name the layer."""
    shapes, passed = {}, []
    for index, block in enumerate(blocks):
        name = f"{block_path}.{index}"
        passed += [f"{name}.{path}" for path, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
        for path, linear in linears_of(block, name, skip).items():
            rows, columns = linear.weight.shape
            if columns % group_size:
                fitting = [size for size in GROUP_SIZES if columns % size == 0]
                raise InputError(
                    f"{name}.{path} has {columns} input columns, which groups of {group_size} do not divide; "
                    f"use a group size of {' or '.join(map(str, fitting)) or 'none: skip it'}, or skip the layer"
                )
            if columns // group_size > MAX_GROUP_COLUMNS:
                raise InputError(
                    f"{name}.{path} has {columns // group_size} groups in a row, and the format holds at most "
                    f"{MAX_GROUP_COLUMNS}; use a larger group size than {group_size}"
                )
            shapes[f"{name}.{path}"] = (rows, columns)
    for pattern in skip:
        if not any(is_skipped(path, (pattern,)) for path in passed):
            example = f"; one of them is {passed[0]}" if passed else ""
            raise InputError(f"the pattern {pattern!r} to skip matches no linear of the blocks{example}")
    if not shapes:
        raise InputError(f"{source.name} has no linear left to compress in {block_path}")
    return shapes


def _tokens(source: Source, texts, samples: int, seq_len: int | None, seed: int) -> np.ndarray:
    config = source.model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
    elif longest is not None and seq_len > longest:
        raise InputError(f"samples of {seq_len} tokens do not fit the model's context of {longest}; use shorter ones")
    if "tokenizer.json" not in source.files:
        raise ModelError(f"{source.name} has no tokenizer.json; calibration needs the model's tokenizer")
    try:
        tokenizer = Tokenizer.from_str(source.tokenizer_json)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{source.name}: tokenizer.json cannot be read ({error}); is it damaged?") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokens = calibration_tokens(tokenizer, texts or None, samples, seq_len, seed)
    vocabulary = len(source.model.get_input_embeddings().weight)
    if tokens.max() >= vocabulary:
        raise ModelError(
            f"{source.name}: the tokenizer gives token {tokens.max()}, but the model has {vocabulary} embeddings; "
            "is it another model's tokenizer?"
        )
    return tokens


def _compress_block(runner, index, block, linears, options) -> dict[str, BsrStream]:
    """Steps 2 to 5 for one block: path within the block -> its one stream."""
    bits = options["bits"]
    hessians = collect_hessians(linears, lambda: runner.run(index, block, keep=False))
    inverses: dict[int, torch.Tensor] = {}  # siblings share a Hessian
    streams = {}
    for path, linear in linears.items():
        hessian = hessians[path]
        if id(hessian) not in inverses:
            inverses[id(hessian)] = inverse(hessian, options["damping"])
        hessian_inverse = inverses[id(hessian)]
        weight = linear.weight.detach()
        if not torch.isfinite(weight).all():
            raise ModelError(f"the weight of {path} holds a NaN or an infinity; the source model is damaged")
        saliency = group_saliency(weight, hessian_inverse, options["group_size"])
        keep = select_groups(saliency, options["sparsity"], options["selection"])
        streams[path] = _to_stream(quantize(weight, keep, hessian_inverse, hessian.diagonal(), bits), bits)
    return streams


def _to_stream(linear: QuantizedLinear, bits: int) -> BsrStream:
    keep = _numpy(linear.keep)
    rows, n_groups = keep.shape
    group_size = linear.levels.shape[2]
    return BsrStream(
        rows=rows,
        columns=n_groups * group_size,
        group_size=group_size,
        bits=bits,
        crow_indices=np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32),
        col_indices=np.nonzero(keep)[1].astype(np.int32),
        values=pack_values(_numpy(linear.levels).reshape(-1, group_size), bits)[keep.ravel()],
        scales=_numpy(linear.scales)[keep],
        zeros=_numpy(linear.zeros)[keep],
    )


def _stored_block(name: str, block, streams: dict[str, BsrStream], dense: list[str]) -> dict[str, np.ndarray]:
    """Stored tensors of a block: the streams, and what stays dense (norms, biases, skipped linears)."""
    tensors = {}
    for path, stream in streams.items():
        tensors.update(stream_tensors(f"{name}.{path}", (stream,)))
    replaced = {f"{path}.weight" for path in streams}
    for path, tensor in block.state_dict().items():
        if path not in replaced and f"{name}.{path}" in dense:
            tensors[f"{name}.{path}"] = dense_tensor(f"{name}.{path}", _numpy(tensor))
    return tensors


def _load_linears(name: str, linears: dict, stored: dict[str, np.ndarray], group_size: int) -> None:
    """Puts the dequantised streams in the linears' place, the same way for a fresh and a resumed block."""
    for path, linear in linears.items():
        crow, col, values, scales, zeros = (
            stored[f"{name}.{path}.streams.0.{tensor}"]
            for tensor in ("crow_indices", "col_indices", "values", "scales", "zeros")
        )
        bits = values.shape[1] * 8 // group_size
        stream = BsrStream(*linear.weight.shape, group_size, bits, crow, col, values, scales, zeros)
        linear.weight.data.copy_(torch.from_numpy(stream.dequantize()))


def _dense_names(model) -> list[str]:
    """Names of the state dict without the second names of tied weights."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = every - {name for name, _ in model.named_parameters()}
    return [name for name in model.state_dict() if name not in tied]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _digest(tokens: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]


def _peak_gib() -> float:
    """Peak resident memory of this process."""
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
