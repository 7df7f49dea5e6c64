"""Between a block in memory and its stored tensors: quantised linears one way, dequantised ones the other."""

from __future__ import annotations

import numpy as np
import torch

from gqsac import codec
from gqsac.compress.options import Options
from gqsac.compress.quantize import SMALLEST_SCALE, QuantizedLinear
from gqsac.compress.write import dense_tensor
from gqsac.quantized_matrix import ZERO_STEPS, QuantizedMatrix

# Of a QuantizedLinear, what a distillation stage goes on from.
MASTER_TENSORS = ("row_bits", "adjusted", "scales", "zeros", "keep")


def to_matrix(linear: QuantizedLinear, group_size: int) -> QuantizedMatrix:
    """The linear with a mask of groups of `group_size` columns.

    A group of which only some weights stay (2:4) is kept whole, with the others at the level of its zero, which is
    exactly 0.
    """
    rows, columns = linear.adjusted.shape
    n_groups = columns // group_size
    row_bits, keep, levels = to_numpy(linear.row_bits), to_numpy(linear.keep), to_numpy(linear.levels)
    scales, zeros = to_numpy(linear.scales), to_numpy(linear.zeros)
    if keep.shape[1] > n_groups:
        kept = keep.reshape(levels.shape)
        levels_of_zeros = ((zeros.astype(np.int64) << row_bits[:, None]) // ZERO_STEPS).astype(np.uint8)
        levels = np.where(kept, levels, levels_of_zeros[..., None])
        keep = keep.reshape(rows, n_groups, group_size).any(2)
    return QuantizedMatrix(
        group_size=group_size,
        quant_group_size=columns // scales.shape[1],
        row_bits=row_bits,
        levels=levels.reshape(rows, columns),
        scales=scales,
        zeros=zeros,
        keep=None if keep.all() else keep,
    )


def from_matrix(matrix: QuantizedMatrix) -> QuantizedLinear:
    """A matrix as a masked linear, on the CPU."""
    rows, columns = matrix.rows, matrix.columns
    keep = np.ones((rows, columns // matrix.group_size), bool) if matrix.keep is None else matrix.keep
    scales = np.where(matrix.scales == 0, np.float16(SMALLEST_SCALE), matrix.scales)  # 0 where all is removed
    levels = matrix.levels.reshape(*scales.shape, matrix.quant_group_size)
    tensors = (matrix.row_bits, levels, scales, matrix.zeros, keep, matrix.dequantize())
    return QuantizedLinear(*(torch.from_numpy(array) for array in tensors))


def from_stored(name: str, stored: dict[str, np.ndarray], shape, options: Options) -> QuantizedMatrix:
    """The matrix of the linear `name` of that shape among a block's stored tensors."""
    prefix = f"{name}."
    tensors = {
        path.removeprefix(prefix): array
        for path, array in stored.items()
        if path.startswith(prefix) and codec.TENSORS.fullmatch(path.removeprefix(prefix))
    }
    return codec.unpack(tensors, tuple(shape), options.group_size, options.quant_group_size, f"tensor {name}")


def stored_block(name: str, block, matrices: dict[str, QuantizedMatrix], dense: list[str]) -> dict[str, np.ndarray]:
    """Stored tensors of a block: the matrices, and what stays dense (norms, biases, skipped linears)."""
    tensors = {}
    for path, matrix in matrices.items():
        tensors.update({f"{name}.{path}.{part}": array for part, array in codec.pack(matrix).items()})
    replaced = {f"{path}.weight" for path in matrices}
    # Not of its state_dict: a block that is spread over processes would give its own part alone. And copies: what has
    # come together goes again, and numpy would hold on to it.
    for path, tensor in (*block.named_parameters(), *block.named_buffers()):
        if path not in replaced and f"{name}.{path}" in dense:
            tensors[f"{name}.{path}"] = dense_tensor(f"{name}.{path}", to_numpy(tensor.clone()))
    return tensors


def load_linears(name: str, linears: dict, stored: dict[str, np.ndarray], options: Options) -> None:
    """Puts the dequantised matrices in the linears' place, the same way for a fresh and a resumed block."""
    for path, linear in linears.items():
        matrix = from_stored(f"{name}.{path}", stored, linear.weight.shape, options)
        linear.weight.data.copy_(torch.from_numpy(matrix.dequantize()))


def load_dense(model, stored: dict[str, np.ndarray]) -> None:
    """Puts stored dense tensors (norms, biases, …) into a model that has them by those names."""
    own = model.state_dict()
    compressed = {name.rpartition(".levels.")[0] for name in stored if ".levels." in name}
    for name, array in stored.items():
        module, _, part = name.rpartition(".")
        # A linear in training has buffers of its own that are called as parts of its stored form are.
        of_linear = module in compressed and codec.TENSORS.fullmatch(part)
        if name in own and not of_linear:
            own[name].copy_(torch.from_numpy(array))


def dense_names(model) -> list[str]:
    """Names of the state dict without the second names of tied weights."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = every - {name for name, _ in model.named_parameters()}
    return [name for name in model.state_dict() if name not in tied]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor on the CPU; bfloat16, which numpy lacks, becomes f32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
