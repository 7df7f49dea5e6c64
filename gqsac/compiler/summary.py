"""What a build made, in numbers: for the closing lines of `gqsac build` and for the file itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gqsa_runtime import memory
from gqsa_runtime.load import DEFAULT_CONTEXT
from gqsa_runtime.program import DTYPE_BYTES, Program

from gqsac.compiler import ir
from gqsac.compiler.passes.choose_layouts import Weights
from gqsac.compiler.passes.compile import Compiled
from gqsac.compiler.passes.measure_linears import StoredParts
from gqsac.compiler.passes.pack import Packing


@dataclass(frozen=True)
class KernelReport:
    """Per CUDA target: registers a thread, and bytes spilled, as the compiler reported them."""

    name: str
    registers: dict[str, int]
    spill_bytes: dict[str, int]


@dataclass(frozen=True)
class ByteCounts:
    """Where the bytes are. compressed_*: of the group-sparse linears, parameters as in the dense model.

    weight_bytes: of all tensors. sparsity: share of groups removed. n_clusters: linears that share
    their constants count as one.
    """

    parameters: int
    weight_bytes: int
    compressed_parameters: int
    compressed_bytes: int
    sparsity: float
    n_clusters: int

    @property
    def bits_per_weight(self) -> float:
        """Of the compressed linears, all of scales, zeros and indices counted."""
        return 8 * self.compressed_bytes / self.compressed_parameters if self.compressed_parameters else 0.0

    @property
    def bits_per_parameter(self) -> float:
        """Of the whole model, embeddings and head counted."""
        return 8 * self.weight_bytes / self.parameters


@dataclass(frozen=True)
class Summary:
    """Sizes in bytes, times in seconds. file_bytes is None for a dry run.

    memory_bytes: of an open model at the default context, for each family of targets: weights, activations, KV
    cache and rotary tables.
    """

    program: Program
    counts: ByteCounts
    targets: tuple[str, ...]
    file_bytes: int | None
    memory_bytes: dict[str, int]
    kernel_reports: tuple[KernelReport, ...]
    n_compiled: int
    n_cached: int
    seconds: float

    @classmethod
    def make(
        cls,
        program: Program,
        counts: ByteCounts,
        packing: Packing,
        compiled: list[Compiled],
        targets: tuple[str, ...],
        file_bytes: int | None,
        seconds: float,
        context: int | None = None,
    ) -> Summary:
        """Of a build, or of a dry run that compiled nothing. context: for memory_bytes, if not the default."""
        reports = []
        for kernel in program.plans["cuda"].kernels if "cuda" in program.plans else ():
            mine = [item for item in compiled if item.kernel == kernel.name and item.target.startswith("sm_")]
            registers = {item.target: item.report["registers"] for item in mine}
            spills = {item.target: item.report["spill_bytes"] for item in mine}
            reports.append(KernelReport(kernel.name, registers, spills))
        tensors = {tensor.name: tensor for tensor in packing.tensors}
        context = context or default_context(program)
        return cls(
            program=program,
            counts=counts,
            targets=targets,
            file_bytes=file_bytes,
            memory_bytes={f: memory.needed_bytes(program, tensors, f, context) for f in program.plans},
            kernel_reports=tuple(reports),
            n_compiled=sum(not item.cached for item in compiled),
            n_cached=sum(item.cached for item in compiled),
            seconds=seconds,
        )

    def as_dict(self) -> dict:
        """For --json."""
        return {
            "name": self.program.name,
            "model_class": self.program.model_class,
            "targets": list(self.targets),
            "file_bytes": self.file_bytes,
            "bits_per_weight": self.counts.bits_per_weight,
            "bits_per_parameter": self.counts.bits_per_parameter,
            "plans": {
                family: {
                    "kernels_unique": len(plan.kernels),
                    "kernels_total": len(list(plan.steps())),
                    "memory_bytes": {str(default_context(self.program)): self.memory_bytes[family]},
                }
                for family, plan in self.program.plans.items()
            },
            "kernels_compiled": self.n_compiled,
            "kernels_cached": self.n_cached,
            "kernels": [asdict(report) for report in self.kernel_reports],
            "seconds": round(self.seconds, 2),
            **asdict(self.counts),
        }

    def table(self) -> str:
        """The closing lines of a build, for people."""
        context = default_context(self.program)
        counts = self.counts
        lines = [
            f"model      {self.program.name} ({self.program.model_class}), {counts.parameters / 1e6:.1f} M parameters",
            f"weights    {counts.weight_bytes / 1e6:.1f} MB; compressed linears {counts.bits_per_weight:.2f} bits per "
            f"weight, {counts.sparsity:.1%} of groups removed; "
            f"whole model {counts.bits_per_parameter:.2f} bits per parameter",
        ]
        for family, plan in self.program.plans.items():
            lines.append(
                f"{family:<10} {len(plan.kernels)} kernels in {len(list(plan.steps()))} launches; "
                f"{self.memory_bytes[family] / 1e6:.0f} MB of memory at context {context}"
            )
        lines.append(f"kernels    {self.n_compiled} binaries compiled, {self.n_cached} from the cache")
        if self.file_bytes is not None:
            lines.append(f"file       {self.file_bytes / 1e6:.1f} MB, for {', '.join(self.targets)}")
        lines.append(f"time       {self.seconds:.1f} s")
        return "\n".join(lines)

    def kernel_table(self) -> str:
        """Registers a thread per kernel and architecture; spilled bytes in parentheses."""
        targets = [target for target in self.targets if target.startswith("sm_")]
        if not targets or not any(report.registers for report in self.kernel_reports):
            return ""
        name_width = max(len(report.name) for report in self.kernel_reports)
        lines = ["registers (spilled bytes)".ljust(name_width) + "".join(f"{target:>9}" for target in targets)]
        for report in self.kernel_reports:
            cells = []
            for target in targets:
                spill = report.spill_bytes.get(target, 0)
                cells.append(f"{report.registers.get(target, 0)}{f' ({spill})' if spill else ''}")
            lines.append(report.name.ljust(name_width) + "".join(f"{cell:>9}" for cell in cells))
        return "\n".join(lines)


def default_context(program: Program) -> int:
    """The context that memory is reported for: what the runtime opens by default."""
    return min(program.max_context, DEFAULT_CONTEXT)


def count_bytes(graph: ir.Graph, packing: Packing, stored_parts: StoredParts, weights: Weights) -> ByteCounts:
    """Counts parameters of the dense model, and the bytes that they take in the file."""
    sizes = {tensor.name: tensor.size for tensor in packing.tensors}
    compressed_parameters = kept = compressed_bytes = 0
    matrices: dict[tuple[str, ...], int] = {}  # stored names -> elements: tied ones once
    for op in graph.ops:
        if isinstance(op, ir.Embedding):
            matrices[(weights.stored(op.table),)] = op.rows * op.width
        if not isinstance(op, ir.Linear):
            continue
        matrices[tuple(map(weights.stored, op.weights))] = op.n_rows * op.k
        if not weights.is_compressed(op.weights[0]):
            continue
        parts, params = stored_parts.linears[op.output], {"rows": op.n_rows, "k": op.k}
        compressed_parameters += op.n_rows * op.k
        kept += sum(part.layout.n_weights({**params, **part.constants}, part.nnz) for part in parts)
        compressed_bytes += sum(sizes[name] for names in packing.linears[op.output].parts for name in names)
    vectors = [t for t in packing.tensors if t.dtype == "f32" and not t.name.startswith("rope.")]
    return ByteCounts(
        parameters=sum(matrices.values()) + sum(t.size // DTYPE_BYTES[t.dtype] for t in vectors),
        weight_bytes=sum(sizes.values()),
        compressed_parameters=compressed_parameters,
        compressed_bytes=compressed_bytes,
        sparsity=1 - kept / compressed_parameters if compressed_parameters else 0.0,
        n_clusters=stored_parts.n_clusters,
    )
