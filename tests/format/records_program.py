"""A sound program over records: a table that the head shares, a gated linear of mixed widths, some masked, and one
whose records are bare."""

import dataclasses

import numpy as np
from gqsa_runtime.layouts import RECORDS
from gqsa_runtime.layouts.records import make_plan
from gqsa_runtime.operators import OPERATORS, state_elements
from gqsa_runtime.program import Argument, Buffer, Kernel, Plan, Program, Step
from gqsa_runtime.reader import TensorInfo

from tests.format import tiny
from tests.kernels.random_records import random_keep, random_matrix

K, ROWS, CHUNK, VOCAB = 320, 72, tiny.CHUNK, tiny.VOCAB
BARE_ROWS, BARE_K = 40, 256
PARTS = tuple(part.name for part in RECORDS.parts)


def _table():
    matrix = random_matrix(VOCAB, K, 8)
    return matrix, make_plan(matrix.row_bits, K)


def _gated():
    widths = np.tile(np.repeat([8, 4, 2, 2], 9), 2)
    keep = random_keep(ROWS, K, "groups")
    keep[widths == 4] = True  # whole records of 4 bits
    matrix = random_matrix(ROWS, K, widths, keep)
    return matrix, make_plan(matrix.row_bits, K, keep, np.arange(ROWS, dtype=np.int32).reshape(2, -1).T)


def _bare():
    matrix = random_matrix(BARE_ROWS, BARE_K, 4)
    return matrix, make_plan(matrix.row_bits, BARE_K)


SOURCES = {"embed": _table(), "gate": _gated(), "bare": _bare()}


def tensors() -> dict[str, np.ndarray]:
    arrays = {"norm": np.ones(K, np.float32), "binary.cpu": tiny.packed(tiny.CODE)}
    for name, source in SOURCES.items():
        params = {"k": source[1].columns, **source[1].constants}
        arrays |= {f"{name}.{part}": RECORDS.pack(part, source, params).copy() for part in PARTS}
    return arrays


def infos(arrays: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(array.shape, f"{array.dtype.kind}{8 * array.dtype.itemsize}", 0, array.nbytes)
        for name, array in arrays.items()
    }


def kernels() -> dict[str, Kernel]:
    """By name."""
    table, gated, bare = (source[1].constants for source in SOURCES.values())
    linear = {"x_stride": K, "bias": False, "residual": False, "residual_stride": 0}
    made = {}
    for tokens in (1, 8):
        norm = {"norm": "rms" if tokens == 1 else "none", "eps": 1e-5}
        params = {
            "embedding_records": {"rows": VOCAB, "k": K, "scale": 1.0, "out_stride": K, **table},
            "linear_records": {**linear, **norm, "rows": ROWS, "k": K, "out_stride": ROWS // 2, "out_width": ROWS // 2,
                               "activation": "silu", "epilogue": "gated", **gated},
            "quantize": {"k": K, "x_stride": K, "norm": "rms", "eps": 1e-5},
        }  # fmt: skip
        head = {**linear, **norm, "norm": "none", "rows": VOCAB, "k": K, "out_stride": VOCAB, "out_width": VOCAB,
                "activation": "none", "epilogue": "rows", **table}  # fmt: skip
        for name, op, p in (*((op, op, p) for op, p in params.items()), ("head", "linear_records", head)):
            made[f"{name}_t{tokens}"] = Kernel(f"{name}_t{tokens}", op, {"tokens": tokens, **p}, {})
    del made["quantize_t1"]
    params = {**linear, "norm": "none", "eps": 0.0, "tokens": 1, "rows": BARE_ROWS, "k": BARE_K,
              "out_stride": BARE_ROWS, "out_width": BARE_ROWS, "activation": "none", "epilogue": "rows",
              **bare}  # fmt: skip
    made["bare_t1"] = Kernel("bare_t1", "linear_records", params, {})
    made["last_row"] = Kernel("last_row", "last_row", {"width": K, "x_stride": K}, {})
    made["log_probs"] = Kernel("log_probs", "log_probs", {"tokens": 8, "vocab": VOCAB, "x_stride": VOCAB}, {})
    return made


def plan(**changes) -> Plan:
    made = changes.pop("kernels", kernels())
    sizes = [("tokens", "i32", CHUNK), ("targets", "i32", CHUNK), ("state", "i32", state_elements(CHUNK)),
             ("logits", "f32", CHUNK * VOCAB), ("log_probs", "f32", CHUNK), ("argmax", "i32", CHUNK),
             ("last", "f32", K), ("x", "f32", CHUNK * K), ("h", "f32", CHUNK * ROWS // 2),
             ("y", "f32", BARE_ROWS),
             ("planes", "i8", CHUNK * 2 * K), ("ranges", "f32", CHUNK * K // 64 * 2)]  # fmt: skip
    buffers, offset = [], 0
    for name, dtype, elements in sizes:
        buffers.append(Buffer(name, dtype, elements, offset))
        offset += -(-4 * elements // 64) * 64

    def step(kernel: str, weights: str | None = None, **named) -> Step:
        args = []
        for operand in OPERATORS[made[kernel].op].operands:
            if not operand.present(made[kernel].params):
                args.append(Argument("null"))
            elif operand.name in PARTS:
                args.append(Argument("tensor", f"{weights}.{operand.name}"))
            elif operand.access == "weight":
                args.append(Argument("tensor", "norm"))
            else:
                args.append(Argument("buffer", named.get(operand.name, operand.name)))
        return Step(kernel, tuple(args))

    def embed(tokens):
        return step(f"embedding_records_t{tokens}", "embed", ids="tokens", out="x")

    quantize = step("quantize_t8")
    fields = {
        "prefill_chunk": CHUNK, "score_chunk": CHUNK,
        "buffers": tuple(buffers), "arena_bytes": offset, "kernels": tuple(made.values()),
        "phases": {
            "decode": (embed(1), step("linear_records_t1", "gate", out="h"), step("bare_t1", "bare", out="y"),
                       step("head_t1", "embed", out="logits")),
            "prefill_body": (embed(8), quantize, step("linear_records_t8", "gate", out="h")),
            "few_body": (embed(8), quantize, step("linear_records_t8", "gate", out="h")),
            "last_logits": (step("last_row", out="last"), step("head_t1", "embed", x="last", out="logits")),
            "all_log_probs": (quantize, step("head_t8", "embed", out="logits"), step("log_probs", result="log_probs")),
        },
    }  # fmt: skip
    return Plan(**{**fields, **changes})


def program(made: Plan | None = None) -> Program:
    return tiny.program(
        plans={"cpu": made or plan()}, ropes={}, kv_layers=(),
        binaries=(tiny.binary("x86_64_v3", "shared_object", {"": (0, 100)}),),
    )  # fmt: skip


def with_params(name: str, **changes) -> Plan:
    """The plan with changes to the constants of one kernel."""
    made = kernels()
    made[name] = dataclasses.replace(made[name], params={**made[name].params, **changes})
    return plan(kernels=made)
