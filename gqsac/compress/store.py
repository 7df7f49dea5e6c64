"""Between a block in memory and its stored tensors: BSR streams one way, dequantised linears the other."""

from __future__ import annotations

import numpy as np
import torch

from gqsac.bsr import BsrStream, pack_values
from gqsac.compress.quantize import QuantizedLinear
from gqsac.compress.write import dense_tensor, stream_tensors


def to_stream(linear: QuantizedLinear, bits: int) -> BsrStream:
    """The kept groups as a BSR stream."""
    keep = to_numpy(linear.keep)
    rows, n_groups = keep.shape
    group_size = linear.levels.shape[2]
    return BsrStream(
        rows=rows,
        columns=n_groups * group_size,
        group_size=group_size,
        bits=bits,
        crow_indices=np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32),
        col_indices=np.nonzero(keep)[1].astype(np.int32),
        values=pack_values(to_numpy(linear.levels).reshape(-1, group_size), bits)[keep.ravel()],
        scales=to_numpy(linear.scales)[keep],
        zeros=to_numpy(linear.zeros)[keep],
    )


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
        crow, col, values, scales, zeros = (
            stored[f"{name}.{path}.streams.0.{tensor}"]
            for tensor in ("crow_indices", "col_indices", "values", "scales", "zeros")
        )
        bits = values.shape[1] * 8 // group_size
        stream = BsrStream(*linear.weight.shape, group_size, bits, crow, col, values, scales, zeros)
        linear.weight.data.copy_(torch.from_numpy(stream.dequantize()))


def dense_names(model) -> list[str]:
    """Names of the state dict without the second names of tied weights."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = every - {name for name, _ in model.named_parameters()}
    return [name for name in model.state_dict() if name not in tied]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor on the CPU; bfloat16, which numpy lacks, becomes f32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
