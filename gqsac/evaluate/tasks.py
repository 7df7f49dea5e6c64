"""Zero-shot accuracy of a model over local task files, through the lm-eval harness."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gqsa_runtime.errors import DeviceError

from gqsac.evaluate.scoring import Scorer
from gqsac.evaluate.task_data import TASKS, read_rows


@dataclass(frozen=True)
class TaskResult:
    """Accuracies as shares of 1 with their standard errors, which are None for a single row.

    acc: the choice with the highest log-probability is right. acc_norm: the same with log-probabilities divided
    by the choices' lengths in characters; None where it means nothing (WinoGrande). n_truncated: requests whose
    context was longer than the model's and lost its beginning.
    """

    task: str
    n_rows: int
    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    n_truncated: int
    seconds: float


def check_harness() -> str:
    """The version of the installed harness. Raises DeviceError that says how to install it."""
    try:
        import lm_eval.api.model  # noqa: F401
        from lm_eval import __version__
    except ImportError as error:
        raise DeviceError(
            f"zero-shot tasks need the lm-eval harness, which cannot be imported ({error}); "
            'install it with pip install "gqsac[eval]"'
        ) from None
    return __version__


def load_tasks(names: Sequence[str], folder: str | Path, limit: int | None = None) -> dict[str, list[dict]]:
    """Task -> its rows, for the names given (all known ones for none), each once. Raises InputError."""
    return {name: read_rows(name, folder, limit) for name in dict.fromkeys(names or TASKS)}


def evaluate_task(scorer: Scorer, name: str, rows: list[dict], progress: Callable | None = None) -> TaskResult:
    """Accuracy over rows of `task_data.read_rows`. progress: wraps lists of work, as `tqdm.tqdm` does.

    Raises DeviceError where the harness is missing, and whatever the scorer raises.
    """
    check_harness()
    from gqsac.evaluate.harness import HarnessModel, run_task

    began_s = time.perf_counter()
    model = HarnessModel(scorer, progress)
    metrics, _ = run_task(model, name, rows)
    values = [metrics.get(key) for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")]
    seconds = time.perf_counter() - began_s
    return TaskResult(name, len(rows), *values, model.encoder.n_truncated, seconds)


def render(results: Sequence[TaskResult]) -> str:
    """Results as aligned lines, in percent."""
    rows = [("task", "rows", "acc", "acc_norm")]
    rows += [
        (r.task, str(r.n_rows), _percent(r.acc, r.acc_stderr), _percent(r.acc_norm, r.acc_norm_stderr)) for r in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _percent(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"
