"""Times the CPU kernels at the shapes of SmolLM2-135M on random weights.

    python benchmarks/cpu_kernels.py [--target x86_64_v4] [--threads 2] [--tokens 1 256]

Weights rotate through copies that together exceed the last-level cache, as a decode step reads every
weight once. GB/s counts weights (values, group words, row starts) or the KV cache; GFLOP/s counts two
operations for each kept weight and token.
"""

import argparse
import ctypes
import time

import numpy as np
from gqsa_runtime.device_cpu import _load_library, default_threads, supported_targets
from gqsa_runtime.engine import launch_state

from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from gqsac.compiler.passes.compile_cpu import compile_cpu
from gqsac.compiler.passes.render import render

LAYER = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 49152, 576, 9, 3, 64
N_LAYERS = 30
GROUP_SIZE, BITS, KEPT, N_TASKS = 16, 4, 0.95, 64
COPIES_BYTES = 128 << 20  # several times the last-level cache of most machines
REPEATS = 5


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


class Bench:
    """Launch lists over one compiled set of kernels."""

    def __init__(self, specs, target, threads):
        self.names = name_kernels(list(specs.values()))
        self.library = _load_library(compile_cpu({n: render("cpu", s, n) for s, n in self.names.items()}, target))
        self.pool = self.library.gqsa_pool_create(threads)
        self.keep = []

    def launch(self, spec, arrays):
        """One entry of a launch list."""
        args = np.array([0 if a is None else a.ctypes.data for a in arrays], np.uint64)
        self.keep += [args, *arrays]
        function = ctypes.cast(getattr(self.library, self.names[spec]), ctypes.c_void_p).value
        return function, args.ctypes.data

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
    print(f"{name:10} {tokens:5} {seconds * 1e6:10.1f} us {rates}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=(supported_targets() or [None])[0])
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[256, 2048])
    options = parser.parse_args()
    rng = np.random.default_rng(0)
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
