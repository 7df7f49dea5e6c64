"""Schedule: the launch plan of a family. Names the kernels, gives each its CUDA geometry, resolves arguments."""

from collections.abc import Mapping

from gqsa_runtime.operators import FEW_TOKENS
from gqsa_runtime.program import PHASES, Argument, Kernel, Plan, Step

from gqsac.compiler.cuda_launch import launches
from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from gqsac.compiler.passes.plan_memory import MemoryPlan
from gqsac.compiler.passes.specialize import Calls, ValueRef


def schedule(calls: Calls, memory: MemoryPlan, family: str) -> tuple[dict[str, KernelSpec], Plan]:
    """The kernels by name, and the plan that launches them. family: "cuda" or "cpu"."""
    names = name_kernels([call.spec for phase in PHASES for call in calls.phases[phase]])
    used = {phase: {call.spec for call in calls.phases[phase]} for phase in PHASES}
    plan = Plan(
        prefill_chunk=memory.prefill_chunk,
        score_chunk=memory.score_chunk,
        buffers=memory.buffers,
        arena_bytes=memory.arena_bytes,
        kernels=kernels(names, used, memory.prefill_chunk, family),
        phases={
            phase: tuple(Step(names[call.spec], tuple(map(_argument, call.args))) for call in calls.phases[phase])
            for phase in PHASES
        },
    )
    return {name: spec for spec, name in names.items()}, plan


def kernels(
    names: Mapping[KernelSpec, str], used: Mapping[str, set[KernelSpec]], prefill_chunk: int, family: str
) -> tuple[Kernel, ...]:
    """Kernels as a plan of a family holds them, for CUDA with their launches over all tokens that they may meet.

    used: the kernels of each phase.
    """
    in_chunks = set().union(*(specs for phase, specs in used.items() if phase != "few_body"))

    def kernel(spec: KernelSpec, name: str) -> Kernel:
        most = prefill_chunk if spec in in_chunks else min(FEW_TOKENS, prefill_chunk)
        return Kernel(name, spec.op, dict(spec.params), launches(spec, most) if family == "cuda" else {})

    return tuple(kernel(spec, name) for spec, name in names.items())


def _argument(arg: ValueRef | Argument) -> Argument:
    if isinstance(arg, ValueRef):
        return Argument("buffer", arg.storage, arg.offset)
    return arg
