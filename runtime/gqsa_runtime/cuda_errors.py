"""Sentences for what the CUDA driver answers: what it means for a user of .gqsa files, and what to do."""

from __future__ import annotations

STEPWISE_VARIABLE = "GQSA_CUDA_STEPWISE"

_UPDATE = "update the NVIDIA driver"
_RELINK = "make kernels with `gqsac relink FILE -o NEW --target sm_XX` (`gqsa doctor` names this GPU's sm_XX)"
_REPORT = (
    f"which is a bug: run it with {STEPWISE_VARIABLE}=1, which names the kernel, and report that with the file's build "
    "options; use --device cpu meanwhile"
)

_REASONS = {
    "CUDA_ERROR_NO_DEVICE": "the driver finds no GPU; use --device cpu",
    "CUDA_ERROR_OUT_OF_MEMORY": "the GPU is out of memory; use a smaller --context or close other programs",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": f"the driver is older than the PTX in the file; {_UPDATE}, or {_RELINK}",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": f"the file's kernels are not for this GPU; {_RELINK}, or {_UPDATE}",
    "CUDA_ERROR_INVALID_IMAGE": "the kernels in the file are damaged or newer than the driver; check the file with "
    f"`gqsa verify`, and {_UPDATE}",
    "CUDA_ERROR_INVALID_PTX": f"the driver cannot compile the PTX in the file; {_UPDATE}, or {_RELINK}",
    "CUDA_ERROR_JIT_COMPILER_NOT_FOUND": f"the driver comes without its PTX compiler; {_UPDATE}, or {_RELINK}",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver's kernel module and its libraries are of different versions; "
    "restart the machine after a driver update, or use --device cpu",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "this GPU cannot use the CUDA compatibility libraries, and the "
    f"driver is too old without them; {_UPDATE}, or use --device cpu",
    "CUDA_ERROR_STUB_LIBRARY": "libcuda.so.1 is a stub of the CUDA toolkit; remove it from LD_LIBRARY_PATH so that "
    "the NVIDIA driver's own is found, or use --device cpu",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another program uses the GPU alone; end it, or choose another GPU with "
    "--device cuda:N",
    "CUDA_ERROR_ILLEGAL_ADDRESS": f"a kernel left its memory, {_REPORT}",
    "CUDA_ERROR_MISALIGNED_ADDRESS": f"a kernel read where no such value can lie, {_REPORT}",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": f"a kernel holds what this GPU cannot do, {_REPORT}",
    "CUDA_ERROR_LAUNCH_FAILED": f"a kernel failed, {_REPORT}",
    "CUDA_ERROR_LAUNCH_TIMEOUT": "a kernel took longer than the system allows a GPU that shows a screen; use another "
    "GPU with --device cuda:N, or --device cpu",
}


def explain(function: str, status: str) -> str:
    """One sentence on a failed driver call. status: name of the CUresult, such as "CUDA_ERROR_NO_DEVICE"."""
    return f"{function} failed with {status}: {_REASONS.get(status, 'check the GPU with `gqsa doctor`')}"


def explain_unavailable(function: str, error: Exception) -> str:
    """One sentence on a call that did not reach the driver, from the RuntimeError of cuda-bindings."""
    # The bindings look a function up in libcuda at its first call; an old driver lacks the newer ones.
    if "not found" in str(error) and "unction" in str(error):
        return f"the NVIDIA driver is too old: it has no {function}; update it to 525 or newer, or use --device cpu"
    return "no NVIDIA driver found (libcuda.so.1 cannot be loaded); install one, or use --device cpu"
