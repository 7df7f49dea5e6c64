"""Kernels for 64-bit Arm, emulated: each of those over records, and one of every other operator, against its oracle."""

import numpy as np
import pytest
from gqsa_runtime.device_cpu import supported_targets

from gqsac.compiler.passes.compile_cpu import compile_cpu
from gqsac.compiler.passes.render import render
from tests.kernels.arm_emulation import ArmLibrary, unicorn
from tests.kernels.cases import CPU_CASES, KERNEL_NAMES
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


CASES = _chosen()


@pytest.fixture(scope="module")
def library():
    sources = {KERNEL_NAMES[case.spec]: render("cpu", case.spec, KERNEL_NAMES[case.spec]) for case in CASES}
    return ArmLibrary(compile_cpu(sources, "aarch64"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_arm_kernel_matches_its_oracle(library, case):
    problem = case.build()
    library.run(KERNEL_NAMES[case.spec], problem.arguments, _THREADS)
    problem.check()


@pytest.mark.skipif(not supported_targets(), reason="this CPU runs no gqsac kernels to compare with")
@pytest.mark.parametrize("pattern, widths, k", PATTERNS)
def test_records_give_the_same_bits_as_on_this_machine(pattern, widths, k):
    def emulated(data):
        library = ArmLibrary(data)
        return lambda name, arguments: library.run(name, arguments, _THREADS)

    widths = np.random.default_rng(1).choice(widths, ROWS)
    here = outputs(supported_targets()[0], widths, pattern, k)
    there = outputs("aarch64", widths, pattern, k, emulated)
    assert [result.tobytes() for result in there] == [result.tobytes() for result in here]


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
