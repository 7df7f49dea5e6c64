"""What a .gqsa file holds, as data and as a table for people."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from gqsa_runtime import format as gqsa
from gqsa_runtime import memory
from gqsa_runtime.errors import FormatError
from gqsa_runtime.facts import read_facts
from gqsa_runtime.layouts import ContentRule
from gqsa_runtime.operators import OPERATORS
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.typecheck import printable


def describe(file: ArtifactFile, context: int | None = None) -> dict[str, Any]:
    """Facts of a validated file, ready for JSON. Sizes in bytes; context: to state memory for.

    "plans": for each family of targets, the number of kernels, the launches of each phase, and the memory that a
    device needs at `context` and, under "contexts", at several (`memory.context_costs`). The other facts are of the
    first plan. "linears" counts each compressed weight matrix of the decode phase but the head once: weights
    (parameters of the dense matrix), bytes as stored, bits_per_weight from the two, sparsity, the share of weights in
    removed groups, and row_widths, bits -> share of the rows, both None where sizes do not tell them, sparsity only if
    the build has not noted it either. "measured": by the compression, see facts.MEASURES, or None. "dense_bytes":
    embeddings, heads, norms and biases. "targets": bytes of machine code, and stored_bytes, compressed as it is.
    """
    program = file.program
    if context is None:
        context = min(program.max_context, 4096)
    family = next(iter(program.plans))
    linears, facts = _linears(file, family), {"sparsity": None, "measured": None}
    if gqsa.KEY_FACTS in file.metadata:
        facts = read_facts(file.text(gqsa.KEY_FACTS), file.path)
    if linears["sparsity"] is None:
        linears["sparsity"] = facts["sparsity"]
    return {
        "path": file.path,
        "name": program.name,
        "model_class": program.model_class,
        "format_version": file.metadata[gqsa.KEY_FORMAT_VERSION],
        "file_bytes": file.size,
        "vocab_size": program.vocab_size,
        "max_context": program.max_context,
        "kv_dtype": program.kv_dtype,
        "layers": len(program.kv_layers),
        "chat_template": gqsa.KEY_CHAT_TEMPLATE in file.metadata,
        "linears": linears,
        "measured": facts["measured"],
        "dense_bytes": memory.weight_bytes(program, file.tensors, family) - linears["bytes"],
        "targets": [
            {
                "target": binary.target,
                "kind": binary.kind,
                "bytes": binary.n_bytes,
                "stored_bytes": file.tensors[binary.tensor].size,
            }
            for binary in program.binaries
        ],
        "plans": {family: _plan(file, family, context) for family in program.plans},
        "tensors": len(file.tensors),
    }


def _plan(file: ArtifactFile, family: str, context: int) -> dict[str, Any]:
    program, plan = file.program, file.program.plans[family]
    return {
        "kernels": len(plan.kernels),
        "launches": {phase: len(steps) for phase, steps in plan.phases.items()},
        "memory": {
            "context": context,
            "weights": memory.weight_bytes(program, file.tensors, family),
            "activations": plan.arena_bytes,
            "context_bytes": memory.context_bytes(program, context),
            "total": memory.needed_bytes(program, file.tensors, family, context),
        },
        "contexts": [asdict(row) for row in memory.context_costs(program, file.tensors, family)],
    }


def kernel_rows(file: ArtifactFile) -> list[dict[str, Any]]:
    """One entry per kernel of a plan: family, name, operator and constants, and how often each phase launches it."""
    rows = []
    for family, plan in file.program.plans.items():
        counts: dict[str, dict[str, int]] = {}
        for phase, steps in plan.phases.items():
            for step in steps:
                phases = counts.setdefault(step.kernel, {})
                phases[phase] = phases.get(phase, 0) + 1
        rows += [
            {"family": family, "name": k.name, "op": k.op, "params": k.params, "launches": counts.get(k.name, {})}
            for k in plan.kernels
        ]
    return rows


def tensor_rows(file: ArtifactFile) -> list[dict[str, Any]]:
    """One entry per tensor: its name, dtype, shape and bytes."""
    return [
        {"name": name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.size}
        for name, info in file.tensors.items()
    ]


def _linears(file: ArtifactFile, family: str) -> dict[str, Any]:
    plan = file.program.plans[family]
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    weights = n_bytes = 0
    kept: int | None = 0
    rows: dict[int, int] | None = {}
    counted: set[tuple[str, ...]] = set()
    for step in plan.phases["decode"]:
        kernel = kernels[step.kernel]
        layout = OPERATORS[kernel.op].layout
        operands = OPERATORS[kernel.op].operands
        given = {operand.name: arg for operand, arg in zip(operands, step.args, strict=True)}
        # Tables and heads may be rounded, and count as dense all the same.
        if layout is None or not layout.compressed or "x" not in given or given["out"].name == "logits":
            continue
        args = {part.name: given[part.name].named for part in layout.parts}
        names = tuple(args.values())
        if names in counted:
            continue
        counted.add(names)
        held = {part.name: file.tensors[args[part.name]].elements for part in layout.parts}
        # The second stream of a linear adds to the first: its weights are counted there.
        weights += 0 if kernel.params.get("accumulate") else kernel.params["rows"] * kernel.params["k"]
        n_groups = layout.count_groups(kernel.params, held)
        n_weights = layout.n_weights(kernel.params, n_groups)
        kept = None if kept is None or n_weights is None else kept + n_weights
        n_bytes += sum(file.tensors[name].size for name in names)
        widths = layout.rows_by_width(
            kernel.params, partial(_checked, file, args, layout.rules(kernel.params, n_groups))
        )
        if rows is None or widths is None:
            rows = None
            continue
        for width, count in widths.items():
            rows[width] = rows.get(width, 0) + count
    return {
        "weights": weights,
        "bytes": n_bytes,
        "bits_per_weight": 8 * n_bytes / weights if weights else 0.0,
        "sparsity": None if kept is None else 1 - kept / weights if weights else 0.0,
        "row_widths": rows and {str(width): n / sum(rows.values()) for width, n in sorted(rows.items())},
    }


def _checked(file: ArtifactFile, args: dict[str, str], rules: dict[str, ContentRule], part: str) -> np.ndarray:
    """A part of a linear, whose rule needs no other part."""
    array = file.read(args[part])
    broken = rules[part].broken(array)
    if broken:
        raise FormatError(f"{file.path}: tensor {args[part]} {broken}; get the file again")
    return array


def render(facts: dict[str, Any]) -> str:
    """The facts of `describe` as lines of text."""
    linears = facts["linears"]
    rows = [
        ("model", f"{facts['name']} ({facts['model_class']})"),
        ("file", f"{facts['path']}, {size(facts['file_bytes'])}, format version {facts['format_version']}"),
        (
            "linears",
            f"{linears['weights'] / 1e6:,.1f} M weights in {size(linears['bytes'])}: "
            f"{linears['bits_per_weight']:.2f} bits per weight{_removed(linears['sparsity'])}"
            f"{_by_width(linears['row_widths'])}",
        ),
        ("quality", _quality(facts["measured"])),
        ("dense", f"{size(facts['dense_bytes'])} of embeddings, output head, norms and biases"),
        ("vocabulary", f"{facts['vocab_size']:,} tokens"),
        ("context", f"up to {facts['max_context']:,} tokens, {facts['layers']} layers of {facts['kv_dtype']} KV cache"),
        ("chat template", "yes" if facts["chat_template"] else "no"),
        ("targets", ", ".join(map(_target, facts["targets"])) or "none"),
        ("tensors", str(facts["tensors"])),
    ]
    for family, plan in facts["plans"].items():
        launches, needs = ", ".join(f"{phase} {n}" for phase, n in plan["launches"].items()), plan["memory"]
        rows.append((f"{family} kernels", f"{plan['kernels']}; launches: {launches}"))
        rows.append(
            (
                f"{family} memory",
                f"{size(needs['total'])} at context {needs['context']:,}: weights {size(needs['weights'])}, "
                f"activations {size(needs['activations'])}, context {size(needs['context_bytes'])}",
            )
        )
    width = max(len(key) for key, _ in rows)
    costs = [
        {"memory of": family, **{key: n if key == "context" else size(n) for key, n in row.items()}}
        for family, plan in facts["plans"].items()
        for row in plan["contexts"]
    ]
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows) + f"\n\n{table(costs)}"


def _target(target: dict[str, Any]) -> str:
    return f"{target['target']} ({size(target['bytes'])} in {size(target['stored_bytes'])})"


def _quality(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "not measured"
    return (
        f"KL {measured['kl']:.4f} nats a token from the uncompressed model (99th percentile {measured['kl_99']:.2f}), "
        f"{measured['flips']:.1%} of likeliest tokens flip, perplexity {measured['perplexity']:.2f} (uncompressed "
        f"{measured['reference_perplexity']:.2f}), on {measured['n_tokens']:,.0f} tokens of the calibration text"
    )


def _removed(sparsity: float | None) -> str:
    return "" if sparsity is None else f", {sparsity:.1%} of groups removed"


def _by_width(row_widths: dict[str, float] | None) -> str:
    if not row_widths:
        return ""
    shares = ", ".join(f"{share:.1%} of {width}" for width, share in row_widths.items())
    return f"; rows of bits: {shares}"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as aligned columns under their names."""
    if not rows:
        return "(none)"
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, dict):
        value = " ".join(f"{key}={item}" for key, item in value.items())
    return printable(str(value))


def size(n_bytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.2f} {unit}"
    return f"{n_bytes:.0f} B"
