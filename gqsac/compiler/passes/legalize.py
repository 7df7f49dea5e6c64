"""Legalize: from the exported aten and gqsa operators to the operators of the IR.

Views are not pattern-matched. Every activation carries the positions of its elements in the IR value
that holds them (see symbols.py), and a view, transpose or slice is simply run on those. Where an operator
reads an activation, the positions say whether it is a whole value, a run of its columns (a Slice), or
something that no IR operator can read, which is refused.

Constants are run, too: whatever depends on neither tokens nor parameters is computed on the spot.
"""

import operator
from collections.abc import Callable
from dataclasses import replace

import torch
from gqsa_runtime.errors import ModelError, UnsupportedError
from torch import Tensor, fx

from gqsac.compiler import ir
from gqsac.compiler.passes.trace import N_TOKENS, Traced
from gqsac.compiler.symbols import (
    Angles,
    Mask,
    Rotated,
    Rows,
    Weight,
    column_run,
    is_constant,
    rows_of,
    scalar,
    token_axis,
)

aten = torch.ops.aten
gqsa = torch.ops.gqsa

# Operators that only say where elements are.
_VIEWS = {
    aten.chunk.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
}

# Operators whose first argument passes through unchanged, since all of it is f32.
_IDENTITIES = {
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
}

_ASSERTS = {aten._assert_tensor_metadata.default, aten._assert_async.msg}


def legalize(traced: Traced) -> ir.Graph:
    """Translates a traced model. Raises UnsupportedError naming the operator, the module and the model."""
    n_attentions = sum(node.target is gqsa.attention.default for node in traced.graph.nodes)
    if n_attentions != traced.n_layers:
        raise UnsupportedError(
            f"{traced.model_class} has {traced.n_layers} layers but calls transformers' attention interface "
            f"{n_attentions} times: some layers mix tokens by code of the model's own, which cannot be compiled"
        )
    return _Legalizer(traced).run()


