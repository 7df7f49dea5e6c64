"""The operator schema: what kernels and documentation are made from. To accept a changed table:

python -m tests.unit.test_operators
"""

from pathlib import Path

import pytest
from gqsa_runtime.operators import C_TYPES, OPERATORS
from gqsa_runtime.program import DTYPE_BYTES

from gqsac.compiler.passes.render import render
from tests.kernels.cases import CASES

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- operators: begin -->\n", "<!-- operators: end -->\n"


def table() -> str:
    """The operators in Markdown."""
    lines = ["| operator | computes | pointers, in order | constants |", "|---|---|---|---|"]
    for name, operator in OPERATORS.items():
        pointers = ", ".join(f"{o.name} {o.dtype} {o.access}" for o in operator.operands)
        computes = operator.description.replace("|", "\\|")
        lines.append(f"| `{name}` | {computes} | {pointers} | {', '.join(operator.constants)} |")
    return "\n".join(lines) + "\n"


def test_the_documented_operators_are_those_of_the_schema():
    text = DOCS.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table()


@pytest.mark.parametrize("family", C_TYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_sources_take_the_pointers_of_the_schema(name, family):
    if family not in OPERATORS[name].families:
        pytest.skip(f"{name} has no {family} kernels")
    spec = next(case.spec for case in CASES if case.spec.op == name)
    source = render(family, spec, "kernel_under_test")
    for kind, pointer in OPERATORS[name].pointers(family, dict(spec.params)):
        assert (f"{kind}* {pointer}" if family == "cuda" else f"    {kind} *{pointer};\n") in source


def test_every_type_of_memory_has_a_c_type():
    for types in C_TYPES.values():
        assert set(types) <= set(DTYPE_BYTES)
    for operator in OPERATORS.values():
        for operand in operator.operands:
            assert operand.dtype in C_TYPES["cuda"] or operand.dtype in operator.constants
            assert operand.access in ("in", "out", "inout", "weight", "scratch")
        assert operator.operands[-1].name == "state"


if __name__ == "__main__":
    text = DOCS.read_text()
    DOCS.write_text(text[: text.index(BEGIN) + len(BEGIN)] + table() + text[text.index(END) :])
