"""Says in one sentence what a RuntimeError of torch means that no one can foresee: no memory, no GPU, no disk."""

from __future__ import annotations

import re

import torch
from gqsa_runtime.errors import DeviceError

from gqsac.compress.options import Options

_NO_MEMORY = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|DefaultCPUAllocator")
# Libraries report a GPU that is gone, or that failed, with plain RuntimeErrors of their own.
_NO_GPU = re.compile(
    r"CUDA (driver )?error|CUDACachingAllocator|Triton Error \[CUDA\]|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS"
    r"|(cuDNN|cublas|cuBLAS|cusolver|cuSOLVER) error"
)
_NO_DISK = re.compile(r"iostream error|inline_container|PytorchStreamWriter")  # of torch.save
_LONGEST = 160
LOADING = "loading the model"


def explained(error: Exception, stage: str, options: Options, begun: bool = False) -> DeviceError | None:
    """What to raise in place of `error`, or None where it is something else.

    stage: in which it came, or LOADING. options: with seq_len and batch_tokens filled in, but for LOADING.
    begun: whether the stage has saved a state, with which its options are settled.
    """
    text = str(error)
    reason = text.splitlines()[0][:_LONGEST] if text else type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _NO_MEMORY.search(text):
        gpu = "DefaultCPUAllocator" not in text and not isinstance(error, MemoryError)
        where, reason = "the GPU" if gpu else "the machine", reason.split(". ")[0]
        return DeviceError(f"{stage}: {where} has too little memory ({reason}); {_smaller(stage, options, gpu, begun)}")
    if isinstance(error, torch.AcceleratorError) or _NO_GPU.search(text):
        return DeviceError(f"{stage}: the GPU failed ({reason}); give the same command again to go on")
    if _NO_DISK.search(text):
        return DeviceError(
            f"{stage}: its state could not be written ({reason}); free some space on the disk of the output folder, "
            "then give the same command again to go on"
        )
    return None


def _smaller(stage: str, options: Options, gpu: bool, begun: bool) -> str:
    """What needs less memory in a stage. gpu: of the GPU."""
    if stage == LOADING:
        return "use a machine with more, or a smaller model"
    if begun:
        return "it sufficed before, so free what else uses it, then give the same command again to go on"
    if stage in ("distill", "e2e-oqp"):
        if options.batch_tokens >= 2 * options.seq_len:
            return f"use smaller steps (--batch-tokens {options.batch_tokens // 2}); finished stages are kept"
        return f"a step is one sample already, so use shorter samples (--seq-len {options.seq_len // 2})"
    if stage == "sensitivities":
        return f"use shorter samples (--seq-len {options.seq_len // 2})"
    if stage == "allocation":
        return f"use --allocation row, or shorter samples (--seq-len {options.seq_len // 2})"
    if gpu:  # which holds one block and a few samples, however many there are
        return f"use shorter samples (--seq-len {options.seq_len // 2}), or --device cpu"
    return f"use fewer (--samples {max(1, options.samples // 2)}) or shorter samples (--seq-len {options.seq_len // 2})"
