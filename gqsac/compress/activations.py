"""Where the activations of all calibration samples are kept: in memory, or in files where it does not hold them."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path

import torch
from gqsa_runtime.errors import InputError
from gqsa_runtime.memory import free_cpu_bytes


def empty_states(count: int, shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> list[torch.Tensor]:
    """`count` tensors on the CPU, not initialised.

    Where together they would take more than half of the free memory, they are mapped files in `folder`, without names
    and gone when the tensors are, or the process. Without a folder, or where the system does not say what is free,
    they are in memory. Raises InputError if the disk is too small.
    """
    size = math.prod(shape) * dtype.itemsize
    free = free_cpu_bytes()
    if folder is None or free is None or count * size <= free // 2:
        return [torch.empty(shape, dtype=dtype) for _ in range(count)]
    return [torch.frombuffer(_mapped(folder, size), dtype=dtype).view(shape) for _ in range(count)]


def _mapped(folder: Path, size: int) -> mmap.mmap:
    with tempfile.TemporaryFile(dir=folder) as file:
        try:  # to reserve it all: a disk that fills up later would kill the process at a write
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise InputError(
                f"the activations of all samples take more than half of the free memory, and {folder} has no room for "
                f"files of {size / 1e9:.1f} GB ({error.strerror}); use fewer or shorter samples, or an output folder "
                "on a larger disk"
            ) from error
        return mmap.mmap(file.fileno(), size)  # outlives the file object
