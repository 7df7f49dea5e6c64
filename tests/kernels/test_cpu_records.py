"""Same bits on every CPU target: linear_records for any number of tokens, attention of many."""

import numpy as np
import pytest
from gqsa_runtime.device_cpu import _load_library, supported_targets
from gqsa_runtime.engine import launch_state
from gqsa_runtime.layouts import RECORDS
from gqsa_runtime.layouts.records import make_plan
from gqsa_runtime.operators import OPERATORS

from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.compile_cpu import compile_cpu
from gqsac.compiler.passes.render import render
from tests.kernels.random_records import random_keep, random_matrix
from tests.kernels.test_cpu_kernels import run_kernel

ROWS = 96
COUNTS = (1, 2, 6, 7, 70)  # one by one, turned, more than a tile of tokens

pytestmark = pytest.mark.skipif(not supported_targets(), reason="this CPU runs no gqsac kernels")


def native(data):
    """run(kernel, arguments) of a shared object for this machine."""
    library = _load_library(data)
    return lambda name, arguments: run_kernel(library, name, arguments, 3)


def outputs(target, widths, pattern, k, load=native):
    """Results of decode for each of COUNTS[-1] tokens, then of prefill for each count."""
    matrix = random_matrix(ROWS, k, widths, random_keep(ROWS, k, pattern), scale=k**-0.5)
    plan = make_plan(matrix.row_bits, k, matrix.keep)
    norm = {"k": k, "x_stride": k, "norm": "rms", "eps": 1e-5}
    linear = {
        "rows": ROWS, "out_width": ROWS, "out_stride": ROWS, "residual_stride": ROWS, "bias": False, "residual": False,
        "activation": "none", "epilogue": "rows", **norm, **plan.constants,
    }  # fmt: skip
    specs = {
        "decode": KernelSpec.make("linear_records", tokens=1, **linear),
        "prefill": KernelSpec.make("linear_records", tokens=8, **linear),
        "quantize": KernelSpec.make("quantize", tokens=8, **norm),
    }
    run_named = load(compile_cpu({name: render("cpu", spec, name) for name, spec in specs.items()}, target))
    matrix.levels[::2] = (1 << matrix.row_bits[::2, None]) - 1
    weights = {part.name: RECORDS.pack(part.name, (matrix, plan), linear) for part in RECORDS.parts}
    rng = np.random.default_rng(0)
    x = rng.standard_normal((COUNTS[-1], k), np.float32)
    weights["norm_weight"] = rng.standard_normal(k, np.float32)
    # Sums as large as they become: the largest levels meet integers whose bytes are 127 and -128, or -126 and -128.
    q = np.where(np.arange(k) % 64 == 0, 32639, 127 * 256 - 128)
    x[:2] = np.stack([q, -q]) / weights["norm_weight"]

    def run(name, n_tokens, **arguments):
        arguments = {**weights, "state": launch_state(n_tokens, 0, np.arange(n_tokens)), **arguments}
        operands = OPERATORS[specs[name].op].operands
        run_named(name, [arguments.get(operand.name) for operand in operands])

    one = np.zeros((len(x), ROWS), np.float32)
    for token in range(len(x)):
        run("decode", 1, x=x[token], out=one[token])
    results = [one]
    for count in COUNTS:
        planes, ranges = np.zeros((count, 2 * k), np.int8), np.zeros((count, k // 64, 2), np.float32)
        out = np.zeros((count, ROWS), np.float32)
        run("quantize", count, x=x, planes=planes, ranges=ranges)
        run("prefill", count, planes=planes, ranges=ranges, out=out)
        results.append(out)
    return results


PATTERNS = [("all", (1, 2, 3, 4, 8), 640), ("groups", (2, 4, 8), 640), ("all", (3,), 768)]  # the last: bare


@pytest.mark.parametrize("pattern, widths, k", PATTERNS)
def test_bits_depend_on_neither_target_nor_number_of_tokens(pattern, widths, k):
    widths = np.random.default_rng(1).choice(widths, ROWS)
    first = None
    for target in supported_targets():
        results = outputs(target, widths, pattern, k)
        first = results[0] if first is None else first
        for result in results:
            assert result.tobytes() == first[: len(result)].tobytes()


@pytest.mark.parametrize("first", [0, 5, 200])
def test_attention_of_many_tokens_gives_the_same_bits_on_every_target(first):
    """21 tokens of three query heads to a KV head: more than a tile of queries, and blocks that end anywhere."""
    heads, kv_heads, head_dim, n_tokens = 6, 2, 64, 21
    spec = KernelSpec.make(
        "attention", tokens=32, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=0.2, window=0, kv_dtype="f16",
        q_stride=heads * head_dim, out_stride=heads * head_dim,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    q = rng.standard_normal((n_tokens, heads * head_dim), np.float32)
    caches = rng.standard_normal((2, first + n_tokens, kv_heads * head_dim), np.float32).astype(np.float16)
    state = launch_state(first + n_tokens, 0, np.arange(first, first + n_tokens))
    results = set()
    for target in supported_targets():
        out = np.zeros_like(q)
        native(compile_cpu({"attend": render("cpu", spec, "attend")}, target))("attend", [q, *caches, out, state])
        results.add(out.tobytes())
    assert len(results) == 1 and out.any()
