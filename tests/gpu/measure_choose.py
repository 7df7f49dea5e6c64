"""Microseconds that the choice of the next token takes on this GPU, by vocabulary and by how it is chosen.

python -m tests.gpu.measure_choose [--vocab 128256]

A CUDA graph runs the kernel 32 times as a dependent chain, logits in the L2 cache, where a head leaves them. "peaked":
normal logits, and a few hundred above them that hold most of the mass, as a model makes them; "normal": deviation 3;
"flat": more tokens in an octave than are listed, the slow way. Each token is compared with sampling.choose.
"""

import argparse
import json

import numpy as np
from gqsa_runtime.engine import launch_state
from gqsa_runtime.operators import CHOOSE_PARTIAL, CHOOSE_SLICE
from gqsa_runtime.sampling import SamplingOptions, choose, first_draw

from gqsac.compiler.cuda_launch import launch
from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from tests.gpu.cuda_device import Gpu, GpuKernels
from tests.gpu.measure_linear import _time_graph

LAUNCHES = 32
OPTIONS = {
    "greedy": SamplingOptions(),
    "temperature": SamplingOptions(temperature=0.8),
    "top_p": SamplingOptions(temperature=0.8, top_p=0.95),
    "top_k": SamplingOptions(temperature=0.8, top_k=40),
    "all": SamplingOptions(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
}


def _logits(vocab: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(scale={"peaked": 2.0, "normal": 3.0, "flat": 0.01}[kind], size=vocab)
    if kind == "peaked":
        logits[rng.integers(0, vocab, 300)] += rng.normal(loc=8, scale=3, size=300)
    return logits.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 49152, 128256, 151936])
    options = parser.parse_args()
    gpu = Gpu()
    for vocab in options.vocab:
        spec = KernelSpec.make("choose", vocab=vocab)
        kernels = GpuKernels(gpu, name_kernels([spec]), gpu.target)
        sizes = (vocab, -(-vocab // CHOOSE_SLICE) * CHOOSE_PARTIAL, 1, 1, len(launch_state(1, 0, [0])))
        pointers = logits_at, _, counters, token_at, state_at = [gpu.allocate(4 * size) for size in sizes]
        gpu.upload(counters, np.zeros(1, np.int32))
        for kind in ("peaked", "normal", "flat"):
            logits = _logits(vocab, kind)
            gpu.upload(logits_at, logits)
            line = {"vocab": vocab, "logits": kind}
            for name, sampling in OPTIONS.items():
                draw = first_draw(sampling, seed=vocab)
                gpu.upload(state_at, launch_state(1, 0, [0], draw))
                steps = [(kernels.function(spec), launch(spec, 1, gpu.target), pointers)] * LAUNCHES
                line[f"{name}_us"] = round(1e6 * _time_graph(gpu, steps, gpu.target >= "sm_90") / LAUNCHES, 2)
                token = np.empty(1, np.int32)
                gpu.download(token, token_at)
                assert token[0] == choose(logits, draw), (vocab, kind, name)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
