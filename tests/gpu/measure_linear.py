"""Speed of the decode linears of a LLaMA-7B block on this GPU, as a share of its copy bandwidth.

python -m tests.gpu.measure_linear [--group-size 16] [--bits 4] [--density 0.5] [--layers 8]

A CUDA graph runs all linears of `layers` blocks as a dependent chain, each with its own weights, so
that nothing stays in the L2 cache; with and without programmatic dependent launch (sm_90 and later).
Prints one JSON line per number of tasks.
"""

import argparse
import json

import numpy as np
from gqsa_runtime.engine import launch_state
from gqsa_runtime.operators import state_elements

from gqsac.bsr import pack_values
from gqsac.compiler.cuda_launch import launch
from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from tests.gpu.cuda_device import Gpu, GpuKernels, _checked

SHAPES = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))  # rows, k of qkv, o, gate+up, down
REPEATS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--order", choices=("ascending", "residues"), default="ascending", help=_order.__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1056, 2112, 4096, 8192])
    options = parser.parse_args()
    gpu = Gpu()
    bandwidth = _copy_bandwidth(gpu)
    weights = [_weights(gpu, *shape, options) for shape in SHAPES]
    x = gpu.allocate(4 * 32768)
    gpu.upload(x, np.zeros(32768, np.float32))
    state = gpu.allocate(4 * state_elements(1))
    gpu.upload(state, launch_state(1, 0, np.arange(1)))
    for n_tasks in options.tasks:
        line = {"group_size": options.group_size, "bits": options.bits, "density": options.density, "tasks": n_tasks}
        steps, total_bytes = _steps(gpu, weights, n_tasks, x, state, options)
        for dependent_launch in (False, True):
            seconds = _time_graph(gpu, steps, dependent_launch)
            key = "dependent_launch" if dependent_launch else "plain"
            line[f"{key}_us_per_block"] = round(seconds * 1e6 / options.layers, 2)
            line[f"{key}_share"] = round(total_bytes / seconds / bandwidth, 3)
        print(json.dumps({**line, "copy_gb_s": round(bandwidth / 1e9)}), flush=True)


def _weights(gpu, rows, k, options):
    """Host crow_indices and, per layer, device (values, groups, crow_indices)."""
    rng = np.random.default_rng(rows + k)
    keep = rng.random((rows, k // options.group_size)) < options.density
    crow_indices = np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32)
    nnz = int(crow_indices[-1])
    levels = rng.integers(0, 1 << options.bits, (nnz, options.group_size), dtype=np.uint8)
    columns = np.nonzero(keep)[1]
    if options.order == "residues":
        columns = _order(columns, np.repeat(np.arange(rows), keep.sum(1)))
    words = np.uint32(0x2000) | (columns.astype(np.uint32) << 16) | np.uint32(7 << 28)
    arrays = (pack_values(levels, options.bits), words, crow_indices)
    layers = []
    for _ in range(options.layers):
        addresses = [gpu.allocate(array.nbytes) for array in arrays]
        for address, array in zip(addresses, arrays, strict=True):
            gpu.upload(address, array)
        layers.append(addresses)
    return rows, k, crow_indices, sum(array.nbytes for array in arrays), layers


def _order(columns, row):
    """Order of a row's groups; "residues": cyclic in column mod 8, so that reads of x meet different banks."""
    residue = columns % 8
    by_residue = np.lexsort((columns, residue, row))
    key = row[by_residue] * 8 + residue[by_residue]
    starts = np.concatenate([[0], np.nonzero(np.diff(key))[0] + 1])
    rank = np.arange(len(key)) - np.repeat(starts, np.diff([*starts, len(key)]))
    return columns[by_residue][np.lexsort((residue[by_residue], rank, row[by_residue]))]


def _steps(gpu, weights, n_tasks, x, state, options):
    """(function, launch, pointers) of every linear in order, and the bytes of all weights."""
    chain, specs, total_bytes = [], [], 0
    for rows, k, *_ in weights:
        params = {
            "tokens": 1, "rows": rows, "k": k, "group_size": options.group_size, "bits": options.bits,
            "n_tasks": min(n_tasks, rows), "x_stride": k, "out_stride": rows, "bias": False, "activation": "none",
            "residual": False, "residual_stride": rows, "accumulate": False,
        }  # fmt: skip
        specs.append(KernelSpec.make("linear_sparse", **params))
    kernels = GpuKernels(gpu, name_kernels(specs), gpu.target)
    for layer in range(options.layers):
        for spec, (_rows, _k, crow_indices, nbytes, layers) in zip(specs, weights, strict=True):
            tasks = _cut(gpu, crow_indices, spec["n_tasks"])
            pointers = [x, *layers[layer], tasks, None, None, x, state]
            chain.append((kernels.function(spec), launch(spec, 1), pointers))
            total_bytes += nbytes
    return chain, total_bytes


def _cut(gpu, crow_indices, n_tasks):
    goals = np.arange(1, n_tasks) * (crow_indices[-1] / n_tasks)
    inner = np.searchsorted(crow_indices[1:], goals, side="right")
    tasks = np.concatenate([[0], np.sort(inner), [len(crow_indices) - 1]]).astype(np.int32)
    address = gpu.allocate(tasks.nbytes)
    gpu.upload(address, tasks)
    return address


def _time_graph(gpu, steps, dependent_launch) -> float:
    """Seconds of one run of all steps in a CUDA graph, the median of REPEATS."""
    driver = gpu.driver
    stream = _checked(driver.cuStreamCreate(1))
    _checked(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL))
    for function, made, pointers in steps:
        gpu.launch(function, made, pointers, stream, dependent_launch)
    graph = _checked(driver.cuGraphInstantiate(_checked(driver.cuStreamEndCapture(stream)), 0))
    start, end = _checked(driver.cuEventCreate(0)), _checked(driver.cuEventCreate(0))
    times = []
    for _ in range(REPEATS):
        _checked(driver.cuEventRecord(start, stream))
        _checked(driver.cuGraphLaunch(graph, stream))
        _checked(driver.cuEventRecord(end, stream))
        _checked(driver.cuStreamSynchronize(stream))
        times.append(_checked(driver.cuEventElapsedTime(start, end)) / 1e3)
    return float(np.median(times[5:]))


def _copy_bandwidth(gpu) -> float:
    """Bytes read and written per second by a device-to-device copy."""
    driver, nbytes = gpu.driver, 1 << 30
    source, target = gpu.allocate(nbytes), gpu.allocate(nbytes)
    start, end = _checked(driver.cuEventCreate(0)), _checked(driver.cuEventCreate(0))
    times = []
    for _ in range(10):
        _checked(driver.cuEventRecord(start, 0))
        _checked(driver.cuMemcpyDtoDAsync(target, source, nbytes, 0))
        _checked(driver.cuEventRecord(end, 0))
        gpu.synchronize()
        times.append(_checked(driver.cuEventElapsedTime(start, end)) / 1e3)
    gpu.free(source)
    gpu.free(target)
    return 2 * nbytes / min(times)


if __name__ == "__main__":
    main()
