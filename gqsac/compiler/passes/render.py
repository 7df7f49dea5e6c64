"""Render: stamps a KernelSpec's constants into its template. Knows text, nothing of compilers.

A template `templates/cuda/<op>.cu.j2` (`templates/cpu/<op>.c.j2`) gets `name`, the kernel's C
identifier, the spec's params by name, and its operands from the schema (gqsa_runtime.operators): for CUDA
as `signature`, for CPUs as `arguments`, a struct. A CUDA template also gets `launch`, what the kernel must know
of how it is launched (`cuda_launch.Geometry.constants`), and `launch_on`, the same by target where that
differs. Both get `sampling`, the module whose constants `choose` shares, and those that use the KV cache
`kv_cache.row_constants`. Jinja only stamps constants; algorithms live in the headers under `include/`.
"""

from functools import cache
from pathlib import Path

import jinja2
from gqsa_runtime import sampling
from gqsa_runtime.kv_cache import row_constants
from gqsa_runtime.operators import OPERATORS

from gqsac.compiler.cuda_launch import geometry, own_targets
from gqsac.compiler.kernel_spec import KernelSpec


@cache
def templates_folder() -> Path:
    """The templates: inside an installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "templates", package.parent / "templates"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the kernel templates are missing: neither {package}/templates nor its sibling exists")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["f32"] = lambda value: f"{float(value)!r}f"  # 1e-05 -> 1e-05f
    environment.filters["norm"] = lambda value: {"none": "NO_NORM", "rms": "RMS_NORM", "layer": "LAYER_NORM"}[value]
    environment.globals["sampling"] = sampling  # numbers of the definition that `choose` follows
    environment.filters["flag"] = lambda value: "1" if value else "0"
    return environment


def render(target: str, spec: KernelSpec, name: str) -> str:
    """Source text of one kernel. target: "cuda" or "cpu"."""
    suffix = {"cuda": "cu", "cpu": "c"}[target]
    params = dict(spec.params)
    pointers = OPERATORS[spec.op].pointers(target, params)
    if target == "cuda":
        given = {"signature": _signature(pointers), "launch": geometry(spec).constants}
        given["launch_on"] = {of: geometry(spec, of).constants for of in own_targets(spec.op)}
    else:
        given = {"arguments": _struct(pointers)}
    if "kv_dtype" in params:
        given |= row_constants(params)
    template = _environment().get_template(f"{target}/{spec.op}.{suffix}.j2")
    return template.render(name=name, **given, **params)


def _signature(pointers: list[tuple[str, str]]) -> str:
    lines = [""]
    for kind, name in pointers:
        piece = f"{kind}* {name}"
        if len(lines[-1]) + len(piece) > 112 or len(lines) == 1:
            lines.append("   ")
        lines[-1] += f" {piece},"
    return "\n".join(lines).removesuffix(",")


def _struct(pointers: list[tuple[str, str]]) -> str:
    fields = "".join(f"    {kind} *{name};\n" for kind, name in pointers)
    return f"#include <stdint.h>\n\nstruct arguments {{\n{fields}}};\n"


@cache
def headers(target: str) -> dict[str, str]:
    """Include name -> text of the headers that a target's templates include."""
    folder = templates_folder() / target / "include"
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}
