"""Refuses, before any work, a compression for which the memory or the disk cannot be enough.

What is refused would have failed: needs.py makes lower bounds. What is not may still run out of memory, which
failures.py explains.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from gqsa_runtime.errors import DeviceError
from gqsa_runtime.memory import free_cpu_bytes

from gqsac.compress.disk import check_disk, stored_bytes
from gqsac.compress.needs import Free, ModelSize, Need, needs, states_bytes, states_in_memory
from gqsac.compress.options import Options
from gqsac.source import WEIGHTS

_SHORTEST = 128  # tokens of a sample, to which advice goes down


def check_memory(model, block_path: str, shapes, options: Options, device: torch.device, out: Path) -> None:
    """Raises DeviceError if a stage or the files surely need more than there is, with what would fit.

    model: uncompressed, and, if it is not large, held a second time. options: with seq_len and batch_tokens filled in.
    """
    size, free = ModelSize.of(model, block_path, shapes), free_memory(device)
    short = first_short(needs(size, options, device, free), free)
    if short is not None:
        raise DeviceError(f"{short}; {what_would_fit(size, options, device, free)}")
    states = 0 if states_in_memory(size, options, free) else states_bytes(size, options)
    check_disk(out, stored_bytes(size.compressed, size.parameters, options) + states)


def check_loading(src) -> None:
    """Raises DeviceError if a model folder or .gguf file is larger than the memory into which it is to be read."""
    path = Path(src)
    kinds = [[path]] if path.is_file() else [list(path.glob(pattern)) for pattern in WEIGHTS]
    size, ram = sum(file.stat().st_size for file in next(filter(None, kinds), [])), free_cpu_bytes()
    free = None if ram is None else ram + _free_swap_bytes()
    if free is not None and size > free:
        raise DeviceError(
            f"{src} has {_size(size)} of weights, and {_size(free)} of memory are free; use a machine with more "
            "memory, or a smaller model"
        )


def free_memory(device: torch.device) -> Free:
    """What this process can have now."""
    gpu = None
    if device.type == "cuda":  # torch keeps what earlier work in this process has freed
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        gpu = torch.cuda.mem_get_info(device)[0] + kept
    return Free(gpu, free_cpu_bytes(), _free_swap_bytes())


def _free_swap_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapFree:"))


def first_short(needed: list[Need], free: Free) -> str | None:
    """What the first stage that does not fit needs and what there is, in words, or None if all fit.

    Swap counts as memory: with it a run may be slow, but it does not fail.
    """
    for need in needed:
        ram = None if free.ram is None else free.ram + free.swap
        for wanted, what, there in ((need.gpu, "GPU memory", free.gpu), (need.ram, "memory", ram)):
            if there is not None and wanted > there:
                return f"{need.stage} needs at least {_size(wanted)} of {what}, and {_size(there)} are free"
    return None


def what_would_fit(size: ModelSize, options: Options, device: torch.device, free: Free) -> str:
    """Advice: single changes of the command with which every stage would fit by these figures."""

    def fits(changed: Options, where: torch.device = device) -> bool:
        there = replace(free, gpu=free.gpu if where.type == "cuda" else None)
        return first_short(needs(size, changed, where, there), there) is None

    found = []
    for name, least in (("batch_tokens", options.seq_len), ("seq_len", _SHORTEST), ("samples", 1)):
        value = getattr(options, name) // 2
        while value >= least and not fits(_with(options, name, value)):
            value //= 2
        if value >= least:
            found.append(f"--{name.replace('_', '-')} {value}")
    if options.master_dtype == "float32" and fits(replace(options, master_dtype="bfloat16")):
        found.append("--master-dtype bfloat16")
    if options.allocation == "global" and fits(replace(options, allocation="row")):
        found.append("--allocation row")
    stages = tuple(stage for stage in options.stages if stage != "distill") or ("one-shot",)
    if stages != options.stages and fits(replace(options, stages=stages)):
        found.append(f"no distill (--stages {','.join(stages)})")
    cpu = torch.device("cpu")
    if device.type == "cuda" and fits(options, cpu):
        found.append("--device cpu")
    if not found:
        return "no smaller batch or sample would fit; use a machine with more memory, or a smaller model"
    return f"what would fit: {' or '.join(found)}"


def _with(options: Options, name: str, value: int) -> Options:
    more = {"train_samples": min(value, options.train_samples)} if name == "samples" else {}
    return replace(options, **{name: value}, **more)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
