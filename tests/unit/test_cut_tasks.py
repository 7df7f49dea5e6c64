"""The cut of the work: equal tasks whatever the rows look like."""

import numpy as np
import pytest
from gqsa_runtime.layouts.group_words import cut_tasks


def crow(counts) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


@pytest.mark.parametrize("n_tasks", [1, 2, 7, 64])
@pytest.mark.parametrize(
    "counts",
    [
        np.full(64, 36),
        np.zeros(64, int),
        np.random.default_rng(0).integers(0, 72, 64),
        np.r_[np.full(8, 256), np.zeros(56, int)],
        np.r_[np.zeros(63, int), 5],
    ],
    ids=["even", "empty", "random", "skewed", "last row only"],
)
def test_tasks_cover_all_rows_in_order(counts, n_tasks):
    tasks = cut_tasks(crow(counts), n_tasks)
    assert tasks.dtype == np.int32 and len(tasks) == n_tasks + 1
    assert tasks[0] == 0 and tasks[-1] == len(counts)
    assert (np.diff(tasks) >= 0).all()


def test_no_task_is_a_straggler():
    """A task differs from the mean by at most one row's work, with a hundredfold skew of the rows."""
    counts = np.random.default_rng(1).zipf(1.5, 4096).clip(max=256)
    work = counts + 1
    tasks = cut_tasks(crow(counts), 256)
    per_task = np.add.reduceat(work, tasks[:-1][np.diff(tasks) > 0])
    assert per_task.max() <= work.sum() / 256 + work.max()


def test_even_rows_give_even_tasks():
    tasks = cut_tasks(crow(np.full(4096, 128)), 1024)
    assert (np.diff(tasks) == 4).all()
