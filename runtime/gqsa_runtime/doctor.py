"""Looks at this machine: what a .gqsa file can run on here, and what to install where something is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from gqsa_runtime import __version__, device_cpu, device_cuda, memory
from gqsa_runtime.check import Check, check_file
from gqsa_runtime.errors import DeviceError
from gqsa_runtime.memory import ContextCost

_PACKAGES = ("numpy", "cuda-bindings", "tokenizers", "jinja2", "click", "tqdm")


@dataclass(frozen=True)
class Finding:
    """One line of the report. fix: a command or an advice, None where all is well."""

    subject: str
    found: str
    fix: str | None = None


def examine() -> list[Finding]:
    """Everything worth knowing, in the order of the report. Raises nothing for what is missing."""
    return [_python(), Finding("gqsa-runtime", __version__), *versions(_PACKAGES), _cpu(), _ram(), *_gpus()]


def examine_file(path: str, require_signature: str | None = None, signature: str | None = None) -> list[Finding]:
    """Of a .gqsa file: where it runs here, and what it needs at which context beside the memory that is free.

    require_signature, signature: as in `Model.open`. Raises FormatError, SignatureError and InputError for the file.
    """
    return file_findings(check_file(path, require_signature=require_signature, signature=signature))


def file_findings(check: Check) -> list[Finding]:
    """The same of a file that was checked: each device that has a plan, or was asked for by its name."""
    findings = []
    for device in check.devices:
        if not device.costs and len(check.devices) > 1:
            continue
        free = device.free_bytes
        known = "" if free is None else f"; {max(free, 0) / 1e9:.2f} GB can be used"
        found, fix = (f"{device.reason}{known}", None) if device.usable else ("cannot run it", device.reason)
        findings.append(Finding(f"{device.device} for it", found, fix))
        findings += [_cost(device.device, cost, free) for cost in device.costs]
    return findings


def _cost(device: str, cost: ContextCost, free: int | None) -> Finding:
    parts = f"weights {cost.weights / 1e9:.2f}, kv cache {cost.kv_cache / 1e9:.2f}, scratch {cost.scratch / 1e9:.2f}"
    fits = "" if free is None else "; fits" if cost.total <= free else "; does not fit"
    return Finding(f"{device}, {cost.context:,} tokens", f"{cost.total / 1e9:.2f} GB: {parts}{fits}")


def render(findings: list[Finding]) -> str:
    """The findings as lines: a subject, what was found, and below it what would fix it."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.subject:<{width}}  {finding.found}")
        if finding.fix:
            lines.append(f"{'':<{width}}  -> {finding.fix}")
    return "\n".join(lines)


def _python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}"
    return Finding("python", found, None if sys.version_info >= (3, 10) else "install Python 3.10 or newer")


def versions(names: Sequence[str]) -> list[Finding]:
    """The installed version of each distribution, or how to install it."""
    findings = []
    for name in names:
        try:
            findings.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed", f"pip install {name}"))
    return findings


def _cpu() -> Finding:
    targets = device_cpu.supported_targets()
    threads = device_cpu.default_threads()
    if targets:
        return Finding("cpu", f"{threads} threads; runs the targets {', '.join(targets)}, best first")
    return Finding(
        "cpu",
        f"{threads} threads; runs no CPU target",
        "use a GPU, or Linux on x86-64 with AVX2 or on 64-bit Arm",
    )


def _ram() -> Finding:
    free = memory.free_cpu_bytes()
    return Finding("memory", "unknown" if free is None else f"{free / 1e9:.1f} GB free")


def _gpus() -> list[Finding]:
    try:
        device_cuda.call("cuInit", 0)
        count = device_cuda.call("cuDeviceGetCount")
        version = device_cuda.call("cuDriverGetVersion")
    except DeviceError as error:
        return [Finding("gpu", "none usable; CPU targets still run", str(error))]
    findings = [Finding("cuda driver", f"CUDA {version // 1000}.{version % 1000 // 10}", _old_driver(version))]
    if not count:
        findings.append(Finding("gpu", "the driver finds none", "check `nvidia-smi` and CUDA_VISIBLE_DEVICES"))
    for ordinal in range(count):
        gpu = device_cuda.Gpu(ordinal)
        installed = device_cuda.call("cuDeviceTotalMem", gpu.device)
        findings.append(
            Finding(
                f"gpu {ordinal}",
                f"{gpu.name}, {installed / 1e9:.1f} GB, {gpu.arch}; runs the targets {gpu.arch} and older "
                f"sm_{gpu.major}x, and PTX up to compute_{gpu.major}{gpu.minor}",
                None if gpu.major >= 8 else "gqsac makes kernels for sm_80 (Ampere) and newer: use --device cpu",
            )
        )
    return findings


def _old_driver(version: int) -> str | None:
    return "update the NVIDIA driver to 525 or newer" if version < 12000 else None
