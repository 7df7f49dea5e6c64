"""What a long compression shows and measures: progress bars on a terminal, and in a log a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time

import torch
from tqdm import tqdm

_LINE_EVERY_S = 60.0  # at most so often in a log


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


class _Log:
    """Lines on stderr, where a bar is wanted and stderr is no terminal."""

    def __init__(self, title: str, bar: tqdm, shown: bool):
        self._title, self._on = title, shown and bar.disable
        self.began = self._last = time.monotonic()

    def line(self, text: str) -> None:
        now = time.monotonic()
        if self._on and now - self._last >= _LINE_EVERY_S:
            self._last = now
            print(f"{self._title}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def block_bar(title: str, blocks: int, shown: bool, meter: Meter):
    """A bar over blocks; gives the function to call after each with its index and a note."""
    with tqdm(total=blocks, desc=title, unit="block", disable=None if shown else True) as bar:
        log = _Log(title, bar, shown)

        def on_block(index: int, note: str) -> None:
            bar.update()
            noted = ", ".join(filter(None, (note, meter.memory())))
            bar.set_postfix_str(noted)
            each = (time.monotonic() - log.began) / (index + 1)
            log.line(f"block {index + 1}/{blocks}, {each * (blocks - index - 1):.0f} s left, {noted}")

        yield on_block


@contextlib.contextmanager
def count_bar(title: str, total: int, unit: str, shown: bool, meter: Meter):
    """A bar over things of a kind; gives the function to call with how many more are done."""
    with tqdm(total=total, desc=title, unit=unit, unit_scale=True, disable=None if shown else True) as bar:
        log, done = _Log(title, bar, shown), 0

        def on_count(more: int) -> None:
            nonlocal done
            done += more
            bar.update(more)
            left_s = (time.monotonic() - log.began) / done * (total - done)
            log.line(f"{done:,} of {total:,} {unit}s, {left_s:.0f} s left, {meter.memory()}")

        yield on_count


@contextlib.contextmanager
def step_bar(title: str, steps: int | None, shown: bool, meter: Meter):
    """A bar over a training; gives the function to call with step, loss and clock."""
    with tqdm(total=1000, desc=title, disable=None if shown else True, bar_format=_BAR) as bar:
        log = _Log(title, bar, shown)

        def on_read(step: int, loss: float, clock) -> None:
            bar.n = int(1000 * clock.fraction(step))
            left = clock.left_s(step)
            time_left = "" if left is None else f"{left:.0f} s left, "
            of = "" if steps is None else f"/{steps}"
            noted = f"step {step}{of}, loss {loss:.4f}, {time_left}{meter.memory()}"
            bar.set_postfix_str(noted)
            log.line(noted)

        yield on_read


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
