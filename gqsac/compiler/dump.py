"""What every stage saw and made, for people: graph, plan, sources, compile logs, machine code."""

import dataclasses
from pathlib import Path

from gqsac.compiler import ir
from gqsac.compiler.passes.compile import Compiled
from gqsac.compiler.passes.render import headers
from gqsac.errors import InputError

_SUFFIX = {"cuda": ".cu", "cpu": ".c"}


class Dumper:
    """Writes under `folder`, or nothing if that is None."""

    def __init__(self, folder: Path | None):
        self.folder = Path(folder) if folder else None
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"the folder {folder} for the dump cannot be made: {error.strerror}; choose another --dump-dir"
                ) from error

    def text(self, name: str, text: str) -> None:
        """One text file."""
        if self.folder:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def graph(self, name: str, graph: ir.Graph) -> None:
        """The operators, one a line, as `output = Operator(field=value, …)  # module path`."""
        if self.folder:
            self.text(f"{name}.txt", format_graph(graph))

    def sources(self, sources: dict[str, dict[str, str]]) -> None:
        """The rendered sources and the headers they include, ready to compile by hand."""
        for family, kernels in sources.items():
            for name, text in kernels.items():
                self.text(f"{family}/{name}{_SUFFIX[family]}", text)
            for name, text in headers(family).items():
                self.text(f"{family}/{name}", text)

    def binaries(self, compiled: list[Compiled]) -> None:
        """Machine code per target, and what the compiler said of it."""
        if not self.folder:
            return
        for item in compiled:
            folder = self.folder / item.target
            folder.mkdir(exist_ok=True)
            if item.target.startswith("sm_"):
                suffix = ".cubin"
            else:
                suffix = ".ptx" if item.target.startswith("compute_") else ".so"
            stem = item.kernel or "kernels"
            (folder / f"{stem}{suffix}").write_bytes(item.data)
            if item.log:
                (folder / f"{stem}.log").write_text(item.log)


def format_graph(graph: ir.Graph) -> str:
    """The graph as text, one operator a line."""
    lines = [f"{graph.model_class}: vocabulary {graph.vocab_size}, context {graph.max_context}"]
    for op in graph.ops:
        fields = {f.name: getattr(op, f.name) for f in dataclasses.fields(op) if f.name not in ("name", "output")}
        shown = ", ".join(f"{key}={value}" for key, value in fields.items())
        lines.append(f"{op.output} = {type(op).__name__}({shown})  # {op.name}")
    return "\n".join(lines) + "\n"
