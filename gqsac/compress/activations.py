"""Where the activations of all calibration samples are kept: in memory, or in files where it does not hold them."""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import torch
from gqsa_runtime.errors import InputError
from gqsa_runtime.memory import free_cpu_bytes


def empty_states(count: int, shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> list[torch.Tensor]:
    """`count` tensors on the CPU, not initialised.

    Where together they would take more than half of the free memory, they are mapped files in `folder`, without names
    and gone when the tensors are, or the process. Without a folder they are always in memory. Raises InputError if
    the disk is too small.
    """
    size = math.prod(shape) * dtype.itemsize
    free = free_cpu_bytes()
    if folder is None or free is None or count * size <= free // 2:
        return [torch.empty(shape, dtype=dtype) for _ in range(count)]
    if shutil.disk_usage(folder).free < count * size:
        raise InputError(_too_small(folder, count * size))
    return [torch.frombuffer(_mapped(folder, size), dtype=dtype).view(shape) for _ in range(count)]


def _mapped(folder: Path, size: int) -> mmap.mmap:
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a disk that fills up later would kill the process at a write
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise InputError(_too_small(folder, size)) from error
        else:
            file.truncate(size)
        return mmap.mmap(file.fileno(), size)  # outlives the file object


def _too_small(folder: Path, size: int) -> str:
    return (
        f"the activations of all samples take {size / 1e9:.1f} GB, more than half of the free memory, and {folder} has "
        f"only {shutil.disk_usage(folder).free / 1e9:.1f} GB free; use fewer or shorter samples, or an output folder "
        "on a larger disk"
    )
