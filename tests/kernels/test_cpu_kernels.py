"""Every CPU kernel against its NumPy oracle, on each target that this machine runs."""

import ctypes

import pytest
from gqsa_runtime.device_cpu import _load_library, supported_targets

from gqsac.compiler.passes.compile_cpu import compile_cpu
from gqsac.compiler.passes.render import render
from tests.kernels.cases import CPU_CASES, KERNEL_NAMES

THREADS = 3  # more than a task count or a head count somewhere, and no divisor of most

pytestmark = pytest.mark.skipif(not supported_targets(), reason="this CPU runs no gqsac kernels")


@pytest.fixture(scope="module", params=supported_targets())
def library(request):
    sources = {KERNEL_NAMES[case.spec]: render("cpu", case.spec, KERNEL_NAMES[case.spec]) for case in CPU_CASES}
    return _load_library(compile_cpu(sources, request.param))


def run_kernel(library, name, arguments, n_threads):
    """Runs each thread's share in turn: shares must not depend on one another."""
    pointers = (ctypes.c_void_p * len(arguments))(*[None if a is None else a.ctypes.data for a in arguments])
    for thread in reversed(range(n_threads)):
        getattr(library, name)(pointers, ctypes.c_int(thread), ctypes.c_int(n_threads))


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def test_kernel_matches_its_oracle_for_any_number_of_threads(library, case):
    outputs = []
    for n_threads in (1, THREADS):
        problem = case.build()
        run_kernel(library, KERNEL_NAMES[case.spec], problem.arguments, n_threads)
        problem.check()
        outputs.append([None if a is None else a.tobytes() for a in problem.arguments])
    assert outputs[0] == outputs[1]
