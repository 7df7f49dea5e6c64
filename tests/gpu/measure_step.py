"""Where the time of a model's decode step goes on this GPU: on the host, in each operator, between them.

python -m tests.gpu.measure_step FILE [--contexts 128 1024] [--variants append_attention:_RUN_KEYS=128 …]

Prints, for each context, the step as a caller sees it, the graph of its launches alone, for one token and for four,
and what the graph takes without the launches of one operator after another: unlike `gqsac bench --profile`, with all
that neighbours hide of each other. A variant changes constants of gqsac.compiler, compiles the operator's
kernels anew and times the graph with them.
"""

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
from gqsa_runtime.engine import launch_state
from gqsa_runtime.model import Model

from gqsac.compiler import cuda_launch
from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.compile_cuda import compile_cuda
from gqsac.compiler.passes.render import headers, render
from tests.gpu.constants import changed_constants

REPEATS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--contexts", nargs="+", type=int, default=[128])
    parser.add_argument("--variants", nargs="*", default=[])
    options = parser.parse_args()
    with Model.open(options.file, device="cuda") as model:
        rng = np.random.default_rng(0)
        for context in options.contexts:
            model.engine.reset()
            model.engine.prefill(rng.integers(0, model.program.vocab_size, context))
            _host(model, rng)
            _few(model)
            for n_tokens, phase in ((1, "decode"), (4, "few_body")):
                model.engine._upload(np.ones(n_tokens, np.int32))
                _operators(model, context, phase)
            model.engine._upload(np.ones(1, np.int32))
            for variant in options.variants:
                _variant(model, variant)


def _host(model: Model, rng) -> None:
    """A step as a caller sees it, and its parts on the host. The cache is one token shorter afterwards."""
    device, engine, times = model.device, model.engine, {}

    def timed(name, function, *args):
        began = time.perf_counter()
        result = function(*args)
        times.setdefault(name, []).append(1e6 * (time.perf_counter() - began))
        return result

    token, position = 1, engine.position
    for i in range(REPEATS):
        ids, state = np.array([token], np.int32), launch_state(engine.context, 0, [position + i])
        began = time.perf_counter()
        timed("upload", lambda ids, state: (device.upload("tokens", ids), device.upload("state", state)), ids, state)
        timed("launch", device.launch, "decode")
        token = timed("download", device.download, "argmax", 1)[0]
        times.setdefault("step", []).append(1e6 * (time.perf_counter() - began))
    print("host: " + ", ".join(f"{name} {statistics.median(all_us):.1f} us" for name, all_us in times.items()))


def _few(model: Model) -> None:
    """Steps of several tokens of one sequence, as a caller sees them."""
    position = model.engine.position
    for n_tokens in (1, 2, 4, 8):
        seconds = []
        for _ in range(REPEATS):
            model.engine.rewind(position)
            began = time.perf_counter()
            model.engine.prefill([1] * n_tokens)
            seconds.append(time.perf_counter() - began)
        print(f"{n_tokens} tokens, to the last one's logits: {1e6 * statistics.median(seconds):.1f} us")
    model.engine.rewind(position)


def _graph_us(device, steps) -> float:
    graph = device._capture(tuple(steps))
    seconds = device._median_seconds(REPEATS, "cuGraphLaunch", graph)
    return 1e6 * seconds


def _operators(model: Model, context: int, phase: str) -> None:
    device = model.device
    device._copy_beginnings()
    steps = device.plan.phases[phase]
    kernels = {kernel.name: kernel for kernel in device.plan.kernels}
    whole = _graph_us(device, steps)
    print(f"context {context}: the graph of {phase} {whole:.1f} us, {len(steps)} launches")
    for name in dict.fromkeys(step.kernel for step in steps):
        others = [step for step in steps if step.kernel != name]
        without, n = _graph_us(device, others), len(steps) - len(others)
        print(f"  without {n:3} x {name:60} {without:8.1f}: {(whole - without) / n:6.2f} us each")
    attention = [step for step in steps if kernels[step.kernel].op != "append_attention"]
    blocks = [step for step in attention if "linear_records" in kernels[step.kernel].op]
    print(f"  linears alone {_graph_us(device, blocks):.1f}", flush=True)


def _variant(model: Model, variant: str) -> None:
    op, _, changes = variant.partition(":")
    device, plan = model.device, model.device.plan
    functions = dict(device._functions)
    try:
        with changed_constants(filter(None, changes.split(","))):
            kernels = []
            for kernel in plan.kernels:
                if kernel.op == op and kernel.params.get("tokens", 1) == 1:
                    spec = KernelSpec.make(kernel.op, **kernel.params)
                    source = render("cuda", spec, kernel.name)
                    data = compile_cuda(source, device.target, kernel.name, headers("cuda")).data
                    kernel = replace(kernel, launches=cuda_launch.launches(spec, 1))
                    device._functions[kernel.name] = load_function(data, kernel, device.target)
                kernels.append(kernel)
            device.plan = replace(plan, kernels=tuple(kernels))
            print(f"  {variant}: {_graph_us(device, plan.phases['decode']):.1f} us", flush=True)
    finally:
        device.plan = plan
        device._functions.update(functions)


def load_function(data: bytes, kernel, target: str):
    """The kernel of a cubin, set up as the runtime sets it up."""
    from gqsa_runtime.device_cuda import _driver, call

    attributes = _driver().CUfunction_attribute
    function = call("cuModuleGetFunction", call("cuModuleLoadData", data + b"\0"), kernel.name.encode())
    shared = kernel.launch(target).shared_bytes
    call("cuFuncSetAttribute", function, attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
    call("cuFuncSetAttribute", function, attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
    return function


if __name__ == "__main__":
    main()
