"""Every kernel case: the rendered CUDA source, run on the CPU, against the oracle."""

import numpy as np
import pytest
from gqsa_runtime.engine import launch_state
from gqsa_runtime.operators import OPERATORS
from gqsa_runtime.program import Launch

from gqsac.compiler.cuda_launch import own_targets
from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes import render
from tests.kernels import cuda_emulation
from tests.kernels.cases import CUDA_CASES, CUDA_NAMES

pytestmark = pytest.mark.skipif(not cuda_emulation.is_available(), reason="host emulation needs g++")


@pytest.fixture(scope="module")
def kernels(request):
    return cuda_emulation.EmulatedKernels(CUDA_NAMES, request.config.cache.mkdir("cuda_emulation"))


@pytest.mark.parametrize("case", CUDA_CASES, ids=lambda case: case.name)
def test_kernel_matches_the_oracle(kernels, case):
    cuda_emulation.run_both_ways(kernels, case)


OWN_CASES = [case for case in CUDA_CASES if "sm_90" in own_targets(case.spec.op)]


@pytest.fixture(scope="module")
def kernels_of_sm_90(request):
    """Kernels that are cut in their own way there, matmuls as they are where four warps multiply together."""
    names = {case.spec: CUDA_NAMES[case.spec] for case in OWN_CASES}
    folder = request.config.cache.mkdir("cuda_emulation")
    return cuda_emulation.EmulatedKernels(names, folder, ("GQSA_WARP_GROUPS=1", "GQSA_SM_90=1"), "sm_90")


@pytest.mark.parametrize("case", OWN_CASES, ids=lambda case: case.name)
def test_a_cut_of_its_own_matches_the_oracle(kernels_of_sm_90, case):
    cuda_emulation.run_both_ways(kernels_of_sm_90, case)


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_a_few_tokens_attend_and_append_as_one_by_one(kernels, kv_dtype):
    case = next(case for case in CUDA_CASES if case.name == f"append_attention/{kv_dtype}_few_60_8")
    together, apart = case.build(), case.build()
    kernels.run(case.spec, together.arguments, case.max_tokens)
    params = {**dict(case.spec.params), "tokens": 1}
    names = [operand.name for operand in OPERATORS["append_attention"].operands]
    named = dict(zip(names, apart.arguments, strict=True))
    for token, (slot, position) in enumerate(case.token_places()):
        own = {name: named[name][token * params[f"{name}_stride"] :] for name in ("q", "k", "v", "out")}
        state = launch_state(case.context, slot, np.array([position]))
        kernels.run(KernelSpec.make("append_attention", **params), list({**named, **own, "state": state}.values()), 1)
    for name, one, other in zip(names, together.arguments, apart.arguments, strict=True):
        if name in ("out", "k_cache", "v_cache", "counters"):
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8), err_msg=name)


def test_every_operator_has_cases_of_both_variants():
    only_decode = ("last_row", "choose", "append_attention")
    only_several = ("halves", "matmul_records", "attention_halves")
    seen = {(case.spec.op, dict(case.spec.params).get("tokens", 1) > 1) for case in CUDA_CASES}
    assert seen >= {
        (op, tile)
        for op, operator in OPERATORS.items()
        for tile in (False, True)
        if "cuda" in operator.families and op not in (only_decode if tile else only_several)
    }


def _broken(monkeypatch, tmp_path, spec, old, new):
    """Kernels of one spec whose header text was changed: proof that the emulation notices."""
    case = next(case for case in CUDA_CASES if case.spec == spec)
    source = render.render("cuda", spec, "broken")
    for header, text in render.headers("cuda").items():
        if old in text:
            source = source.replace(f'#include "{header}"', "")
            source = text.replace(old, new).replace("#pragma once", "") + source
    assert new in source
    monkeypatch.setattr(cuda_emulation, "render", lambda target, spec, name: source)
    return cuda_emulation.EmulatedKernels({spec: "broken"}, tmp_path), case


def _spec(name) -> KernelSpec:
    return next(case.spec for case in CUDA_CASES if case.name == name)


def test_a_missing_barrier_is_noticed(monkeypatch, tmp_path):
    spec = _spec("linear_sparse/g16_k576_w4")
    old = "        Staged::stage(shared, x);\n        __syncthreads();"
    kernels, case = _broken(monkeypatch, tmp_path, spec, old, "        Staged::stage(shared, x); /* no barrier */")
    with pytest.raises(AssertionError):
        cuda_emulation.run_both_ways(kernels, case)


def test_a_divergent_shuffle_is_noticed(monkeypatch, tmp_path):
    spec = _spec("linear_dense/r37_k72")
    old, new = "if (first_row >= C::ROWS) return;", "if (row >= C::ROWS) return;"
    kernels, case = _broken(monkeypatch, tmp_path, spec, old, new)
    with pytest.raises(AssertionError, match="wait for others"):
        cuda_emulation.run_both_ways(kernels, case)


def test_a_write_past_the_output_is_noticed(monkeypatch, tmp_path):
    spec = _spec("gated_activation/silu_tile")
    old, new = "column < WIDTH;", "column < WIDTH + 1;"
    kernels, case = _broken(monkeypatch, tmp_path, spec, old, new)
    with pytest.raises(AssertionError, match="out"):
        cuda_emulation.run_both_ways(kernels, case)


def test_too_little_shared_memory_is_noticed(monkeypatch, tmp_path):
    spec = _spec("linear_sparse/g16_k576_w4")
    kernels = cuda_emulation.EmulatedKernels({spec: "kernel"}, tmp_path)
    case = next(case for case in CUDA_CASES if case.spec == spec)
    monkeypatch.setattr(cuda_emulation, "launch", lambda spec, max_tokens, target: Launch((2, 1, 1), 128, 576 * 4 - 16))
    with pytest.raises(AssertionError, match="shared memory"):
        kernels.run(spec, case.build().arguments, case.max_tokens)
