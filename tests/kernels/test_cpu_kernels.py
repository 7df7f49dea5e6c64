"""Every CPU kernel against its NumPy oracle, on each target that this machine runs."""

import ctypes
from functools import cache

import pytest
from gqsa_runtime.device_cpu import _load_library, supported_targets

from gqsac.compiler.passes.compile_cpu import compile_cpu
from gqsac.compiler.passes.render import render
from tests.kernels.cases import CPU_CASES, KERNEL_NAMES, cases_with_dots

THREADS = 3  # more than a task count or a head count somewhere, and no divisor of most

pytestmark = pytest.mark.skipif(not supported_targets(), reason="this CPU runs no gqsac kernels")


def cases_of(target):
    return cases_with_dots() if target.endswith("_vnni") else CPU_CASES


@pytest.fixture(scope="module")
def library():
    """library(target): the kernels of all of its cases, compiled once."""

    @cache
    def load(target):
        cases = cases_of(target)
        sources = {KERNEL_NAMES[case.spec]: render("cpu", case.spec, KERNEL_NAMES[case.spec]) for case in cases}
        return _load_library(compile_cpu(sources, target))

    return load


def run_kernel(library, name, arguments, n_threads):
    """Runs each thread's share in turn: shares must not depend on one another."""
    pointers = (ctypes.c_void_p * len(arguments))(*[None if a is None else a.ctypes.data for a in arguments])
    for thread in reversed(range(n_threads)):
        getattr(library, name)(pointers, ctypes.c_int(thread), ctypes.c_int(n_threads))


@pytest.mark.parametrize(
    "target, case",
    [pytest.param(t, case, id=f"{t}-{case.name}") for t in supported_targets() for case in cases_of(t)],
)
def test_kernel_matches_its_oracle_for_any_number_of_threads(library, target, case):
    outputs = []
    for n_threads in (1, THREADS):
        problem = case.build()
        run_kernel(library(target), KERNEL_NAMES[case.spec], problem.arguments, n_threads)
        problem.check()
        outputs.append([None if a is None else a.tobytes() for a in problem.arguments])
    assert outputs[0] == outputs[1]
