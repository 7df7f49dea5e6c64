"""What a long compression shows and measures: progress bars on a terminal, seconds and peak memory always."""

from __future__ import annotations

import contextlib
import time

import torch
from tqdm import tqdm


class Meter:
    """Seconds and peak memory of a stage, from its making on."""

    def __init__(self, device: torch.device):
        self._device, self._began = device, time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def facts(self) -> dict:
        """seconds, peak_gib (resident memory of the process so far), and peak_gpu_gib of this stage on a GPU."""
        facts = {"seconds": round(time.monotonic() - self._began, 2), "peak_gib": round(resident_gib(), 3)}
        if self._device.type == "cuda":
            facts["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated(self._device) / (1 << 30), 3)
        return facts

    def memory(self) -> str:
        """Peak memory in words."""
        facts = self.facts()
        gpu = f", GPU {facts['peak_gpu_gib']:.1f}" if "peak_gpu_gib" in facts else ""
        return f"peak {facts['peak_gib']:.1f}{gpu} GiB"


def resident_gib() -> float:
    """Peak resident memory of this process; NaN where the system does not tell."""
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


@contextlib.contextmanager
def block_bar(title: str, blocks: int, shown: bool, meter: Meter):
    """A bar over blocks; gives the function to call after each with its index and a note."""
    with tqdm(total=blocks, desc=title, unit="block", disable=None if shown else True) as bar:

        def on_block(index: int, note: str) -> None:
            bar.update()
            bar.set_postfix_str(", ".join(filter(None, (note, meter.memory()))))

        yield on_block


@contextlib.contextmanager
def step_bar(title: str, steps: int | None, shown: bool, meter: Meter):
    """A bar over a training; gives the function to call with step, loss and clock."""
    with tqdm(total=1000, desc=title, disable=None if shown else True, bar_format=_BAR) as bar:

        def on_read(step: int, loss: float, clock) -> None:
            bar.n = int(1000 * clock.fraction(step))
            left = clock.left_s(step)
            time_left = "" if left is None else f"{left:.0f} s left, "
            of = "" if steps is None else f"/{steps}"
            bar.set_postfix_str(f"step {step}{of}, loss {loss:.4f}, {time_left}{meter.memory()}")

        yield on_read


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
