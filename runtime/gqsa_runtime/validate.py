"""Checks a launch plan before anything of it runs: no kernel may be pointed outside its memory.

`validate` needs the header alone. `ContentChecks` holds what must be true of the numbers inside
index tensors, as their layouts say, and is applied to each as it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from gqsa_runtime.constants import NUMBER, Params, allowed, shown
from gqsa_runtime.errors import FormatError
from gqsa_runtime.format import ALIGNMENT, MAX_NAME_CHARACTERS
from gqsa_runtime.kv_cache import KV_ELEMENTS, MOST_WINDOW_TOKENS
from gqsa_runtime.layouts import ContentRule, Layout
from gqsa_runtime.machine_code import MAX_BYTES
from gqsa_runtime.operators import FEW_TOKENS, OPERATORS, Operand, check_params, families_of, state_elements
from gqsa_runtime.program import DTYPE_BYTES, PHASES, Argument, Buffer, Kernel, Launch, Plan, Program, Step
from gqsa_runtime.reader import TensorInfo
from gqsa_runtime.typecheck import conforms

# Kind of binary -> how its targets are named.
_TARGETS = {
    "cubin": re.compile(r"sm_[0-9]{2,3}"),
    "ptx": re.compile(r"compute_[0-9]{2,3}"),
    "shared_object": re.compile(r"[a-z][a-z0-9_]{0,62}"),
}

# Kernels index memory by what the host writes here, so no kernel may write to these three.
_HOST_BUFFERS = ("tokens", "targets", "state")
# And by the token that a decode step chose, where the next one goes on with it.
_CHOICE, _CHOOSERS = "argmax", {"choose": "token", "log_probs": "argmax"}  # operator: its operand
_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_BLOCK = 1024
_MAX_SHARED_BYTES = 256 << 10
_SHA256 = re.compile(r"[0-9a-f]{64}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


def validate(program: Program, tensors: Mapping[str, TensorInfo], context: int | None = None) -> None:
    """Checks every step of every plan against `operators.OPERATORS`, and all that the steps name.

    tensors: name -> TensorInfo of the file. context: length of the KV cache, default max_context.
    Raises FormatError at the first rule that is broken.
    """
    wrong = conforms(program, Program)
    if wrong:
        raise _error(f"{wrong}")
    _check_texts(program)
    _check_numbers(program)
    if context is not None and not 1 <= context <= program.max_context:
        raise _error(f"the context is {context}, expected 1 to {program.max_context}")
    _check_ropes(program, tensors)
    _check_binaries(program, tensors)
    for family, plan in program.plans.items():
        _PlanChecker(program, family, plan, tensors, context or program.max_context).check()


def _error(what: str) -> FormatError:
    return FormatError(f"the file's launch plan is wrong: {what}; rebuild the file with `gqsac build`")


def _check_texts(program: Program) -> None:
    # They are printed as they are: no terminal escapes, nothing that cannot be encoded.
    for field in ("name", "model_class"):
        text = getattr(program, field)
        if not text.isprintable() or len(text) > MAX_NAME_CHARACTERS:
            raise _error(f"{field} is {text[:80]!r}, expected at most {MAX_NAME_CHARACTERS} printable characters")


def _check_numbers(program: Program) -> None:
    for name in ("vocab_size", "max_context"):
        value = getattr(program, name)
        if not 1 <= value < 2**31:
            raise _error(f"{name} is {value}, expected 1 to {2**31 - 1}")
    if program.kv_dtype not in KV_ELEMENTS:
        raise _error(f"kv_dtype is {shown(program.kv_dtype)}, expected one of {', '.join(KV_ELEMENTS)}")
    for layer in program.kv_layers:
        if not (1 <= layer.kv_heads < 2**16 and 1 <= layer.head_dim < 2**16 and 0 <= layer.window < 2**30):
            raise _error(f"a KV cache has {layer.kv_heads} heads of {layer.head_dim} and the window {layer.window}")
    special = program.eos_token_ids + (() if program.bos_token_id is None else (program.bos_token_id,))
    for token in special:
        if not 0 <= token < program.vocab_size:
            raise _error(f"special token {token} is outside the vocabulary of {program.vocab_size}")


def _check_ropes(program: Program, tensors: Mapping[str, TensorInfo]) -> None:
    for name, rope in program.ropes.items():
        if (rope.long_inv_freq is None) != (rope.original_context is None):
            raise _error(f"rope table {name!r} has long frequencies or a context beyond which they hold, but not both")
        if rope.original_context is not None and not 1 <= rope.original_context < program.max_context:
            raise _error(
                f"rope table {name!r} has long frequencies beyond {rope.original_context} positions, expected 1 to "
                f"{program.max_context - 1}"
            )
        for tensor in (rope.inv_freq, rope.long_inv_freq):
            if tensor is None and rope.original_context is None:
                continue
            info = _tensor(tensors, f"rope table {name!r}", tensor, "f32")
            if rope.rotary_dim < 2 or rope.rotary_dim % 2 or info.elements != rope.rotary_dim // 2:
                raise _error(f"rope table {name!r} has {info.elements} frequencies for {rope.rotary_dim} dimensions")
        if not allowed(rope.scaling, NUMBER):
            raise _error(f"rope table {name!r} is scaled by {shown(rope.scaling)}, expected {NUMBER}")


def _check_binaries(program: Program, tensors: Mapping[str, TensorInfo]) -> None:
    targets = [binary.target for binary in program.binaries]
    if len(set(targets)) != len(targets):
        raise _error("two binaries have the same target")
    for binary in program.binaries:
        where = f"the binary for {binary.target!r}"
        if binary.kind not in _TARGETS:
            raise _error(f"{where} is of kind {binary.kind!r}, expected one of {', '.join(_TARGETS)}")
        if not _TARGETS[binary.kind].fullmatch(binary.target):
            raise _error(f"{where} is no {binary.kind} target, expected the form {_TARGETS[binary.kind].pattern}")
        if binary.family not in program.plans:
            raise _error(f"{where} has no plan: there are those of {sorted(program.plans)}")
        _tensor(tensors, where, binary.tensor, "i8")
        if not 1 <= binary.n_bytes <= MAX_BYTES:
            raise _error(f"{where} has {binary.n_bytes} bytes of code, expected 1 to {MAX_BYTES}")
        if not _SHA256.fullmatch(binary.sha256):
            raise _error(f"{where} has the sha256 {binary.sha256[:80]!r}, expected 64 digits 0 to f")
        kernels = {kernel.name for kernel in program.plans[binary.family].kernels}
        if set(binary.kernels) != ({""} if binary.kind == "shared_object" else kernels):
            raise _error(f"{where} does not hold its plan's kernels exactly")
        for name, (offset, length) in binary.kernels.items():
            if offset < 0 or length < 1 or offset + length > binary.n_bytes:
                raise _error(f"{where}: kernel {name!r} lies at {offset} + {length} of {binary.n_bytes} bytes")
    families = {binary.family for binary in program.binaries}
    if set(program.plans) != families or not families:
        raise _error(f"there are plans for {sorted(program.plans)} and binaries for {sorted(families)}")


def _tensor(tensors: Mapping[str, TensorInfo], where: str, name: object, dtype: str) -> TensorInfo:
    info = tensors.get(name) if isinstance(name, str) else None
    if info is None:
        raise _error(f"{where}: there is no tensor {name!r}")
    if info.dtype != dtype:
        raise _error(f"{where}: tensor {name!r} is {info.dtype}, expected {dtype}")
    return info


class _PlanChecker:
    def __init__(
        self, program: Program, family: str, plan: Plan, tensors: Mapping[str, TensorInfo], context: int
    ) -> None:
        self.program, self.family, self.plan, self.tensors, self.context = program, family, plan, tensors, context
        self.buffers: dict[str, Buffer] = {buffer.name: buffer for buffer in plan.buffers}

    def check(self) -> None:
        chunk, scored = self.plan.prefill_chunk, self.plan.score_chunk
        if not 1 <= scored <= chunk < 2**31:
            raise _error(f"prefill_chunk is {chunk}, score_chunk {scored}; expected 1 to {2**31 - 1}, scores within it")
        if chunk > MOST_WINDOW_TOKENS and any(layer.window for layer in self.program.kv_layers):
            raise _error(f"prefill_chunk is {chunk}, expected at most {MOST_WINDOW_TOKENS} where layers have windows")
        self._check_buffers()
        kernels = self._check_kernels()
        if set(self.plan.phases) != set(PHASES):
            raise _error(f"the phases are {sorted(self.plan.phases)}, expected {sorted(PHASES)}")
        for phase, steps in self.plan.phases.items():
            for index, step in enumerate(steps):
                where = f"step {index} of {phase} for {self.family} ({step.kernel})"
                if step.kernel not in kernels:
                    raise _error(f"{where}: there is no such kernel")
                most = {"all_log_probs": scored, "few_body": min(FEW_TOKENS, chunk)}.get(phase, chunk)
                self._check_step(where, kernels[step.kernel], step.args, most)

    def _check_buffers(self) -> None:
        plan = self.plan
        if not 0 <= plan.arena_bytes < 2**48:
            raise _error(f"the arena is {plan.arena_bytes} bytes")
        if len(self.buffers) != len(plan.buffers):
            raise _error("two buffers have the same name")
        for buffer in plan.buffers:
            if buffer.dtype not in DTYPE_BYTES:
                raise _error(f"buffer {buffer.name!r} has dtype {buffer.dtype!r}")
            if buffer.elements < 0 or buffer.offset < 0 or buffer.offset % ALIGNMENT:
                raise _error(f"buffer {buffer.name!r} has {buffer.elements} elements at byte {buffer.offset}")
            if _end(buffer) > plan.arena_bytes:
                raise _error(f"buffer {buffer.name!r} ends at byte {_end(buffer)}, the arena has {plan.arena_bytes}")
        chunk, scored = self.plan.prefill_chunk, self.plan.score_chunk
        for name, dtype, elements in (
            ("tokens", "i32", chunk),
            ("targets", "i32", scored),
            ("state", "i32", state_elements(chunk)),
            ("logits", "f32", self.program.vocab_size),
            ("log_probs", "f32", scored),
            ("argmax", "i32", scored),
        ):
            held = self.buffers.get(name)
            if held is None or held.dtype != dtype or held.elements < elements:
                raise _error(f"buffer {name!r} is {held}, expected at least {elements} elements of {dtype}")
        for name in (*_HOST_BUFFERS, _CHOICE):
            for other in plan.buffers:
                if other.name != name and _overlap(self.buffers[name], other):
                    raise _error(f"buffers {name!r} and {other.name!r} overlap")

    def _check_kernels(self) -> dict[str, Kernel]:
        kernels = {kernel.name: kernel for kernel in self.plan.kernels}
        if len(kernels) != len(self.plan.kernels):
            raise _error("two kernels have the same name")
        for kernel in self.plan.kernels:
            # The name is looked up in native code.
            if not _IDENTIFIER.fullmatch(kernel.name):
                raise _error(f"kernel name {kernel.name[:80]!r} is not a C identifier")
            if kernel.op not in OPERATORS:
                raise _error(f"kernel {kernel.name} is of the unknown operator {kernel.op!r}")
            if self.family not in families_of(kernel.op, kernel.params):
                raise _error(f"kernel {kernel.name}: {self.family} targets have no operator {kernel.op!r} like it")
            if "" not in kernel.launches if self.family == "cuda" else kernel.launches:
                raise _error(f"kernel {kernel.name} for {self.family} has launches for {sorted(kernel.launches)}")
            for launch in kernel.launches.values():
                _check_launch(kernel, launch)
            wrong = check_params(kernel.op, kernel.params)
            if wrong:
                raise _error(f"kernel {kernel.name}: {wrong}")
        return kernels

    def _check_step(self, where: str, kernel: Kernel, args: tuple[Argument, ...], n_tokens: int) -> None:
        """n_tokens: most that a launch of the step's phase holds."""
        operands = OPERATORS[kernel.op].operands
        if len(args) != len(operands):
            raise _error(f"{where}: {len(args)} arguments, expected {len(operands)}")
        for operand, arg in zip(operands, args, strict=True):
            self._check_arg(f"{where}, argument {operand.name!r}", kernel, operand, arg, n_tokens)
        named = {operand.name: arg for operand, arg in zip(operands, args, strict=True)}
        layout = OPERATORS[kernel.op].layout
        if layout is not None:
            held = {part.name: self.tensors[named[part.name].named].elements for part in layout.parts}
            wrong = layout.check_sizes(kernel.params, held)
            if wrong:
                raise _error(f"{where}: {wrong}")
        if kernel.op == "embedding_records" and kernel.params["rows"] < self.program.vocab_size:
            raise _error(f"{where}: the table has {kernel.params['rows']} rows for {self.program.vocab_size} tokens")
        if kernel.op == "embedding" and kernel.params["source"] == "positions":
            rows = self.context + kernel.params["position_offset"]
            if rows > kernel.params["vocab"]:
                raise _error(f"{where}: the position table has {kernel.params['vocab']} rows, the context needs {rows}")
        elif kernel.op == "embedding" and kernel.params["vocab"] < self.program.vocab_size:
            raise _error(f"{where}: the table has {kernel.params['vocab']} rows for {self.program.vocab_size} tokens")
        elif kernel.op == "choose":
            # Its result is read as the next token.
            if kernel.params["vocab"] != self.program.vocab_size:
                raise _error(f"{where}: {kernel.params['vocab']} logits for {self.program.vocab_size} tokens")
            for name, buffer in (("logits", "logits"), ("token", "argmax")):
                if named[name] != Argument("buffer", buffer):
                    raise _error(f"{where}: {name!r} is {named[name]}, expected the start of {buffer!r}")
        elif kernel.op == "log_probs" and kernel.params["vocab"] < self.program.vocab_size:
            raise _error(f"{where}: {kernel.params['vocab']} logits for {self.program.vocab_size} tokens")

    def _check_arg(self, where: str, kernel: Kernel, operand: Operand, arg: Argument, n_tokens: int) -> None:
        params = kernel.params
        if not operand.present(params):
            expected = "null"
        elif operand.access == "weight":
            expected = "tensor"
        elif operand.name in ("k_cache", "v_cache", "rope"):
            expected = operand.name
        else:
            expected = "buffer"
        if arg.kind != expected:
            raise _error(f"{where} is a {arg.kind!r}, expected a {expected!r}")
        if arg.offset < 0 or (arg.offset and arg.kind != "buffer"):
            raise _error(f"{where} has the offset {arg.offset}")
        if arg.kind == "null":
            return
        dtype = operand.dtype_of(params)
        needed = operand.elements(params, n_tokens, self.context)
        if arg.kind == "tensor":
            held = _tensor(self.tensors, where, arg.name, dtype).elements
        elif arg.kind == "buffer":
            held = self._buffer_elements(where, operand, arg, dtype)
            if operand.access != "in" and arg.name == _CHOICE and _CHOOSERS.get(kernel.op) != operand.name:
                raise _error(f"{where} writes to {_CHOICE!r}, which only {' and '.join(_CHOOSERS)} may write")
        else:
            held = needed if self._fits(params, arg) else -1
        if held < needed:
            raise _error(f"{where} points to {max(held, 0)} elements of {arg.name!r}, expected at least {needed}")

    def _buffer_elements(self, where: str, operand: Operand, arg: Argument, dtype: str) -> int:
        buffer = self.buffers.get(arg.name) if isinstance(arg.name, str) else None
        if buffer is None or buffer.dtype != dtype:
            raise _error(f"{where} is buffer {arg.name!r}, expected one of {dtype}")
        host = {"ids": "tokens", "targets": "targets", "state": "state"}.get(operand.name)
        if host is not None and (arg.name != host or arg.offset):
            raise _error(f"{where} is buffer {arg.name!r} at {arg.offset}, expected {host!r}")
        if operand.access != "in" and arg.name in _HOST_BUFFERS:
            raise _error(f"{where} writes to {arg.name!r}, which the runtime alone may write")
        return buffer.elements - arg.offset

    def _fits(self, params: Params, arg: Argument) -> bool:
        """Whether the KV cache or rotary table that is meant has the sizes stamped into the kernel."""
        if arg.kind == "rope":
            rope = self.program.ropes.get(arg.name) if isinstance(arg.name, str) else None
            return rope is not None and rope.rotary_dim == params["rotary_dim"]
        if type(arg.name) is not int or not 0 <= arg.name < len(self.program.kv_layers):
            return False
        layer = self.program.kv_layers[arg.name]
        sizes = (layer.kv_heads, layer.head_dim, layer.window, self.program.kv_dtype)
        return sizes == (params["kv_heads"], params["head_dim"], params["window"], params["kv_dtype"])


