"""What a build made, in numbers: for the closing lines of `gqsac build` and for the file itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gqsa_runtime.program import Program

from gqsac.compiler import ir
from gqsac.compiler.passes.compile import Compiled
from gqsac.compiler.passes.group_patterns import Patterns
from gqsac.compiler.passes.pack import Packing


@dataclass(frozen=True)
class KernelReport:
    """Per CUDA target: registers a thread, and bytes spilled, as the compiler reported them."""

    name: str
    registers: dict[str, int]
    spill_bytes: dict[str, int]


@dataclass(frozen=True)
class Summary:
    """Sizes in bytes, times in seconds. file_bytes is None for a dry run."""

    program: Program
    targets: tuple[str, ...]
    file_bytes: int | None
    weight_bytes: int
    n_launches: int
    n_kernels: int
    kernel_reports: tuple[KernelReport, ...]
    n_compiled: int
    n_cached: int
    seconds: float

    @classmethod
    def of_dry_run(cls, program: Program, packing: Packing, targets: tuple[str, ...], seconds: float) -> Summary:
        return cls._of(program, packing, [], targets, None, seconds)

    @classmethod
    def of_build(
        cls,
        program: Program,
        packing: Packing,
        compiled: list[Compiled],
        targets: tuple[str, ...],
        size: int,
        seconds: float,
    ) -> Summary:
        return cls._of(program, packing, compiled, targets, size, seconds)

    @classmethod
    def _of(cls, program, packing, compiled, targets, size, seconds) -> Summary:
        reports = []
        for kernel in program.kernels:
            mine = [item for item in compiled if item.kernel == kernel.name and item.target.startswith("sm_")]
            registers = {item.target: item.report["registers"] for item in mine}
            spills = {item.target: item.report["spill_bytes"] for item in mine}
            reports.append(KernelReport(kernel.name, registers, spills))
        return cls(
            program=program,
            targets=targets,
            file_bytes=size,
            weight_bytes=sum(tensor.size for tensor in packing.tensors),
            n_launches=sum(len(steps) for steps in program.phases.values()),
            n_kernels=len(program.kernels),
            kernel_reports=tuple(reports),
            n_compiled=sum(not item.cached for item in compiled),
            n_cached=sum(item.cached for item in compiled),
            seconds=seconds,
        )

    def memory_bytes(self, context: int) -> int:
        """Device memory of an open model: weights, activations, KV cache and rotary tables."""
        rope = sum(rope.rotary_dim * 4 for rope in self.program.ropes.values())
        return self.weight_bytes + self.program.arena_bytes + context * (self.program.kv_bytes_per_token() + rope)

    def as_dict(self) -> dict:
        """For --json."""
        context = self.default_context()
        return {
            "name": self.program.name,
            "model_class": self.program.model_class,
            "targets": list(self.targets),
            "file_bytes": self.file_bytes,
            "weight_bytes": self.weight_bytes,
            "kernels_unique": self.n_kernels,
            "kernels_total": self.n_launches,
            "kernels_compiled": self.n_compiled,
            "kernels_cached": self.n_cached,
            "memory_bytes": {str(context): self.memory_bytes(context)},
            "kernels": [asdict(report) for report in self.kernel_reports],
            "seconds": round(self.seconds, 2),
            **self.program.statistics,
        }

    def default_context(self) -> int:
        """The context that memory is reported for: what the runtime opens by default."""
        return min(self.program.max_context, 4096)

    def table(self) -> str:
        """The closing lines of a build, for people."""
        context = self.default_context()
        stats = self.program.statistics
        lines = [
            f"model      {self.program.name} ({self.program.model_class}), "
            f"{stats['parameters'] / 1e6:.1f} M parameters",
            f"weights    {self.weight_bytes / 1e6:.1f} MB; compressed linears {stats['bits_per_weight']:.2f} bits per "
            f"weight, {stats['sparsity']:.1%} of groups removed; "
            f"whole model {stats['bits_per_parameter']:.2f} bits per parameter",
            f"kernels    {self.n_kernels} unique in {self.n_launches} launches; {self.n_compiled} binaries compiled, "
            f"{self.n_cached} from the cache",
            f"memory     {self.memory_bytes(context) / 1e6:.0f} MB at context {context}",
        ]
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


def statistics(graph: ir.Graph, packing: Packing, patterns: Patterns) -> dict:
    """Counts that the file carries: parameters of the dense model, and what they take here."""
    sizes = {tensor.name: tensor.size for tensor in packing.tensors}
    dense_parameters = compressed_parameters = kept = compressed_bytes = 0
    for op in graph.ops:
        if not isinstance(op, ir.Linear):
            continue
        names, streams = packing.linears[op.output], patterns.streams[op.output]
        if streams:
            compressed_parameters += op.width * op.k
            kept += sum(stream.nnz * stream.group_size for stream in streams)
            for stream in names.streams:
                compressed_bytes += sum(sizes[name] for name in asdict(stream).values())
    for tensor in packing.tensors:
        if tensor.dtype == "f16" or (tensor.dtype == "f32" and not tensor.name.startswith("rope.")):
            dense_parameters += tensor.size // (2 if tensor.dtype == "f16" else 4)
    parameters = dense_parameters + compressed_parameters
    total_bytes = sum(sizes.values())
    return {
        "parameters": parameters,
        "compressed_parameters": compressed_parameters,
        "compressed_bytes": compressed_bytes,
        "bits_per_weight": 8 * compressed_bytes / compressed_parameters if compressed_parameters else 0.0,
        "bits_per_parameter": 8 * total_bytes / parameters,
        "sparsity": 1 - kept / compressed_parameters if compressed_parameters else 0.0,
        "pattern_clusters": patterns.n_clusters,
    }
