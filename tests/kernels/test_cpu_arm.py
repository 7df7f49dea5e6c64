"""Kernels for 64-bit Arm, emulated: each of those over records, and one of every other operator, against its oracle.

With dot products linear_records alone, which is all that they change.
"""

from functools import cache

import numpy as np
import pytest
from gqsa_runtime.device_cpu import supported_targets

from gqsac.compiler.passes.compile_cpu import compile_cpu
from gqsac.compiler.passes.render import render
from tests.kernels.arm_emulation import ArmLibrary, unicorn
from tests.kernels.cases import CPU_CASES, KERNEL_NAMES, cases_with_dots
from tests.kernels.test_cpu_records import PATTERNS, ROWS, outputs

_ALL_CASES_OF = ("linear_records", "embedding_records", "quantize")
_THREADS = 3


def _chosen() -> list:
    """Of operators beside those over records one case for each width, type of cache, one or several tokens, draw."""
    kinds: dict[tuple, object] = {}
    for case in CPU_CASES:
        params = dict(case.spec.params)
        kind = (case.spec.op, params.get("bits"), params.get("kv_dtype"), params.get("tokens") == 1, any(case.draw))
        kinds.setdefault((*kind, case.name) if case.spec.op in _ALL_CASES_OF else kind, case)
    return list(kinds.values())


CASES = {"aarch64": _chosen(), "aarch64_dotprod": cases_with_dots()}


def objects(target):
    """The kernels of a target's cases."""
    names = {KERNEL_NAMES[case.spec]: case.spec for case in CASES[target]}
    return compile_cpu({name: render("cpu", spec, name) for name, spec in names.items()}, target)


@pytest.fixture(scope="module")
def data():
    """data(target): its shared object, compiled once."""
    return cache(objects)


@pytest.fixture(scope="module")
def library(data):
    return cache(lambda target: ArmLibrary(data(target), dot_products=target == "aarch64_dotprod"))


@pytest.mark.parametrize(
    "target, case", [pytest.param(t, case, id=f"{t}-{case.name}") for t, cases in CASES.items() for case in cases]
)
def test_arm_kernel_matches_its_oracle(library, target, case):
    problem = case.build()
    library(target).run(KERNEL_NAMES[case.spec], problem.arguments, _THREADS)
    problem.check()


@pytest.mark.skipif(not supported_targets(), reason="this CPU runs no gqsac kernels to compare with")
@pytest.mark.parametrize("pattern, widths, k", PATTERNS)
def test_records_give_the_same_bits_as_on_this_machine(pattern, widths, k):
    widths = np.random.default_rng(1).choice(widths, ROWS)
    here = outputs(supported_targets()[0], widths, pattern, k)
    for target in CASES:

        def emulated(data, target=target):
            library = ArmLibrary(data, dot_products=target == "aarch64_dotprod")
            return lambda name, arguments: library.run(name, arguments, _THREADS)

        there = outputs(target, widths, pattern, k, emulated)
        assert [result.tobytes() for result in there] == [result.tobytes() for result in here], target


def test_dot_products_are_executed(data):
    """On a processor that does not know them every kernel stops, but for those of matrices without a group."""
    library = ArmLibrary(data("aarch64_dotprod"))
    for case in CASES["aarch64_dotprod"]:
        params = dict(case.spec.params)
        if params["widths"] or params["masked_widths"]:
            with pytest.raises(unicorn.UcError, match="UC_ERR_EXCEPTION"):
                library.run(KERNEL_NAMES[case.spec], case.build().arguments, 1)


def test_an_access_beside_the_arguments_is_an_error():
    source = """
    #define EXPORT __attribute__((visibility("default")))
    EXPORT void beside(void *const *args, int share, int n_shares) {
        (void)share, (void)n_shares;
        ((volatile float *)args[0])[16] = 1;
    }
    """
    library = ArmLibrary(compile_cpu({"beside": source}, "aarch64"))
    longer, shorter = np.zeros(17, np.float32), np.zeros(16, np.float32)
    library.run("beside", [longer], 1)
    assert longer[16] == 1
    with pytest.raises(unicorn.UcError, match="UC_ERR_WRITE_UNMAPPED"):
        library.run("beside", [shorter], 1)
