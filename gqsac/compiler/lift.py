"""Lift: the graph behind a launch plan, from which the plan of another family of targets is made, or the same again.

The steps of a plan's decode phase are the operators of the graph, specialised for one token; here they are read back.
What was read is right if specialising it again gives the plan that it was read from, in all phases: no other is taken.
"""

from __future__ import annotations

from collections.abc import Mapping

from gqsa_runtime.layouts import RECORDS
from gqsa_runtime.operators import OPERATORS
from gqsa_runtime.program import Argument, Plan, Program, Step

from gqsac import __version__
from gqsac.compiler import ir
from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.measure_linears import StoredPart, StoredParts
from gqsac.compiler.passes.pack import LinearNames, Packing
from gqsac.compiler.plan_family import plan_family
from gqsac.errors import FormatError

_DECODE = "decode."  # begins the names of decode's own storages, see specialize


def plan_again(
    program: Program, family: str, recorded: Mapping, other: str | None = None
) -> tuple[dict[str, KernelSpec], Plan]:
    """The kernels by name and the plan of `family`, or of family `other`, as this compiler makes them.

    program: valid. recorded: what its file says of the compiler that made it. Raises FormatError where the plan of
    `family` is not, in every constant, buffer, launch and argument, the one that this compiler makes.
    """
    plan, again = program.plans[family], None
    exact = recorded.get("exact") is True
    try:
        lifted = _Lifter(program, plan).lift()
        specs, again = plan_family(*lifted, family, program.kv_dtype, exact)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
        pass  # it is valid, but no plan that was ever made has its shape
    if again != plan:
        so = f", so that none for {other} can be made from it" if other else ""
        version = recorded.get("gqsac")
        by = f", by gqsac {version[:40]!r} as the file says," if isinstance(version, str) else ""
        raise FormatError(
            f"the launch plan for {family}{by} is not one that gqsac {__version__} makes: "
            f"{_difference(plan, again)}{so}; build the file again with `gqsac build`"
        )
    return plan_family(*lifted, other, program.kv_dtype, exact) if other else (specs, again)


def _difference(plan: Plan, again: Plan | None) -> str:
    if again is None:
        return "its steps are not those of a model"
    if plan.kernels != again.kernels:
        made = set(map(repr, again.kernels))
        other = next((kernel.name for kernel in plan.kernels if repr(kernel) not in made), "one")
        return f"the kernel {other} would have another name, other constants or another launch"
    return "its buffers or steps would be others"


