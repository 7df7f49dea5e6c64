"""Progress bars of a build, on a terminal only."""

import sys

from tqdm import tqdm

_UNITS = {"compile": ("kernels", False), "write": ("B", True)}


class BuildProgress:
    """Callable as (stage, done, total). One bar per stage, with rate and time left."""

    def __init__(self):
        self._bar: tqdm | None = None
        self._stage = ""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in _UNITS:
            return
        if stage != self._stage:
            self.__exit__()
            unit, scaled = _UNITS[stage]
            self._bar = tqdm(
                total=total, desc=stage, unit=unit, unit_scale=scaled, file=sys.stderr,
                disable=not sys.stderr.isatty(), leave=False,
            )  # fmt: skip
            self._stage = stage
        self._bar.update(done - self._bar.n)
