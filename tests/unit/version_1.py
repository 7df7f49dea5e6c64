"""What checkpoints of format version 1 hold, which are read but not written any more."""

import numpy as np

from gqsac.bsr import BsrStream
from gqsac.quantization_config import STREAMS_VERSION, QuantizationConfig


def stream_tensors(module: str, streams: tuple[BsrStream, ...]) -> dict[str, np.ndarray]:
    """Tensor name -> array, col_indices as int16 where they fit."""
    tensors = {}
    for number, stream in enumerate(streams):
        narrow = stream.columns // stream.group_size < 1 << 15
        prefix = f"{module}.streams.{number}"
        tensors[f"{prefix}.crow_indices"] = stream.crow_indices
        tensors[f"{prefix}.col_indices"] = stream.col_indices.astype(np.int16 if narrow else np.int32)
        tensors[f"{prefix}.values"] = stream.values
        tensors[f"{prefix}.scales"] = stream.scales
        tensors[f"{prefix}.zeros"] = stream.zeros
    return tensors


def config(group_size: int, shapes: dict[str, tuple[int, int]]) -> dict:
    """A quantization_config."""
    return QuantizationConfig(4, group_size, 0.5, shapes=shapes, format_version=STREAMS_VERSION).to_dict()
