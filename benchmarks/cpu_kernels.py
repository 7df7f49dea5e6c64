"""Times the CPU kernels at the shapes of SmolLM2-135M on random weights.

    python benchmarks/cpu_kernels.py [--target x86_64_v4] [--threads 2] [--tokens 1 256] [--only records]

Weights rotate through copies that together exceed the last-level cache, as a decode step reads every
weight once. GB/s counts weights (values, group words, row starts; records) or the KV cache; GFLOP/s counts two
operations for each kept weight and token. `read` is the bus alone: the same bytes summed up by every thread.
"""

import argparse
import ctypes
import time

import numpy as np
from gqsa_runtime.device_cpu import _load_library, default_threads, supported_targets
from gqsa_runtime.engine import launch_state
from gqsa_runtime.layouts import RECORDS
from gqsa_runtime.layouts.records import make_plan

from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from gqsac.compiler.passes.compile_cpu import compile_cpu
from gqsac.compiler.passes.render import render
from gqsac.quantized_matrix import QuantizedMatrix

LAYER = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 49152, 576, 9, 3, 64
N_LAYERS = 30
GROUP_SIZE, BITS, KEPT, N_TASKS = 16, 4, 0.95, 64
COPIES_BYTES = 128 << 20  # several times the last-level cache of most machines
REPEATS = 20  # the least counts: other programs take the bus too
# Records: name -> (rows, k, width, share of the groups that are kept, norm, epilogue).
RECORD_LINEARS = {
    "qkv w4": (960, 576, 4, 1, "rms", "rows"),
    "o w4": (576, 576, 4, 1, "none", "rows"),
    "gate_up w4": (3072, 576, 4, 1, "rms", "gated"),
    "down w4": (576, 1536, 4, 1, "none", "rows"),
    "gate_up w1": (3072, 576, 1, 1, "rms", "gated"),
    "gate_up w2": (3072, 576, 2, 1, "rms", "gated"),
    "gate_up w3": (3072, 576, 3, 1, "rms", "gated"),
    "gate_up w8": (3072, 576, 8, 1, "rms", "gated"),
    "gate_up w4 S50": (3072, 576, 4, 0.5, "rms", "gated"),
    "gate_up w2 S50": (3072, 576, 2, 0.5, "rms", "gated"),
    "gate_up w8 S50": (3072, 576, 8, 0.5, "rms", "gated"),
    "lm_head w8": (49152, 576, 8, 1, "rms", "rows"),
}
STEP = ("qkv w4", "o w4", "gate_up w4", "down w4")  # N_LAYERS times, then the head

READ = """
#include "vec.h"

struct arguments { const float *x; int32_t *blocks; float *out; };

EXPORT void read_memory(const struct arguments *arg, int share, int n_shares) {
    int begin, end;
    split(arg->blocks[0], share, n_shares, &begin, &end);  // of 1 KiB
    vf sums[4] = {0};
    for (const float *p = arg->x + (size_t)begin * 256; p < arg->x + (size_t)end * 256; p += 4 * VW)
        UNROLL for (int i = 0; i < 4; i++) sums[i] += load(p + i * VW);
    arg->out[share] = hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
"""


def linear_spec(op, tokens, rows, k, **extra):
    return KernelSpec.make(
        op, tokens=tokens, rows=rows, k=k, x_stride=k, out_stride=rows, bias=False, activation="none",
        residual=False, residual_stride=rows, **extra,
    )  # fmt: skip


