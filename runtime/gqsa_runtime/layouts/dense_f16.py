"""Layout of a linear that is not compressed: fp16 weights, row by row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gqsa_runtime.constants import Params, Rule
from gqsa_runtime.layouts.base import Layout, Part


class DenseF16(Layout):
    """One tensor, weight f16 [rows, k]. pack's source: an array of that shape and dtype."""

    op = "linear_dense"
    parts = (Part("weight", "f16"),)
    constants: Mapping[str, Rule] = {}
    headers = {"cuda": "linear_dense.cuh", "cpu": "linear_dense.h"}
    compressed = False

    def shapes(self, params: Params, n_groups: int) -> dict[str, tuple[int, ...]]:
        """See Layout."""
        return {"weight": (params["rows"], params["k"])}

    def pack(self, part: str, source: np.ndarray, params: Params) -> np.ndarray:
        """See Layout."""
        return source

    def unpack(self, arrays: Mapping[str, np.ndarray], params: Params) -> np.ndarray:
        """See Layout."""
        shape = params["rows"], params["k"]
        return arrays["weight"].reshape(-1)[: shape[0] * shape[1]].reshape(shape).astype(np.float32)
