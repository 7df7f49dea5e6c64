"""Speed of the prefill linears of LLaMA-7B over records on this GPU, beside half-precision cuBLAS.

python -m tests.gpu.measure_matmul [--weights w4 w4-groups …] [--tokens 128 512 2048] [--variants NAME=VALUE,… …]

Times each of a block's four linears, and the operator that makes their activations, over three copies of the weights
in turn. Prints TFLOP/s of each, as if nothing had been removed, and what the linears alone allow in tokens/s. A
variant changes constants of gqsac.compiler. cuBLAS is measured through PyTorch, where there is one.
"""

import argparse

import numpy as np
from gqsa_runtime.operators import state_elements

from gqsac.compiler.cuda_launch import launch
from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from tests.gpu.constants import changed_constants
from tests.gpu.cuda_device import Gpu, GpuKernels
from tests.gpu.measure_linear import _time_graph
from tests.gpu.measure_records import DISTINCT, HIDDEN, INNER, KINDS, LINEARS, _linear

LAYERS, REPEATS = 32, 6
WIDEST = 3 * HIDDEN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["w4", "w4-groups", "w4-tiles", "w2"], choices=KINDS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128, 512, 2048])
    parser.add_argument("--variants", nargs="*", default=[""])
    parser.add_argument("--target", help="compute_80, say, for the path of GPUs before this one")
    options = parser.parse_args()
    gpu = Gpu()
    for tokens in options.tokens:
        _measure_cublas(tokens)
    most = max(options.tokens)
    x, halves, scales, out, norm, state = (
        gpu.allocate(n)
        for n in (4 * most * INNER, 2 * most * INNER, 4 * most, 4 * most * WIDEST, 4 * INNER, 4 * state_elements(most))
    )
    rng = np.random.default_rng(0)
    gpu.upload(x, rng.normal(size=most * INNER).astype(np.float32))
    gpu.upload(norm, np.ones(INNER, np.float32))
    for kind in options.weights:
        weights = [_linear(gpu, rows, k, *KINDS[kind], changes) for rows, k, changes in LINEARS]
        for variant in options.variants:
            with changed_constants(filter(None, variant.split(","))):
                _variant(gpu, kind, variant, weights, (x, halves, scales, out, norm, state), options)
        for _, _, blobs, _ in weights:
            for blob in blobs:
                for address in blob:
                    gpu.free(address)


def _variant(gpu: Gpu, kind: str, variant: str, weights: list, buffers: tuple[int, ...], options) -> None:
    x, halves, scales, out, norm, state = buffers
    specs = [_spec(params) for params, *_ in weights]
    makers = [
        KernelSpec.make("halves", tokens=128, x_stride=k, k=k, norm=changes.get("norm", "none"), eps=1e-6)
        for _, k, changes in LINEARS
    ]
    target = options.target or gpu.target
    kernels = GpuKernels(gpu, name_kernels([*specs, *makers]), target)
    for tokens in options.tokens:
        gpu.upload(state, np.array([tokens, tokens] + [0, 0] * tokens, np.int32))
        times, making = [], []
        for spec, maker, (_, _, blobs, _), (_, _, changes) in zip(specs, makers, weights, LINEARS, strict=True):
            weight = norm if "norm" in changes else None
            make = (kernels.function(maker), launch(maker, tokens), [x, weight, None, halves, scales, state])
            making.append(_time_graph(gpu, [make] * REPEATS, True) / REPEATS)
            steps = [
                (
                    kernels.function(spec),
                    launch(spec, tokens, target),
                    [halves, scales, *blobs[i % DISTINCT], None, x if spec["residual"] else None, out, state],
                )
                for i in range(REPEATS)
            ]
            times.append(_time_graph(gpu, steps, True) / REPEATS)
        _report(f"{kind:10}", tokens, times, variant, sum(making))


def _spec(params) -> KernelSpec:
    changed = {name: value for name, value in params.items() if name not in ("norm", "eps", "x_stride")}
    return KernelSpec.make("matmul_records", **{**changed, "tokens": 128})


def _report(who: str, tokens: int, times: list[float], variant: str = "", making: float = 0.0) -> None:
    flops = [2 * rows * k * tokens for rows, k, _ in LINEARS]
    each = " ".join(f"{flop / seconds / 1e12:5.0f}" for flop, seconds in zip(flops, times, strict=True))
    total = sum(times)
    print(
        f"{who} {tokens:5} tokens  qkv o gate_up down {each} TFLOP/s, all {sum(flops) / total / 1e12:5.0f}, "
        f"{total * 1e6:7.1f} us a block ({making * 1e6:5.1f} us activations), "
        f"{tokens / (LAYERS * (total + making)):8.0f} tokens/s  {variant}",
        flush=True,
    )


def _measure_cublas(tokens: int) -> None:
    try:
        import torch
    except ImportError:
        return
    times = []
    for rows, k, _ in LINEARS:
        weights = [torch.randn(rows, k, dtype=torch.float16, device="cuda") for _ in range(DISTINCT)]
        x = torch.randn(tokens, k, dtype=torch.float16, device="cuda")
        best = float("inf")
        for turn in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for i in range(20):
                torch.nn.functional.linear(x, weights[i % DISTINCT])
            end.record()
            torch.cuda.synchronize()
            if turn:
                best = min(best, start.elapsed_time(end) / 20e3)
        times.append(best)
        del weights
    _report("cuBLAS f16", tokens, times)


if __name__ == "__main__":
    main()
