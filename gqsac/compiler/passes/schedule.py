"""Schedule: the launch plan. Names the kernels, gives each its CUDA geometry, resolves arguments."""

from gqsa_runtime.program import PHASES, Argument, Buffer, Kernel, Step

from gqsac.compiler.cuda_launch import launch as cuda_launch
from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from gqsac.compiler.passes.plan_memory import MemoryPlan
from gqsac.compiler.passes.specialize import Launches, ValueRef


def schedule(
    launches: Launches, memory: MemoryPlan, prefill_chunk: int
) -> tuple[dict[str, KernelSpec], tuple[Kernel, ...], dict[str, tuple[Step, ...]], tuple[Buffer, ...]]:
    """Returns kernels by name, their table, the steps of each phase, and the buffers of the program."""
    names = name_kernels([launch.spec for phase in PHASES for launch in launches.phases[phase]])
    kernels = []
    for spec, name in names.items():
        grid, block, shared_bytes = cuda_launch(spec, prefill_chunk)
        kernels.append(Kernel(name, spec.op, dict(spec.params), grid, block, shared_bytes))
    phases = {
        phase: tuple(Step(names[launch.spec], tuple(map(_argument, launch.args))) for launch in launches.phases[phase])
        for phase in PHASES
    }
    return {name: spec for spec, name in names.items()}, tuple(kernels), phases, memory.buffers


def _argument(arg: ValueRef | Argument) -> Argument:
    if isinstance(arg, ValueRef):
        return Argument("buffer", arg.storage, arg.offset)
    return arg