class _Lifter:
    def __init__(self, program: Program, plan: Plan):
        self.program, self.plan = program, plan
        self.kernels = {kernel.name: kernel for kernel in plan.kernels}
        self.ops: list[ir.Op] = []
        self.slices: set[str] = set()
        self.appended: dict[str, Argument] = {}  # the last kv_append's arguments
        self.linears: dict[str, LinearNames] = {}
        self.parts: dict[str, tuple[StoredPart, ...]] = {}
        self.tables: dict[str, tuple[str, ...]] = {}
        self.table_parts: dict[str, StoredPart] = {}
        self.vectors: dict[str, str] = {}

    def lift(self) -> tuple[ir.Graph, Packing, StoredParts]:
        for step in self.plan.phases["decode"]:
            self.step(step)
        program = self.program
        ropes = {key: ir.RopeTable((0.0,) * (rope.rotary_dim // 2)) for key, rope in program.ropes.items()}
        logits = self.ops[-1].output if self.ops else ""
        graph = ir.Graph(program.model_class, tuple(self.ops), logits, program.vocab_size, program.max_context, ropes)
        packing = Packing((), self.linears, self.vectors, self.tables, {})
        return graph, packing, StoredParts(self.parts, self.table_parts, 0)

    def step(self, step: Step) -> None:
        kernel = self.kernels[step.kernel]
        operands = OPERATORS[kernel.op].operands
        a = {operand.name: arg for operand, arg in zip(operands, step.args, strict=True)}
        p = kernel.params
        match kernel.op:
            case "embedding":
                self.tables[a["table"].name] = (a["table"].name,)
                self.add(
                    ir.Embedding, a["out"], table=a["table"].name, rows=p["vocab"], width=p["width"],
                    source=p["source"], position_offset=p["position_offset"], scale=p["scale"],
                )  # fmt: skip
            case "embedding_records":
                names = tuple(a[part.name].name for part in RECORDS.parts)
                self.tables[names[0]], self.table_parts[names[0]] = names, _part(RECORDS, p)
                self.add(ir.Embedding, a["out"], table=names[0], rows=p["rows"], width=p["k"], scale=p["scale"])
            case "rms_norm":
                weight = self.vector(a["weight"])
                x = self.value(a["x"])
                self.add(ir.RMSNorm, a["out"], x=x, weight=weight, width=p["width"], eps=p["eps"], heads=p["heads"])
            case "layer_norm":
                weight, bias = self.vector(a["weight"]), self.vector(a["bias"])
                x = self.value(a["x"])
                self.add(ir.LayerNorm, a["out"], x=x, weight=weight, bias=bias, width=p["width"], eps=p["eps"])
            case "linear_dense" | "linear_sparse" | "linear_records":
                self.linear(kernel.op, p, a)
            case "kv_append":
                self.appended = a
            case "attention":
                self.attention(p, {**self.appended, **a, "q": self.appended.get("q", a["q"])})
            case "append_attention":
                self.attention(p, a)
            case "gated_activation":
                gate, up = self.value(a["gate"]), self.value(a["up"])
                self.add(ir.GatedActivation, a["out"], gate=gate, up=up, width=p["width"], activation=p["activation"])
            case "elementwise":
                self.add(
                    ir.Elementwise, a["out"], function=p["function"], a=self.value(a["a"]), width=p["width"],
                    b=self.optional(a["b"]), scalar=p["scalar"],
                )  # fmt: skip

    def add(self, kind: type[ir.Op], out: Argument, **fields) -> None:
        self.ops.append(kind(name="", output=self.output(out), **fields))

    def output(self, out: Argument) -> str:
        """The value that a step defines. That of the head has a name only where several tokens are scored."""
        if out.name != "logits":
            return str(out.name).removeprefix(_DECODE)
        for step in self.plan.phases["all_log_probs"]:
            for arg in step.args:
                stem, _, suffix = str(arg.name).rpartition(".")
                if arg.kind == "buffer" and suffix in ("halves", "planes"):
                    return stem
        return "logits"

    def value(self, arg: Argument) -> str:
        """The value that an argument points to; part of one is a slice."""
        base = str(arg.name).removeprefix(_DECODE)
        if not arg.offset:
            return base
        name = f"{base}[{arg.offset}:]"
        if name not in self.slices:
            self.slices.add(name)
            self.ops.append(ir.Slice("", name, base, arg.offset, 0))
        return name

    def optional(self, arg: Argument) -> str | None:
        return None if arg.kind == "null" else self.value(arg)

    def vector(self, arg: Argument) -> str:
        self.vectors[arg.name] = arg.name
        return arg.name

    def linear(self, op: str, p: dict, a: dict[str, Argument]) -> None:
        layout = OPERATORS[op].layout
        names, output = tuple(a[part.name].name for part in layout.parts), self.output(a["out"])
        bias = a["bias"].name if p["bias"] else None
        if p.get("accumulate") and output in self.linears:  # one more addend, the last of which has the epilogue
            self.linears[output] = LinearNames((*self.linears[output].parts, names), bias)
            self.parts[output] += (_part(layout, p),)
            self.ops.pop()
        else:
            self.linears[output], self.parts[output] = LinearNames((names,), bias), (_part(layout, p),)
        self.add(
            ir.Linear, a["out"], x=self.value(a["x"]), weights=names[:1], biases=(bias,), rows=(p["rows"],), k=p["k"],
            activation=p["activation"], residual=self.optional(a["residual"]), norm=self.norm(p, a),
            gated=p.get("epilogue") == "gated",
        )  # fmt: skip

    def norm(self, p: dict, a: dict[str, Argument]) -> ir.RMSNorm | ir.LayerNorm | None:
        match p.get("norm", "none"):
            case "rms":
                return ir.RMSNorm("", "", "", self.vector(a["norm_weight"]), p["k"], p["eps"])
            case "layer":
                weight, bias = self.vector(a["norm_weight"]), self.vector(a["norm_bias"])
                return ir.LayerNorm("", "", "", weight, bias, p["k"], p["eps"])
        return None

    def attention(self, p: dict, a: dict[str, Argument]) -> None:
        rope = a["rope"].name if a["rope"].kind == "rope" else None
        q, k, v = (self.value(a[name]) for name in ("q", "k", "v"))
        self.add(
            ir.Attention, a["out"], q=q, k=k, v=v, layer=a["k_cache"].name, heads=p["heads"], kv_heads=p["kv_heads"],
            head_dim=p["head_dim"], scale=p["scale"], window=p["window"], rope=rope,
        )  # fmt: skip


def _part(layout, p: dict) -> StoredPart:
    return StoredPart(layout, {name: p[name] for name in layout.constants})