def _check_launch(kernel: Kernel, launch: Launch) -> None:
    if any(not 1 <= n <= most for n, most in zip(launch.grid, _MAX_GRID, strict=True)):
        raise _error(f"kernel {kernel.name} has the grid {launch.grid}")
    if not 1 <= launch.block <= _MAX_BLOCK or not 0 <= launch.shared_bytes <= _MAX_SHARED_BYTES:
        raise _error(f"kernel {kernel.name}: {launch.block} threads, {launch.shared_bytes} bytes shared")


def _end(buffer: Buffer) -> int:
    return buffer.offset + buffer.elements * DTYPE_BYTES[buffer.dtype]


def _overlap(a: Buffer, b: Buffer) -> bool:
    return a.offset < _end(b) and b.offset < _end(a)


class ContentChecks:
    """What every index tensor of a program must hold, by tensor name. The program must be valid."""

    def __init__(self, program: Program, tensors: Mapping[str, TensorInfo]) -> None:
        self._rules: dict[str, set[tuple[ContentRule, tuple[str, ...]]]] = {}
        for plan in program.plans.values():
            kernels = {kernel.name: kernel for kernel in plan.kernels}
            for step in plan.steps():
                layout = OPERATORS[kernels[step.kernel].op].layout
                if layout is not None:
                    self._add(layout, kernels[step.kernel], step, tensors)

    def _add(self, layout: Layout, kernel: Kernel, step: Step, tensors: Mapping[str, TensorInfo]) -> None:
        args = {operand.name: arg for operand, arg in zip(OPERATORS[kernel.op].operands, step.args, strict=True)}
        named = {part.name: args[part.name].named for part in layout.parts}
        held = {part: tensors[name].elements for part, name in named.items()}
        for part, rule in layout.rules(kernel.params, layout.count_groups(kernel.params, held)).items():
            needs = tuple(named[other] for other in rule.needs)
            self._rules.setdefault(named[part], set()).add((rule, needs))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that have a rule."""
        return tuple(self._rules)

    def check(self, name: str, array: np.ndarray, read: Callable[[str], np.ndarray]) -> None:
        """Raises FormatError where the array breaks a rule of the tensor `name`. read: gives another tensor."""
        for rule, needs in self._rules.get(name, ()):
            wrong = rule.broken(array, *map(read, needs))
            if wrong:
                raise _error(f"tensor {name!r} {wrong}")
