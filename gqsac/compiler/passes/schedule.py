"""Schedule: the launch plan of a family. Names the kernels, gives each its CUDA geometry, resolves arguments."""

from gqsa_runtime.operators import FEW_TOKENS
from gqsa_runtime.program import PHASES, Argument, Kernel, Plan, Step

from gqsac.compiler.cuda_launch import launches
from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from gqsac.compiler.passes.plan_memory import MemoryPlan
from gqsac.compiler.passes.specialize import Calls, ValueRef


def schedule(calls: Calls, memory: MemoryPlan, family: str) -> tuple[dict[str, KernelSpec], Plan]:
    """The kernels by name, and the plan that launches them. family: "cuda" or "cpu"."""
    names = name_kernels([call.spec for phase in PHASES for call in calls.phases[phase]])
    in_chunks = {call.spec for phase in PHASES if phase != "few_body" for call in calls.phases[phase]}

    def kernel(spec: KernelSpec, name: str) -> Kernel:
        most = memory.prefill_chunk if spec in in_chunks else min(FEW_TOKENS, memory.prefill_chunk)
        made = launches(spec, most) if family == "cuda" else {}
        return Kernel(name, spec.op, dict(spec.params), made)

    plan = Plan(
        prefill_chunk=memory.prefill_chunk,
        score_chunk=memory.score_chunk,
        buffers=memory.buffers,
        arena_bytes=memory.arena_bytes,
        kernels=tuple(kernel(spec, name) for spec, name in names.items()),
        phases={
            phase: tuple(Step(names[call.spec], tuple(map(_argument, call.args))) for call in calls.phases[phase])
            for phase in PHASES
        },
    )
    return {name: spec for spec, name in names.items()}, plan


def _argument(arg: ValueRef | Argument) -> Argument:
    if isinstance(arg, ValueRef):
        return Argument("buffer", arg.storage, arg.offset)
    return arg
