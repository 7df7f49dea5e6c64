"""Compresses a model: calibrate, then block by block Hessian, saliency, select, quantise; then write.

This is the one-shot part of GQSA (arXiv 2412.17560): no training. Blocks run in float32 one at a time, so
memory holds the model as it is stored, one block's Hessians and the calibration samples' activations.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from gqsa_runtime.errors import GqsaError, InputError
from tqdm import tqdm

import gqsac
from gqsac.bsr import BsrStream
from gqsac.compress.blocks import BlockRunner, find_blocks, linears_of
from gqsac.compress.calibrate import BUILT_IN
from gqsac.compress.hessian import collect_hessians, inverse
from gqsac.compress.partial import PartialFolder
from gqsac.compress.prepare import check_options, choose_device, compressed_shapes, source_tokens
from gqsac.compress.quantize import quantize
from gqsac.compress.saliency import group_saliency
from gqsac.compress.select import select_groups
from gqsac.compress.store import dense_names, load_linears, stored_block, to_numpy, to_stream
from gqsac.compress.write import ShardWriter, dense_tensor, write_json
from gqsac.quantization_config import QuantizationConfig
from gqsac.source import load_source


def compress(
    src,
    out,
    *,
    bits: int = 4,
    group_size: int = 16,
    sparsity: float = 0.02,
    calibration=None,
    samples: int = 8,
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
    check_options(bits, group_size, sparsity, samples, seq_len, selection, damping)
    if out.exists():
        raise InputError(f"{out} exists already; choose another output folder or delete it first")
    texts = [calibration] if isinstance(calibration, (str, Path)) else list(calibration or [])
    target = choose_device(device)

    source = load_source(src)
    model = source.model
    block_path, blocks = find_blocks(model)
    shapes = compressed_shapes(source, block_path, blocks, tuple(skip), group_size)
    tokens = source_tokens(source, texts, samples, seq_len, seed)
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

    dense = dense_names(model)
    runner = BlockRunner(model, blocks, torch.from_numpy(tokens), target)
    kept = groups = resumed = 0
    bar = tqdm(
        total=len(blocks),
        desc=f"compress (calibrating on {described})",
        unit="block",
        disable=None if progress else True,
    )
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
                stored = stored_block(name, block, streams, dense)
                partial.save_block(index, stored)
            load_linears(name, linears, stored, group_size)
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
            writer.add({name: dense_tensor(name, to_numpy(model.state_dict()[name]))})
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


def _compress_block(runner, index, block, linears, options) -> dict[str, BsrStream]:
    """Steps 2 to 5 for one block: path within the block -> its one stream."""
    bits = options["bits"]
    hessians = collect_hessians(linears, lambda: runner.run(index, block, keep=False))
    siblings: dict[int, list[str]] = {}  # linears with the same inputs, which share a Hessian and all its factors
    for path in linears:
        siblings.setdefault(id(hessians[path]), []).append(path)
    streams = {}
    for paths in siblings.values():
        hessian = hessians[paths[0]]
        hessian_inverse = inverse(hessian, options["damping"])
        weights = [linears[path].weight.detach() for path in paths]
        saliencies = [group_saliency(weight, hessian_inverse, options["group_size"]) for weight in weights]
        keeps = [select_groups(saliency, options["sparsity"], options["selection"]) for saliency in saliencies]
        quantized = quantize(torch.cat(weights), torch.cat(keeps), hessian_inverse, hessian.diagonal(), bits)
        for path, part in zip(paths, quantized.split([len(weight) for weight in weights]), strict=True):
            streams[path] = to_stream(part, bits)
    return streams


def _digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]


def _peak_gib() -> float:
    """Peak resident memory of this process."""
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
