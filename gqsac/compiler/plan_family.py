"""The launch plan of one family of targets, from the graph and what is known of its weights."""

from gqsa_runtime.program import Plan

from gqsac.compiler import ir
from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.measure_linears import StoredParts
from gqsac.compiler.passes.pack import Packing
from gqsac.compiler.passes.plan_memory import plan_memory
from gqsac.compiler.passes.schedule import schedule
from gqsac.compiler.passes.specialize import specialize

# Family -> most tokens of a launch: what fills the tensor cores of a GPU; on a CPU, what a caller waits for at most.
PREFILL_CHUNK = {"cuda": 512, "cpu": 128}
# Tokens whose logits are held at once: 70 MB for a vocabulary of 128k.
SCORE_CHUNK = 128


def plan_family(
    graph: ir.Graph, packing: Packing, stored_parts: StoredParts, family: str, kv_dtype: str, exact: bool
) -> tuple[dict[str, KernelSpec], Plan]:
    """The kernels by name, and the plan that launches them. Parameters as of `specialize`."""
    # Operators become kernel calls; only then is it known what must be alive when.
    calls = specialize(graph, packing, stored_parts, family, kv_dtype, exact)
    memory = plan_memory(calls, PREFILL_CHUNK[family], SCORE_CHUNK)
    return schedule(calls, memory, family)
