"""Rotary position tables, filled when a file is opened so that they fit the chosen context."""

import numpy as np


def rope_table(inv_freq: np.ndarray, scaling: float, context: int) -> np.ndarray:
    """f32 [context, 2 * len(inv_freq)]: a row is scaling * cos(angles), then scaling * sin(angles).

    inv_freq: f32 [rotary_dim / 2]. Angles are f32 products, as Hugging Face models compute them.
    """
    positions = np.arange(context, dtype=np.float32)
    angles = positions[:, None] * inv_freq.astype(np.float32)[None, :]
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * np.float32(scaling)
    return np.ascontiguousarray(table, np.float32)