def sparse_weights(rng, rows, k):
    """values, groups, crow_indices, tasks of a random stream that keeps KEPT of its groups."""
    keep = rng.random((rows, k // GROUP_SIZE)) < KEPT
    crow = np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32)
    nnz = int(crow[-1])
    scales = (rng.random(nnz) * 0.01 + 0.001).astype(np.float16).view(np.uint16).astype(np.uint32)
    words = scales | (np.nonzero(keep)[1].astype(np.uint32) << 16) | (rng.integers(0, 16, nnz, np.uint32) << 28)
    inner = np.searchsorted(crow[1:], np.arange(1, N_TASKS) * (nnz / N_TASKS), side="right")
    tasks = np.concatenate([[0], inner, [rows]]).astype(np.int32)
    return [rng.integers(0, 256, nnz * GROUP_SIZE * BITS // 8, np.uint8), words, crow, tasks]


def record_weights(rng, name):
    """(QuantizedMatrix, Plan) of a linear of RECORD_LINEARS with random weights."""
    rows, k, width, kept, _, epilogue = RECORD_LINEARS[name]
    matrix = QuantizedMatrix(
        group_size=16,
        quant_group_size=64,
        row_bits=np.full(rows, width, np.uint8),
        levels=rng.integers(0, 1 << width, (rows, k), np.uint16).astype(np.uint8),
        scales=(rng.random((rows, k // 64)) * 0.01 + 0.001).astype(np.float16),
        zeros=rng.integers(1, 4, (rows, k // 64), np.uint8) * 4,
        keep=rng.random((rows, k // 16)) < kept if kept < 1 else None,
    )
    pairs = np.arange(rows).reshape(2, -1).T if epilogue == "gated" else None
    return matrix, make_plan(matrix.row_bits, k, matrix.keep, pairs)


class Bench:
    """Launch lists over one compiled set of kernels."""

    def __init__(self, specs, target, threads):
        self.names = name_kernels(list(specs.values()))
        sources = {n: render("cpu", s, n) for s, n in self.names.items()}
        self.library = _load_library(compile_cpu({**sources, "read_memory": READ}, target))
        self.threads = threads
        self.pool = self.library.gqsa_pool_create(threads)
        self.keep = []

    def launch(self, spec, arrays):
        """One entry of a launch list."""
        return self.launch_name(self.names[spec], arrays)

    def launch_name(self, name, arrays):
        args = np.array([0 if a is None else a.ctypes.data for a in arrays], np.uint64)
        self.keep += [args, *arrays]
        return ctypes.cast(getattr(self.library, name), ctypes.c_void_p).value, args.ctypes.data

    def seconds(self, launches):
        """Least time of one pass over the list."""
        table = np.array(launches, np.uint64)
        best = float("inf")
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            self.library.gqsa_run(self.pool, table.ctypes.data, len(launches))
            best = min(best, time.perf_counter() - start)
        return best


def report(name, tokens, seconds, n_bytes, flops):
    rates = f"{n_bytes / seconds / 1e9:8.1f} GB/s {flops / seconds / 1e9:8.1f} GFLOP/s"
    print(f"{name:14} {tokens:5} {seconds * 1e6:10.1f} us {rates}", flush=True)


def record_spec(name, tokens, plan):
    rows, k, _, _, norm, epilogue = RECORD_LINEARS[name]
    width = rows // 2 if epilogue == "gated" else rows
    return KernelSpec.make(
        "linear_records", tokens=tokens, rows=rows, k=k, x_stride=k, out_stride=width, out_width=width, bias=False,
        activation="silu" if epilogue == "gated" else "none", residual=False, residual_stride=width, norm=norm,
        eps=1e-5, epilogue=epilogue, **plan.constants,
    )  # fmt: skip


def quantize_spec(k, tokens):
    return KernelSpec.make("quantize", tokens=tokens, k=k, x_stride=k, norm="rms", eps=1e-5)


def bench_records(options, rng):
    """linear_records and quantize at the shapes of RECORD_LINEARS, and the linears of a decode step."""
    chosen = [name for name in RECORD_LINEARS if not options.names or name.split()[0] in options.names]
    sources = {name: record_weights(rng, name) for name in chosen}
    specs = {
        (name, tokens): record_spec(name, tokens, sources[name][1]) for name in chosen for tokens in options.tokens
    }
    specs |= {(k, tokens): quantize_spec(k, tokens) for k in (576, 1536) for tokens in options.tokens if tokens > 1}
    bench = Bench(specs, options.target, options.threads)
    print(f"{options.target}, {options.threads} threads, records")
    memory, count = rng.standard_normal(COPIES_BYTES // 4, np.float32), np.array([COPIES_BYTES >> 10], np.int32)
    launch = bench.launch_name("read_memory", [memory, count, np.zeros(1024, np.float32)])
    report("read", 1, bench.seconds([launch]), memory.nbytes, memory.size)
    weights = {}
    for name in chosen:
        params = dict(record_spec(name, 1, sources[name][1]).params)
        one = [RECORDS.pack(part.name, sources[name], params) for part in RECORDS.parts]
        n_bytes = one[0].nbytes
        first = [aligned_copy(a) for a in one]
        count = 1 + COPIES_BYTES // n_bytes
        weights[name] = [first if options.cached else [aligned_copy(a) for a in one] for _ in range(count)]
    for tokens in options.tokens:
        state, step = launch_state(tokens, 0, np.arange(tokens)), {}
        x = rng.standard_normal((tokens, 1536), np.float32)
        norm_weight = rng.standard_normal(1536, np.float32)
        for k in (576, 1536) if tokens > 1 else ():
            out = [np.zeros(tokens * 2 * k, np.int8), np.zeros(tokens * k // 32, np.float32)]
            launches = [bench.launch(specs[k, tokens], [x, norm_weight, None, *out, state])]
            report(f"quantize {k}", tokens, bench.seconds(launches), x.nbytes * k / 1536, tokens * k)
        for name in chosen:
            rows, k, _, kept, norm, _ = RECORD_LINEARS[name]
            q = rng.integers(-32639, 32640, (tokens, k // 64, 64))
            high = q + 128 >> 8
            planes = np.stack([high, q - 256 * high], 2).astype(np.int8)
            ranges = np.stack([np.full(q.shape[:2], 1e-4), q.sum(2)], 2).astype(np.float32)
            inputs = [x, None, None, norm_weight if norm == "rms" else None, None]
            inputs = inputs if tokens == 1 else [None, planes, ranges, None, None]
            copies = weights[name] if tokens == 1 else weights[name][:8]
            out = np.zeros((tokens, rows), np.float32)
            launches = [bench.launch(specs[name, tokens], [*inputs, *copy, None, None, out, state]) for copy in copies]
            n_bytes, work = sum(a.nbytes for a in copies[0]), 2 * tokens * rows * k * kept
            report(name, tokens, bench.seconds(launches) / len(launches), n_bytes, work)
            step[name] = launches, n_bytes, work
        if tokens == 1 and not options.names:  # all linears of one decode step
            launches = [step[name][0][layer] for layer in range(N_LAYERS) for name in STEP] + [step["lm_head w8"][0][0]]
            totals = [sum(step[name][i] * N_LAYERS for name in STEP) + step["lm_head w8"][i] for i in (1, 2)]
            report("step", tokens, bench.seconds(launches), *totals)


def aligned_copy(array):
    """A copy that begins at a multiple of 64 bytes, as a file's tensors do."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=(supported_targets() or [None])[0])
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--only", choices=["records", "streams"])
    parser.add_argument("--cached", action="store_true", help="records: one copy of the weights, arithmetic alone")
    parser.add_argument("--names", nargs="+", help="records: linears by the first word of their name")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    if options.only != "streams":
        bench_records(options, rng)
    if options.only != "records":
        bench_streams(options, rng)


def bench_streams(options, rng):
    """linear_sparse, linear_dense and attention."""
    specs = {}
    for tokens in options.tokens:
        sparse = {"group_size": GROUP_SIZE, "bits": BITS, "n_tasks": N_TASKS, "accumulate": False}
        for name, (rows, k) in LAYER.items():
            specs[name, tokens] = linear_spec("linear_sparse", tokens, rows, k, **sparse)
        specs["lm_head", tokens] = linear_spec("linear_dense", tokens, VOCAB, WIDTH)
        specs["attention", tokens] = KernelSpec.make(
            "attention", tokens=tokens, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5,
            window=0, kv_dtype="f16", q_stride=HEADS * HEAD_DIM, out_stride=HEADS * HEAD_DIM,
        )  # fmt: skip
    bench = Bench(specs, options.target, options.threads)
    print(f"{options.target}, {options.threads} threads, {GROUP_SIZE} x {BITS} bits, {KEPT:.0%} of the groups kept")
    layers = {}
    for name, (rows, k) in LAYER.items():
        one = sparse_weights(rng, rows, k)
        n_bytes = sum(a.nbytes for a in one)
        layers[name] = n_bytes, [one] + [[a.copy() for a in one] for _ in range(COPIES_BYTES // n_bytes)]
    head = rng.standard_normal((VOCAB, WIDTH), np.float32).astype(np.float16)
    for tokens in options.tokens:
        state = launch_state(tokens, 0, np.arange(tokens))
        x = rng.standard_normal((tokens, 1536), np.float32)
        step, step_bytes = [], 0
        for name, (rows, _) in LAYER.items():
            n_bytes, copies = layers[name]
            if tokens > 1:
                copies = copies[:8]
            out = np.zeros((tokens, rows), np.float32)
            spec = specs[name, tokens]
            launches = [bench.launch(spec, [x, *copy, None, None, out, state]) for copy in copies]
            groups = copies[0][1].size
            report(name, tokens, bench.seconds(launches) / len(launches), n_bytes, 2 * tokens * groups * GROUP_SIZE)
            step += launches[:N_LAYERS]
            step_bytes += n_bytes * N_LAYERS
        out = np.zeros((tokens, VOCAB), np.float32)
        launch = bench.launch(specs["lm_head", tokens], [x, head, None, None, out, state])
        report("lm_head", tokens, bench.seconds([launch]), head.nbytes, 2 * tokens * head.size)
        if tokens == 1:  # all linears of one decode step
            step_bytes += head.nbytes
            report("step", tokens, bench.seconds([*step, launch]), step_bytes, 2 * (step_bytes - head.nbytes) / 12 * 16)
        for context in options.context:
            if context < tokens:
                continue
            state = launch_state(context, 0, np.arange(context - tokens, context))
            caches = [
                rng.standard_normal((context, KV_HEADS, HEAD_DIM), np.float32).astype(np.float16) for _ in range(60)
            ]
            q, out = x[:, : HEADS * HEAD_DIM].copy(), np.zeros((tokens, HEADS * HEAD_DIM), np.float32)
            launches = [
                bench.launch(specs["attention", tokens], [q, caches[i], caches[i + 1], out, state])
                for i in range(0, 60 if tokens == 1 else 4, 2)
            ]
            pairs = tokens * (context - tokens) + tokens * (tokens + 1) // 2
            flops = 4 * HEADS * HEAD_DIM * pairs
            report(f"attn {context}", tokens, bench.seconds(launches) / len(launches), 2 * caches[0].nbytes, flops)


if __name__ == "__main__":
    main()