class _Legalizer:
    """Walks the nodes once. `known` holds what each node stands for; `ops` grows."""

    def __init__(self, traced: Traced):
        self.traced = traced
        self.ops: list[ir.Op] = []
        self.known: dict[fx.Node, object] = {}
        self.module = ""
        self.made: dict[tuple, str] = {}  # Slices and scalings that exist already
        self.n_attentions = 0

    def run(self) -> ir.Graph:
        unread = {node: len(node.users) for node in self.traced.graph.nodes}
        for node in self.traced.graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            self.module = next(reversed(stack.values()))[0].removeprefix("model").lstrip(".") if stack else ""
            if node.op == "placeholder":
                self.known[node] = self._placeholder(node)
            elif node.op == "call_function":
                self.known[node] = self._call(node)
            elif node.op == "output":
                logits = self._finish(self.known[node.args[0][0]])
            for source in node.all_input_nodes:  # positions of wide activations add up over many layers
                unread[source] -= 1
                if not unread[source]:
                    del self.known[source]
        graph = ir.Graph(
            model_class=self.traced.model_class,
            ops=tuple(self.ops),
            logits=logits,
            vocab_size=ir.width(self.ops[-1]),
            max_context=self.traced.max_context,
            ropes=self.traced.ropes,
            aliases=self.traced.aliases,
        )
        return _scale_embeddings(graph)

    def _placeholder(self, node: fx.Node) -> object:
        if node.name in self.traced.parameters:
            return Weight(self.traced.parameters[node.name], tuple(node.meta["val"].shape))
        if node.name == self.traced.tokens:
            return Rows("tokens", 1, torch.arange(N_TOKENS)[None])
        return self.traced.constants[node.name]

    def _call(self, node: fx.Node) -> object:
        target = node.target
        args = fx.map_arg(node.args, self.known.get)
        kwargs = fx.map_arg(node.kwargs, self.known.get)
        if target in _ASSERTS:
            return None
        if target is operator.getitem:
            return args[0][args[1]]
        if target in _IDENTITIES:
            if isinstance(args[0], Rows) and args[0].value != "tokens" and not _is_float(node):
                raise self._unsupported(node, "a cast of activations to whole numbers")
            return args[0]
        if target is aten.dropout.default and not args[2]:
            return args[0]
        if is_constant((args, kwargs)) and getattr(target, "namespace", None) == "aten":
            return target(*args, **kwargs)
        if target in _HANDLERS:
            return _HANDLERS[target](self, node, *args, **kwargs)
        if target in _VIEWS and isinstance(args[0], Rows):
            return self._view(node, args, kwargs)
        raise self._unsupported(node)

    # Operators

    def _view(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        rows = args[0]
        positions = node.target(rows.positions, *args[1:], **kwargs)
        if isinstance(positions, Tensor):
            return replace(rows, positions=positions)
        return [replace(rows, positions=part) for part in positions]

    def _cat(self, node, parts, dim=0):
        """Joins the rotated part of heads with the part that is not: the rope of a partial rotary_dim."""
        first, *rest = parts
        if isinstance(first, Rotated) and dim in (-1, 3) and all(isinstance(part, Rows) for part in rest):
            rows = [first.source, *rest]
            if len({(part.value, part.factor) for part in rows}) == 1:
                joined = torch.cat([part.positions for part in rows], dim)
                return replace(first, source=replace(first.source, positions=joined))
        if all(isinstance(part, Rows) for part in parts) and len({(part.value, part.factor) for part in parts}) == 1:
            return replace(first, positions=torch.cat([part.positions for part in parts], dim))
        raise self._unsupported(node)

    def _embedding(self, node, table, index, *unused):
        if not isinstance(table, Weight):
            raise self._unsupported(node)
        rows, width = table.shape
        fields = {"table": table.name, "rows": rows, "width": width}
        if isinstance(index, Rows) and index.value == "tokens":
            return self._emit(ir.Embedding(self.module, node.name, **fields), node)
        if not isinstance(index, Tensor) or index.shape[-1] != N_TOKENS:
            raise self._unsupported(node)
        offset = int(index.flatten()[0])
        if offset < 0 or not torch.equal(index.flatten(), offset + torch.arange(N_TOKENS)):
            raise self._unsupported(node, "an index that is neither the token nor its position")
        return self._emit(
            ir.Embedding(self.module, node.name, **fields, source="positions", position_offset=offset), node
        )

    def _linear(self, node, x, weight, bias=None):
        if not isinstance(weight, Weight) or not (bias is None or isinstance(bias, Weight)):
            raise self._unsupported(node)
        rows, k = weight.shape
        value, count = self._columns(node, x)
        if count != k:
            raise self._unsupported(node, "a linear layer for each head")
        fields = {"weights": (weight.name,), "biases": (bias.name if bias else None,), "rows": (rows,), "k": k}
        return self._emit(ir.Linear(self.module, node.name, x=value, **fields), node)

    def _addmm(self, node, bias, x, weight):
        raise self._unsupported(node, "a transposed weight (a Conv1D layer, as in GPT-2)")

    def _rms_norm(self, node, x, weight, eps, weight_offset):
        width = weight.shape[0]
        value, count = self._columns(node, x)
        return self._emit(
            ir.RMSNorm(self.module, node.name, value, weight.name, width, eps, count // width, weight_offset), node
        )

    def _layer_norm(self, node, x, shape, weight=None, bias=None, eps=1e-5, *unused):
        if not isinstance(weight, Weight):
            raise self._unsupported(node, "a layer norm without weights")
        name = bias.name if bias else None
        value, count = self._columns(node, x)
        if list(shape) != [count]:
            raise self._unsupported(node, "a layer norm for each head")
        return self._emit(ir.LayerNorm(self.module, node.name, value, weight.name, name, count, eps), node)

    def _rope_table(self, node, positions, inv_freq, scaling, table):
        if not torch.equal(positions.flatten(), torch.arange(N_TOKENS)):
            raise self._unsupported(node, "rotary positions other than the tokens'")
        return Angles(table), Angles(table)

    def _rope(self, node, x, cos, sin, heads_axis):
        if not isinstance(x, Rows) or not isinstance(cos, Angles) or cos != sin:
            raise self._unsupported(node)
        return Rotated(x, cos.table)

    def _causal_mask(self, node, like, window):
        return Mask(window if window < self.traced.max_context else 0)

    def _attention(self, node, q, k, v, mask, scale, window):
        if isinstance(mask, Tensor) and self._is_written_out_causal(mask):
            mask = Mask(0)
        if not isinstance(mask, Mask):
            raise self._unsupported(node, "an attention mask of the model's own making")
        if window and window < self.traced.max_context and window != mask.window:
            raise self._unsupported(node, f"a sliding window of {window} with a mask for {mask.window or 'none'}")
        _, heads, _, head_dim = node.args[0].meta["val"].shape
        kv_heads = node.args[1].meta["val"].shape[1]
        if heads % kv_heads:
            raise ModelError(
                f"{self.traced.model_class}: {heads} attention heads cannot share {kv_heads} key/value heads evenly "
                f"({self.module}); correct num_attention_heads or num_key_value_heads in the config"
            )
        tables = [x.table if isinstance(x, Rotated) else None for x in (q, k)]
        if tables[0] != tables[1]:
            raise self._unsupported(node, "different rotary embeddings of queries and keys")
        q, k = (x.source if isinstance(x, Rotated) else x for x in (q, k))
        scale *= q.factor * k.factor  # scores are linear in both
        op = ir.Attention(
            self.module,
            node.name,
            q=self._read(node, replace(q, factor=1.0)),
            k=self._read(node, replace(k, factor=1.0)),
            v=self._read(node, v),
            layer=self.n_attentions,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=scale,
            window=mask.window,
            rope=tables[0],
        )
        self.n_attentions += 1
        return self._emit(op, node)

    def _is_written_out_causal(self, mask: Tensor) -> bool:
        """Whether a mask that a model computed itself (OPT before transformers 5) is the causal one.

        A window longer than the traced tokens would not show, so there must be none in the config.
        """
        allowed = mask if mask.dtype == torch.bool else mask == 0
        causal = torch.ones(N_TOKENS, N_TOKENS, dtype=torch.bool).tril()
        return not self.traced.has_window and torch.equal(allowed, causal.expand(allowed.shape))

    def _add(self, node, a, b, alpha=1):
        if isinstance(a, Rows) and isinstance(b, Rows) and alpha == 1 and a.positions.shape == b.positions.shape:
            return self._elementwise(node, "add", a, b)
        if isinstance(a, Rows) and scalar(b) == 0:
            return a
        raise self._unsupported(node)

    def _mul(self, node, a, b):
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Rows) and scalar(y) is not None:
                return replace(x, factor=x.factor * scalar(y))
            if isinstance(x, Rotated) and scalar(y) is not None:
                return replace(x, source=replace(x.source, factor=x.source.factor * scalar(y)))
        if isinstance(a, Rows) and isinstance(b, Rows) and a.positions.shape == b.positions.shape:
            return self._elementwise(node, "mul", a, b)
        raise self._unsupported(node)

    def _div(self, node, a, b):
        divisor = scalar(b)
        if not divisor:
            raise self._unsupported(node)
        return self._mul(node, a, 1.0 / divisor)

    def _relu(self, node, x):
        return self._elementwise(node, "relu", x)

    def _silu(self, node, x):
        return self._elementwise(node, "silu", x)

    def _gelu(self, node, x, approximate="none"):
        return self._elementwise(node, "gelu" if approximate == "none" else "gelu_tanh", x)

    # Values

    def _elementwise(self, node, function: str, a: Rows, b: Rows | None = None) -> Rows:
        value, count = self._columns(node, a)
        other = self._columns(node, b)[0] if b else None
        if b and token_axis(a) != token_axis(b):
            raise self._unsupported(node, "tokens along different axes")
        return self._emit(ir.Elementwise(self.module, node.name, function, value, count, other), node)

    def _emit(self, op: ir.Op, node: fx.Node) -> Rows:
        """Appends an operator and gives its value, laid out in the node's traced shape."""
        self.ops.append(op)
        width = ir.width(op)
        shape = node.meta["val"].shape
        axis = next((axis for axis in (1, 0, 2) if axis < len(shape) and shape[axis] == N_TOKENS), None)
        x = next((arg for arg in node.args if isinstance(arg, fx.Node) and isinstance(self.known[arg], Rows)), None)
        if x is not None and self.known[x].value != "tokens" and not isinstance(op, ir.Attention):
            axis = token_axis(self.known[x])
        if axis is None:
            raise self._unsupported(node, "a result without the axis of the tokens")
        return rows_of(op.output, width, shape, axis)

    def _columns(self, node: fx.Node, x: object) -> tuple[str, int]:
        """The value that an operator reads x from, and its width: x's own, a Slice of it, or it scaled."""
        if isinstance(x, Rotated):
            raise self._unsupported(node, "rotated queries or keys as its input")
        if not isinstance(x, Rows) or x.value == "tokens":
            raise self._unsupported(node)
        run = column_run(x)
        if run is None:
            raise self._unsupported(
                node, "columns in another order than its weights make them (queries, keys and values interleaved?)"
            )
        start, count = run
        value = x.value
        if count != x.width:
            output = f"{x.value}_{start}_{count}"
            value = self._once((x.value, start, count), ir.Slice(self.module, output, x.value, start, count))
        if x.factor != 1.0:
            output = f"{value}_scaled_{len(self.made)}"
            op = ir.Elementwise(self.module, output, "scale", value, count, scalar=x.factor)
            value = self._once((value, x.factor), op)
        return value, count

    def _read(self, node: fx.Node, x: object) -> str:
        return self._columns(node, x)[0]

    def _once(self, key: tuple, op: ir.Op) -> str:
        if key not in self.made:
            self.made[key] = op.output
            self.ops.append(op)
        return self.made[key]

    def _finish(self, logits: object) -> str:
        """The graph's last operator is a Linear, so a factor on the logits moves to its input."""
        last = self.ops[-1]
        if not isinstance(logits, Rows) or not isinstance(last, ir.Linear) or logits.value != last.output:
            raise UnsupportedError(
                f"{self.traced.model_class}: the logits are not the output of a linear layer; only that can be compiled"
            )
        if logits.factor != 1.0:
            if last.biases != (None,):
                raise UnsupportedError(
                    f"{self.traced.model_class}: scaled logits of a linear layer with a bias cannot be compiled"
                )
            scaled = f"{last.x}_scaled_{len(self.made)}"
            self.ops[-1] = ir.Elementwise(last.name, scaled, "scale", last.x, last.k, scalar=logits.factor)
            self.ops.append(replace(last, x=scaled))
        return last.output

    def _unsupported(self, node: fx.Node, what: str | None = None) -> UnsupportedError:
        name = str(node.target).removesuffix(".default")
        detail = f" with {what}" if what else ""
        where = self.module or "its outermost module"
        return UnsupportedError(
            f"{self.traced.model_class}: operator {name}{detail} in {where} is not one that gqsac can compile"
        )


_HANDLERS: dict[object, Callable] = {
    aten.add.Tensor: _Legalizer._add,
    aten.addmm.default: _Legalizer._addmm,
    aten.cat.default: _Legalizer._cat,
    aten.div.Tensor: _Legalizer._div,
    aten.embedding.default: _Legalizer._embedding,
    aten.gelu.default: _Legalizer._gelu,
    aten.layer_norm.default: _Legalizer._layer_norm,
    aten.linear.default: _Legalizer._linear,
    aten.mul.Tensor: _Legalizer._mul,
    aten.relu.default: _Legalizer._relu,
    aten.silu.default: _Legalizer._silu,
    gqsa.attention.default: _Legalizer._attention,
    gqsa.causal_mask.default: _Legalizer._causal_mask,
    gqsa.rms_norm.default: _Legalizer._rms_norm,
    gqsa.rope.default: _Legalizer._rope,
    gqsa.rope_table.default: _Legalizer._rope_table,
}


def _is_float(node: fx.Node) -> bool:
    return node.meta["val"].dtype.is_floating_point


def _scale_embeddings(graph: ir.Graph) -> ir.Graph:
    """Folds a scaling into the embedding that it alone reads (Gemma, Granite)."""
    readers: dict[str, list[ir.Op]] = {}
    for op in graph.ops:
        for name in ir.inputs(op):
            readers.setdefault(name, []).append(op)
    scalings = {
        op.a: op
        for op in graph.ops
        if isinstance(op, ir.Elementwise) and op.function == "scale" and len(readers[op.a]) == 1
    }
    ops: list[ir.Op] = []
    folded: set[str] = set()
    for op in graph.ops:
        if isinstance(op, ir.Embedding) and op.output in scalings:
            scaling = scalings[op.output]
            op = replace(op, output=scaling.output, scale=op.scale * scaling.scalar)
        elif op.output in folded:
            continue
        ops.append(op)
        folded.add(op.output)
    return replace(graph, ops=tuple(ops))
