"""Several tokens in one launch give the bits that a launch for each of them gives, on CUDA."""

import numpy as np
import pytest
from gqsa_runtime.engine import launch_state
from gqsa_runtime.operators import FUSED_TOKENS, OPERATORS

from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from tests.kernels import cuda_emulation
from tests.kernels.cases import CUDA_CASES

pytestmark = pytest.mark.skipif(not cuda_emulation.is_available(), reason="host emulation needs g++")


def _cases() -> list:
    """Of attention all, of linears one for each kind of weights, of norm and of epilogue."""
    kinds = {}
    for case in CUDA_CASES:
        params = dict(case.spec.params)
        if case.spec.op not in ("append_attention", "linear_records") or not 1 < params["tokens"] <= FUSED_TOKENS:
            continue
        asked = ("widths", "masked_widths", "epilogue", "norm")
        kinds.setdefault(case.name if "widths" not in params else tuple(params[name] for name in asked), case)
    return list(kinds.values())


CASES = _cases()


def _single(spec: KernelSpec) -> KernelSpec:
    return KernelSpec.make(spec.op, **{**dict(spec.params), "tokens": 1})


@pytest.fixture(scope="module")
def kernels(request):
    """As they are cut on sm_90."""
    specs = {spec: None for case in CASES for spec in (case.spec, _single(case.spec))}
    folder = request.config.cache.mkdir("cuda_emulation")
    macros = ("GQSA_WARP_GROUPS=1", "GQSA_SM_90=1")
    return cuda_emulation.EmulatedKernels(name_kernels(list(specs)), folder, macros, "sm_90")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_bits_as_one_by_one(kernels, case):
    together, alone = case.build(), case.build()
    kernels.run(case.spec, together.arguments, case.max_tokens)
    operands, params = OPERATORS[case.spec.op].operands, dict(case.spec.params)
    strides = {"x": "x_stride", "q": "q_stride", "k": "k_stride", "v": "v_stride"}
    strides |= {"residual": "residual_stride", "out": "out_stride"}
    for token, (slot, position) in enumerate(case.token_places()):
        arguments = [
            array[token * params[strides[operand.name]] :] if operand.name in strides and array is not None else array
            for operand, array in zip(operands, alone.arguments, strict=True)
        ]
        arguments[-1] = launch_state(case.context, slot, [position])
        kernels.run(_single(case.spec), arguments, 1)
    for operand, one, other in zip(operands, together.arguments, alone.arguments, strict=True):
        if operand.name in together.expected:
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8), err_msg=operand.name)
