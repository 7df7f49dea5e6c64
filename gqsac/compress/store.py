"""Between a block in memory and its stored tensors: BSR streams one way, dequantised linears the other."""

from __future__ import annotations

import numpy as np
import torch

from gqsac.bsr import BsrStream, pack_values, unpack_values
from gqsac.compress.quantize import SMALLEST_SCALE, QuantizedLinear
from gqsac.compress.write import dense_tensor, stream_tensors


def to_stream(linear: QuantizedLinear, bits: int, group_size: int) -> BsrStream:
    """The kept groups of `group_size` columns as a BSR stream.

    A scale that several groups share is repeated. A group of which only some weights stay (2:4) is kept
    whole, with the others at the level of its zero, which is exactly 0.
    """
    rows, columns = linear.adjusted.shape
    n_groups = columns // group_size
    keep, levels = to_numpy(linear.keep), to_numpy(linear.levels)
    scales, zeros = (
        np.repeat(to_numpy(tensor), n_groups // tensor.shape[1], axis=1) for tensor in (linear.scales, linear.zeros)
    )
    if keep.shape[1] > n_groups:
        kept = keep.reshape(rows, n_groups, -1)
        levels = np.where(kept, levels.reshape(rows, n_groups, group_size), zeros[..., None])
        keep = kept.any(2)
    return BsrStream(
        rows=rows,
        columns=columns,
        group_size=group_size,
        bits=bits,
        crow_indices=np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32),
        col_indices=np.nonzero(keep)[1].astype(np.int32),
        values=pack_values(levels.reshape(-1, group_size)[keep.ravel()], bits),
        scales=scales[keep],
        zeros=zeros[keep],
    )


def from_stored(name: str, stored: dict[str, np.ndarray], shape, group_size: int) -> BsrStream:
    """The stream of the linear `name` of that shape among a block's stored tensors."""
    arrays = [
        stored[f"{name}.streams.0.{tensor}"] for tensor in ("crow_indices", "col_indices", "values", "scales", "zeros")
    ]
    return BsrStream(*shape, group_size, arrays[2].shape[1] * 8 // group_size, *arrays)


def from_stream(stream: BsrStream, quant_group_size: int) -> QuantizedLinear:
    """The stream as a masked matrix, on the CPU, with the scales that several groups share in one place again."""
    n_groups = stream.columns // stream.group_size
    shape, q_shape = (stream.rows, n_groups), (stream.rows, stream.columns // quant_group_size)
    keep, levels = np.zeros(shape, bool), np.zeros((*shape, stream.group_size), np.uint8)
    scales, zeros = np.zeros(shape, np.float16), np.zeros(shape, np.uint8)
    where = (stream.row_indices(), stream.col_indices)
    keep[where], scales[where], zeros[where] = True, stream.scales, stream.zeros
    levels[where] = unpack_values(stream.values, stream.bits, stream.group_size)
    scales, zeros = (tensor.reshape(*q_shape, -1).max(2) for tensor in (scales, zeros))  # removed groups hold 0
    scales[scales == 0] = SMALLEST_SCALE  # of removed groups alone: stored scales are positive
    tensors = (levels.reshape(*q_shape, quant_group_size), scales, zeros, keep, stream.dequantize())
    return QuantizedLinear(*(torch.from_numpy(array) for array in tensors))


def stored_block(name: str, block, streams: dict[str, BsrStream], dense: list[str]) -> dict[str, np.ndarray]:
    """Stored tensors of a block: the streams, and what stays dense (norms, biases, skipped linears)."""
    tensors = {}
    for path, stream in streams.items():
        tensors.update(stream_tensors(f"{name}.{path}", (stream,)))
    replaced = {f"{path}.weight" for path in streams}
    for path, tensor in block.state_dict().items():
        if path not in replaced and f"{name}.{path}" in dense:
            tensors[f"{name}.{path}"] = dense_tensor(f"{name}.{path}", to_numpy(tensor))
    return tensors


def load_linears(name: str, linears: dict, stored: dict[str, np.ndarray], group_size: int) -> None:
    """Puts the dequantised streams in the linears' place, the same way for a fresh and a resumed block."""
    for path, linear in linears.items():
        stream = from_stored(f"{name}.{path}", stored, linear.weight.shape, group_size)
        linear.weight.data.copy_(torch.from_numpy(stream.dequantize()))


def load_dense(model, stored: dict[str, np.ndarray]) -> None:
    """Puts stored dense tensors (norms, biases, …) into a model that has them by those names."""
    own = model.state_dict()
    for name, array in stored.items():
        if name in own:
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
