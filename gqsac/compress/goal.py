"""What a compression is to fit into, in bytes: the whole built file, or the memory of a run.

Both count all that `gqsac build` makes of the model: the compiler plans the file, and for its size compiles the kernels
(which the build then finds in its cache), before there are any weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gqsa_runtime.errors import InputError
from gqsa_runtime.load import DEFAULT_CONTEXT

from gqsac.build_progress import BuildProgress
from gqsac.checkpoint import Checkpoint
from gqsac.codec import MatrixHeader
from gqsac.compiler.passes.compile import check_targets, default_targets, families
from gqsac.compiler.pipeline import BuildOptions, planned_summary
from gqsac.compress.options import Options
from gqsac.compress.store import dense_names
from gqsac.locks import scratch_folder
from gqsac.quantization_config import QuantizationConfig
from gqsac.source import Source


class PlannedCheckpoint(Checkpoint):
    """The checkpoint that a compression will write: all but the contents of its tensors."""

    def __init__(self, folder: Path, goal: Goal, row_bits: dict[str, np.ndarray]):
        """folder: where the tokenizer's files are put. row_bits: path -> uint8 [rows]."""
        source, options = goal.source, goal.options
        for name, content in source.files.items():
            (folder / name).write_bytes(content)
        # What a Checkpoint reads from files' headers.
        self.path, self.config = folder, source.config
        sizes = options.group_size, options.quant_group_size
        self.quantization = QuantizationConfig(
            bits=0, group_size=sizes[0], sparsity=0.0, quant_group_size=sizes[1], shapes=goal.shapes,
            details={"name": source.name},
        )  # fmt: skip
        self._row_bits, self._dense = row_bits, goal.dense
        self._headers = {}
        for path, (rows, columns) in goal.shapes.items():
            widths = tuple(np.unique(row_bits[path]).tolist())
            self._headers[path] = MatrixHeader(rows, columns, *sizes, widths, rows * columns // sizes[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """See Checkpoint."""
        if name not in self._dense:
            return super().shape(name)
        return self._dense[name]

    def pattern(self, module: str) -> tuple[np.ndarray, None]:
        """See Checkpoint."""
        return self._row_bits[module], None

    @property
    def _tensors(self) -> dict:  # so that what is missing is refused as of a file
        return {}


@dataclass(frozen=True)
class Goal:
    """most: bytes that are to be met, of the built file, or of the memory that a run needs at `context` positions.

    dense: name -> shape of every tensor that is not compressed. targets: of the build.
    """

    most: int
    of_file: bool
    context: int
    targets: tuple[str, ...]
    source: Source
    shapes: dict[str, tuple[int, int]]
    dense: dict[str, tuple[int, ...]]
    options: Options
    shown: bool

    @classmethod
    def of(cls, source: Source, shapes: dict[str, tuple[int, int]], options: Options, shown: bool) -> Goal | None:
        """What the options ask for; None if it is no number of bytes. shown: progress on a terminal.

        Raises InputError for a context beyond the model's, or an unknown target.
        """
        of_file = options.target_size is not None
        if not of_file and options.target_memory is None:
            return None
        targets = check_targets(options.targets) if options.targets else default_targets()
        state, names = source.model.state_dict(), dense_names(source.model)
        dense = {name: tuple(state[name].shape) for name in names if name.removesuffix(".weight") not in shapes}
        most = options.target_size if of_file else options.target_memory
        source = replace(source, model=None)  # the weights come and go
        goal = cls(most, of_file, 0, targets, source, shapes, dense, options, shown)
        longest = goal._summary({path: np.full(rows, 8, np.uint8) for path, (rows, _) in shapes.items()}, True).program
        context = options.context or min(longest.max_context, DEFAULT_CONTEXT)
        if context > longest.max_context:
            raise InputError(
                f"the context is {context} tokens, and this model's positions allow 1 to {longest.max_context}; choose "
                "a smaller --context"
            )
        return replace(goal, context=context)

    def n_bytes(self, row_bits: dict[str, np.ndarray]) -> int:
        """What rows of these widths take. row_bits: path -> uint8 [rows]."""
        summary = self._summary(row_bits, not self.of_file)
        return summary.file_bytes if self.of_file else max(summary.memory_bytes.values())

    def _summary(self, row_bits: dict[str, np.ndarray], dry_run: bool):
        options = BuildOptions(targets=self.targets, dry_run=dry_run)
        with scratch_folder("gqsac-build-") as folder, BuildProgress() as progress:
            checkpoint = PlannedCheckpoint(folder, self, row_bits)
            shown = {"progress": progress} if self.shown else {}
            return planned_summary(checkpoint, options, self.context or None, **shown)

    @property
    def words(self) -> str:
        """What is counted."""
        if self.of_file:
            return f"the file that `gqsac build` writes for {', '.join(self.targets)}"
        of = {"cpu": "a CPU", "cuda": "a GPU"}
        where = " or ".join(of[family] for family in families(self.targets))
        return f"the memory of a run on {where} at a context of {self.context}"

    @property
    def key(self) -> str:
        """The name that a report has for what is counted."""
        return "file_bytes" if self.of_file else "memory_bytes"
