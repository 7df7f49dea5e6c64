"""Writes checkpoint folders: safetensors shards, dense tensors in their stored form, JSON.

What compressed linears are stored as is gqsac.codec's business.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from gqsa_runtime.errors import ModelError
from safetensors.numpy import save_file

SHARD_BYTES = 1 << 30  # held in memory at a time


def dense_tensor(name: str, array: np.ndarray) -> np.ndarray:
    """The stored form of a dense tensor: f16, vectors f32. Raises ModelError on NaN and where f16 overflows."""
    array = np.asarray(array)
    if not np.isfinite(array).all():
        raise ModelError(f"tensor {name} holds a NaN or an infinity; the source model is damaged")
    if array.ndim < 2:
        return array.astype(np.float32)
    with np.errstate(over="ignore"):
        stored = array.astype(np.float16)
    if not np.isfinite(stored).all():
        raise ModelError(
            f"tensor {name} reaches {np.abs(array).max():.3g}, which is beyond the float16 range of 65504; "
            "the model cannot be stored"
        )
    return stored


class ShardWriter:
    """Collects tensors and writes them as model.safetensors, or as numbered shards with an index.

    Memory stays under `shard_bytes` plus one tensor. The same tensors in the same order give the same bytes.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self._folder = Path(folder)
        self._shard_bytes = shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []  # tensor names of each shard written so far
        self.total_bytes = 0

    def add(self, tensors: dict[str, np.ndarray]) -> None:
        """Takes tensors that are already in their stored form. Raises ValueError on a second tensor of one name."""
        for name, array in tensors.items():
            if name in self._pending or any(name in shard for shard in self._shards):
                raise ValueError(f"tensor {name} is written twice")
            if self._pending and self._pending_bytes + array.nbytes > self._shard_bytes:
                self._flush()
            self._pending[name] = np.ascontiguousarray(array)
            self._pending_bytes += array.nbytes
            self.total_bytes += array.nbytes

    def finish(self) -> None:
        """Writes what is left, gives the shards their names and writes the index if there are several."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, 1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).chmod(0o644)  # safetensors makes its files private
            os.replace(self._part(number), self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self._folder / "model.safetensors.index.json", index)

    def _part(self, number: int) -> Path:
        return self._folder / f"shard-{number}.part"

    def _flush(self) -> None:
        path = self._part(len(self._shards) + 1)
        save_file(self._pending, str(path), metadata={"format": "pt"})
        sync(path)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def write_json(file: Path, value) -> None:
    """Writes JSON as people like to read it."""
    Path(file).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Forces a file's bytes, or a folder's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
