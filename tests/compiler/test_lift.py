"""What is read back from a plan: the graph that it was made from, and so the plan of the other family."""

import dataclasses

import pytest
from gqsa_runtime.program import Program

from gqsac.compiler.lift import plan_again
from gqsac.compiler.pipeline import BuildOptions, build
from gqsac.errors import FormatError
from gqsac.rounding import Rounding
from tests.e2e.checkpoints import save_checkpoint, save_multi_stream
from tests.format import tiny
from tests.unit.compress_models import save_model

OTHER = {"cpu": "cuda", "cuda": "cpu"}


def planned(model, rounding=None, **options) -> Program:
    """The plans of both families, as a file holds them."""
    targets = ("sm_90", "x86_64_v3")
    options = BuildOptions(targets=targets, rounding=rounding, dry_run=True, **options)
    return Program.from_json(build(model, None, options).program.to_json())


def check(program: Program, **recorded):
    for family, other in OTHER.items():
        alone = dataclasses.replace(program, plans={family: program.plans[family]})
        specs, plan = plan_again(alone, family, recorded)
        assert plan == program.plans[family]
        assert {name: spec.op for name, spec in specs.items()} == {kernel.name: kernel.op for kernel in plan.kernels}
        assert plan_again(alone, family, recorded, other)[1] == program.plans[other]


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_plans_of_either_family(tmp_path, name):
    model = save_model(tmp_path / name, name)
    check(planned(model, Rounding(4, 32, 0.0)))
    if name == "gemma3":
        check(planned(model, Rounding(4, 32, 0.0), exact=True), exact=True)


def test_fused_records_and_heads_of_16_bits(tmp_path):
    model = save_checkpoint(tmp_path / "model", "qwen2", intermediate_size=128)
    program = planned(model, Rounding(4, 64, 0.25), head_bits=16)
    fused = [kernel.params for kernel in program.plans["cpu"].kernels if kernel.op == "linear_records"]
    assert {params["epilogue"] for params in fused} == {"rows", "gated"} and any(p["norm"] == "rms" for p in fused)
    check(program)


def test_linears_of_several_streams(tmp_path):
    source = save_checkpoint(tmp_path / "source", "qwen2")
    program = planned(save_multi_stream(tmp_path / "mixed", source), exact=True)
    assert any(kernel.params.get("accumulate") for kernel in program.plans["cpu"].kernels)
    check(program, exact=True)


def edited(program: Program, **changes) -> Program:
    return dataclasses.replace(program, plans={"cpu": dataclasses.replace(program.plans["cpu"], **changes)})


def test_plans_that_this_compiler_does_not_make(tmp_path):
    program = planned(save_model(tmp_path / "model"), Rounding(4, 32, 0.0))
    plan = program.plans["cpu"]
    kernel = next(kernel for kernel in plan.kernels if "x_stride" in kernel.params)
    wider = dataclasses.replace(kernel, params={**kernel.params, "x_stride": kernel.params["x_stride"] + 1})
    kernels = tuple(wider if other is kernel else other for other in plan.kernels)
    cases = {
        f"kernel {kernel.name} would have another name, other constants": edited(program, kernels=kernels),
        "its buffers or steps would be others": edited(program, arena_bytes=plan.arena_bytes + 64),
        "steps would be": edited(program, phases={**plan.phases, "prefill_body": plan.phases["prefill_body"][:-1]}),
        "steps are not those of a model": edited(program, phases={**plan.phases, "decode": ()}),
        "by gqsac 'odd' as the file says, is not one": edited(program, phases=dict.fromkeys(plan.phases, ())),
    }
    for message, changed in cases.items():
        with pytest.raises(FormatError, match=message):
            plan_again(changed, "cpu", {"gqsac": "odd"})
    with pytest.raises(FormatError, match="plan for cpu.*so that none for cuda can be made from it"):
        plan_again(tiny.program(), "cpu", {}, "cuda")
