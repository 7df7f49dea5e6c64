"""Every kernel case on a real GPU, from its cubin and from PTX, against the oracle."""

import numpy as np
import pytest

from tests.gpu.cuda_device import Gpu, GpuKernels
from tests.kernels.cases import CUDA_CASES, CUDA_NAMES

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu():
    try:
        return Gpu()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no NVIDIA GPU: {error}")


@pytest.fixture(scope="module", params=["cubin", "ptx"])
def kernels(gpu, request):
    return GpuKernels(gpu, CUDA_NAMES, gpu.target if request.param == "cubin" else "compute_80")


@pytest.mark.parametrize("case", CUDA_CASES, ids=lambda case: case.name)
def test_kernel_matches_the_oracle(kernels, case):
    problem, again = case.build(), case.build()
    kernels.run(problem, case.max_tokens)
    problem.check()
    kernels.run(again, case.max_tokens)
    for one, other in zip(problem.arguments, again.arguments, strict=True):
        if one is not None:
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8), err_msg="not the same bits again")
