"""When the blocks of a decode step's kernels start, have their inputs and end, on this GPU.

python -m tests.gpu.timeline FILE [--context 128] [--layer 16] [--set _RUN_KEYS=256 …]

Compiles the step's kernels with the reading of the global timer at their beginning, before and after the wait for
inputs and at their end, runs the step's graph and prints, for each launch of one layer and for those after the last
layer, times in us after the end of the launch before: earliest .. latest block. --set as measure_step's variants.
"""

import argparse
from dataclasses import replace

import numpy as np
from gqsa_runtime.device_cuda import call
from gqsa_runtime.model import Model

from gqsac.compiler import cuda_launch
from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.compile_cuda import compile_cuda
from gqsac.compiler.passes.render import headers, render
from tests.gpu.constants import changed_constants
from tests.gpu.measure_step import load_function

MARKS, STATE_WORDS, MOST_BLOCKS = 8, 16, 512  # 64-bit words of a block; 32-bit words before the first block's
STRIDE = STATE_WORDS * 4 + MOST_BLOCKS * MARKS * 8  # bytes of a launch
STARTED, WAITS, HAS, ENDS, WHERE = 0, 1, 2, 3, 7
_STAMP = f"""
__device__ __forceinline__ void stamp(const int* state, int mark) {{
    if (threadIdx.x > 0) return;
    unsigned long long time;
    unsigned place;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time)::"memory");
    asm volatile("mov.u32 %0, %smid;" : "=r"(place));
    auto* const marks = (unsigned long long*)(state + {STATE_WORDS}) + {MARKS} * (blockIdx.y * gridDim.x + blockIdx.x);
    marks[mark] = time, marks[{WHERE}] = place;
}}
"""
# Lines before which a block has just started.
_BEGINNINGS = {"linear_records.cuh": "RecordStream<C> stream;", "append_attention.cuh": "let_dependents_start();"}


def _headers() -> dict[str, str]:
    texts = dict(headers("cuda"))
    for name, beginning in _BEGINNINGS.items():
        text = texts[name]
        assert text.count(beginning) == 1, f"{name} begins otherwise now"
        text = text.replace(beginning, f"stamp(state, {STARTED}); {beginning}")
        texts[name] = text.replace(
            "wait_for_inputs();", f"stamp(state, {WAITS}); wait_for_inputs(); stamp(state, {HAS});"
        )
    texts["common.cuh"] += _STAMP
    return texts


def _marked(source: str) -> str:
    """The kernel with a mark at its end."""
    head, _, tail = source.rstrip().rpartition("}")
    return f"{head}    __syncthreads();\n    stamp(state, {ENDS});\n}}{tail}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--layer", type=int, default=16)
    parser.add_argument("--set", nargs="*", default=[])
    options = parser.parse_args()
    with changed_constants(options.set), Model.open(options.file, device="cuda") as model:
        model.engine.prefill(np.random.default_rng(0).integers(0, model.program.vocab_size, options.context))
        model.engine._upload(np.array([1], np.int32))
        _show(model, _run(model), options.layer)


def _run(model: Model):
    """Of each launch of a step: its kernel, and marks int64 [blocks, MARKS]."""
    device, plan = model.device, model.device.plan
    kernels, texts = [], _headers()
    for kernel in plan.kernels:
        if kernel.op in ("linear_records", "append_attention") and kernel.params["tokens"] == 1:
            spec = KernelSpec.make(kernel.op, **kernel.params)
            data = compile_cuda(_marked(render("cuda", spec, kernel.name)), device.target, kernel.name, texts).data
            kernel = replace(kernel, launches=cuda_launch.launches(spec, 1))
            device._functions[kernel.name] = load_function(data, kernel, device.target)
        kernels.append(kernel)
    steps = plan.phases["decode"]
    memory = int(call("cuMemAlloc", STRIDE * len(steps)))
    state = np.empty(STATE_WORDS, np.int32)
    call("cuMemcpyDtoH", state.ctypes.data, device._buffers["state"][0], state.nbytes)
    for i in range(len(steps)):
        call("cuMemcpyHtoD", memory + STRIDE * i, state.ctypes.data, state.nbytes)
        device._buffers[f"state {i}"] = (memory + STRIDE * i, "i32", STATE_WORDS)
    marked = []
    for i, step in enumerate(steps):
        args = tuple(
            replace(arg, name=f"state {i}") if arg.kind == "buffer" and arg.name == "state" else arg
            for arg in step.args
        )
        marked.append(replace(step, args=args))
    device.plan = replace(plan, kernels=tuple(kernels))
    graph = device._capture(tuple(marked))
    for _ in range(3):
        call("cuGraphLaunch", graph, device._stream)
    call("cuStreamSynchronize", device._stream)
    by_name, found = {kernel.name: kernel for kernel in kernels}, []
    for i, step in enumerate(steps):
        kernel = by_name[step.kernel]
        grid = kernel.launch(device.target).grid
        marks = np.zeros((grid[0] * grid[1], MARKS), np.int64)
        call("cuMemcpyDtoH", marks.ctypes.data, memory + STRIDE * i + STATE_WORDS * 4, marks.nbytes)
        found.append((kernel, marks))
    return found


def _show(model: Model, launches, layer: int) -> None:
    per_layer = (len(launches) - 3) // len(model.program.kv_layers)
    first = 1 + per_layer * layer
    for begin, end in ((first, first + 2 * per_layer), (len(launches) - 4, len(launches))):
        for i in range(begin, end):
            kernel, marks = launches[i]
            if kernel.op not in ("linear_records", "append_attention"):
                print(f"  {kernel.name}: no marks")
                continue
            before = launches[i - 1][1][:, ENDS].max()
            line = f"  {kernel.name[:38]:38}"
            for name, mark in (("start", STARTED), ("waits", WAITS), ("has", HAS), ("end", ENDS)):
                times = (marks[marks[:, mark] > 0, mark] - before) / 1e3
                line += f" {name} {times.min():6.1f} .. {times.max():6.1f}" if len(times) else f" {name} none"
            has = marks[marks[:, HAS] > 0]
            places = np.bincount(has[:, WHERE].astype(int), minlength=132)
            print(f"{line}  most on an SM {places.max()}, none on {(places == 0).sum()}", flush=True)


if __name__ == "__main__":
    main()
