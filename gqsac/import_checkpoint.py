"""Other tools' compressed checkpoints as gqsa checkpoints, without loss: the same levels, scales and zeros."""

from __future__ import annotations

from pathlib import Path

from gqsa_runtime.errors import InputError

from gqsac import codec
from gqsac.checkpoint import Checkpoint
from gqsac.quantization_config import QuantizationConfig
from gqsac.rewrite import partial_folder, rewrite

_DROPPED = ("quantize_config.json", "quant_config.json")  # what config.json says otherwise


def import_checkpoint(checkpoint: Checkpoint, out: Path) -> QuantizationConfig:
    """Writes a checkpoint of GPTQ, AWQ or compressed-tensors to the folder `out`, whole or not at all.

    Raises InputError if `out` exists or there is nothing to import, FormatError and UnsupportedError that name the
    linear where it is damaged or its grid does not fit.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists already; choose another output folder or delete it first")
    if checkpoint.quantization is not None or not checkpoint.compressed:
        what = "is a gqsa checkpoint already" if checkpoint.compressed else "is not compressed"
        raise InputError(
            f"{checkpoint.path} {what}; checkpoints of GPTQ, AWQ and compressed-tensors are imported"
            + ("" if checkpoint.compressed else ", others are made by `gqsac compress`")
        )
    method = checkpoint.config["quantization_config"]["quant_method"]
    headers = {module: checkpoint.matrix_header(module) for module in checkpoint.modules()}
    sizes = [(header.group_size, header.quant_group_size) for header in headers.values()]
    common = max(set(sizes), key=sizes.count)
    weights = {module: header.rows * header.columns for module, header in headers.items()}
    config = QuantizationConfig(
        bits=sum(headers[m].widths[0] * count for m, count in weights.items()) / sum(weights.values()),
        group_size=common[0],
        quant_group_size=common[1],
        sparsity=0.0,
        shapes={module: (header.rows, header.columns) for module, header in headers.items()},
        group_sizes={module: size for module, size in zip(headers, sizes, strict=True) if size != common},
        details={"name": checkpoint.path.resolve().name, "imported_from": method},
    )
    folder = partial_folder(out)
    if folder.exists():
        raise InputError(f"{folder} is in the way; move or delete it")
    linears = ((module, codec.pack(checkpoint.matrix(module))) for module in headers)
    rewrite(checkpoint, out, linears, config.to_dict(), _DROPPED)
    return config
