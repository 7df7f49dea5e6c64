"""Speed of the decode linears of LLaMA-7B over records on this GPU, as a share of its read bandwidth.

python -m tests.gpu.measure_records [--weights w4 w4-groups …] [--layers 32] [--tokens 1] [--set NAME=VALUE …]

A CUDA graph runs the four linears of `layers` blocks as a dependent chain with its norms, gates and residuals,
each started early, over three blocks' worth of weights in turn, so that nothing stays in the L2 cache. Prints a line
per kind of weights: us of a block as it is ("early"), "free" of waits for inputs, and then, to see what a kernel
waits for, without sums (only "copies") and without any copies but the first (only "sums"). --set changes a constant
of gqsac.compiler, to try geometries out.
"""

import argparse

import numpy as np
from gqsa_runtime.layouts import RECORDS
from gqsa_runtime.layouts.records import make_plan

from gqsac.compiler.cuda_launch import launch
from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from gqsac.compiler.records_launch import records_launch
from tests.gpu.constants import changed_constants
from tests.gpu.cuda_device import Gpu, GpuKernels
from tests.gpu.measure_linear import _copy_bandwidth, _time_graph
from tests.kernels.random_records import random_keep, random_matrix

HIDDEN, INNER, DISTINCT = 4096, 11008, 3
# rows, k, constants of qkv, o, gate+up, down
LINEARS = (
    (3 * HIDDEN, HIDDEN, {"norm": "rms"}),
    (HIDDEN, HIDDEN, {"residual": True}),
    (2 * INNER, HIDDEN, {"norm": "rms", "epilogue": "gated", "activation": "silu"}),
    (HIDDEN, INNER, {"residual": True}),
)
KINDS = {
    "w4": (4, "all"), "w3": (3, "all"), "w2": (2, "all"), "w8": (8, "all"), "w1": (1, "all"),
    "w4-groups": (4, "groups"), "w4-tiles": (4, "tiles"), "mixed": ((2, 3, 4), "all"),
}  # fmt: skip


# What is timed: the texts of headers, changed.
_CHANGES = {
    "early": lambda text: text,
    "free": lambda text: text.replace("griddepcontrol.wait;", ""),
    "copies": lambda text: text.replace(
        "multiply_one(bytes, me, own_planes, own_ranges, factor, y[0]);", "y[0][0] += bytes.bytes[lane];"
    ).replace(
        "multiply_few(bytes, me, own_planes, own_ranges, factor, n_tokens, y);", "y[0][0] += bytes.bytes[lane];"
    ),
    "sums": lambda text: text.replace(
        "copy(stage, next, start, stop);", "if (!turn) ring.fetch(stage, records, 0);"
    ).replace("ring.wait(stage, turn)", "turn ? ring.stages + stage * C::RECORD_BYTES : ring.wait(stage, turn)"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1, help="of one launch, 1 to 4")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--variants", nargs="*", default=[""], help="each a list for --set, separated by semicolons")
    options = parser.parse_args()
    gpu = Gpu()
    bandwidth = _copy_bandwidth(gpu)
    print(f"copy {bandwidth / 1e9:.0f} GB/s")
    for kind in options.weights:
        weights = [_linear(gpu, rows, k, options.tokens, *KINDS[kind], changes) for rows, k, changes in LINEARS]
        for variant in options.variants:
            with changed_constants([*options.set, *filter(None, variant.split(";"))]):
                try:
                    _measure(gpu, kind, variant, weights, options.layers, bandwidth)
                except Exception as error:
                    print(kind, variant, str(error)[:200])
        for _, _, blobs, _ in weights:
            for blob in blobs:
                for address in blob:
                    gpu.free(address)


def _linear(gpu, rows, k, tokens, widths, pattern, changes):
    """(params, bytes, device parts of each distinct copy, specs without launch)."""
    rng = np.random.default_rng(rows + k)
    pairs = None
    row_bits = widths if isinstance(widths, int) else rng.choice(widths, rows)
    if changes.get("epilogue") == "gated":
        pairs = np.stack([np.arange(rows // 2), np.arange(rows // 2) + rows // 2], 1)
        row_bits = row_bits if isinstance(row_bits, int) else np.tile(row_bits[: rows // 2], 2)
    matrix = random_matrix(rows, k, row_bits, random_keep(rows, k, pattern), scale=k**-0.5)
    plan = make_plan(matrix.row_bits, k, matrix.keep, pairs)
    out_width = rows // (2 if pairs is not None else 1)
    params = {
        "tokens": tokens, "rows": rows, "k": k, "x_stride": k, "out_stride": out_width, "bias": False,
        "activation": "none", "residual": False, "residual_stride": out_width, "norm": "none", "eps": 1e-6,
        "epilogue": "rows", "out_width": out_width, **changes, **plan.constants,
    }  # fmt: skip
    arrays = [np.ascontiguousarray(RECORDS.pack(part.name, (matrix, plan), params)) for part in RECORDS.parts]
    blobs = []
    for _ in range(DISTINCT):
        addresses = [gpu.allocate(array.nbytes) for array in arrays]
        for address, array in zip(addresses, arrays, strict=True):
            gpu.upload(address, array)
        blobs.append(addresses)
    return params, sum(array.nbytes for array in arrays), blobs, rows * k


def _measure(gpu, kind, variant, weights, layers, bandwidth):
    tokens = weights[0][0]["tokens"]
    specs = [KernelSpec.make("linear_records", **params) for params, *_ in weights]
    rng = np.random.default_rng(0)
    hidden, wide, inner, norm = (gpu.allocate(4 * tokens * n) for n in (HIDDEN, 3 * HIDDEN, INNER, HIDDEN))
    gpu.upload(norm, np.ones(HIDDEN, np.float32))
    state = gpu.allocate(128)
    gpu.upload(state, np.array([tokens, 0] * 8, np.int32))
    ends = ((hidden, wide), (wide, hidden), (hidden, inner), (inner, hidden))
    n_bytes = layers * sum(weight[1] for weight in weights)
    n_weights = layers * sum(weight[3] for weight in weights)
    result = np.empty(tokens * HIDDEN, np.float32)
    line = f"{kind:10} {8 * n_bytes / n_weights:.3f} bits"
    for name, change in _CHANGES.items():
        kernels = GpuKernels(gpu, name_kernels(specs), gpu.target, change)
        steps = []
        for layer in range(layers):
            for spec, (params, _, blobs, _), (x, out) in zip(specs, weights, ends, strict=True):
                pointers = [
                    x, None, None, norm if params["norm"] != "none" else None, None, *blobs[layer % DISTINCT], None,
                    hidden if params["residual"] else None, out, state,
                ]  # fmt: skip
                steps.append((kernels.function(spec), launch(spec, tokens, gpu.target), pointers))
        for address, n in ((hidden, HIDDEN), (wide, 3 * HIDDEN), (inner, INNER)):
            gpu.upload(address, rng.normal(size=tokens * n).astype(np.float32))
        seconds = _time_graph(gpu, steps, True)
        line += f"  {name} {seconds * 1e6 / layers:6.2f}"
        if name == "early":
            line += f" us a layer {n_bytes / seconds / bandwidth:6.1%}"
            gpu.download(result, hidden)
    geometry = [records_launch(params, gpu.target) for params, *_ in weights]
    shown = " ".join(f"{g.blocks}x{g.constants['STAGES']}" for g in geometry)
    print(f"{line}  {variant or '-'}  [{shown}] {'' if np.isfinite(result).all() else 'NOT FINITE'}", flush=True)
    for address in (hidden, wide, inner, norm, state):
        gpu.free(address)


if __name__ == "__main__":
    main()
