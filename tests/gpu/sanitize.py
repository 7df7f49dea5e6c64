"""Runs every kernel case once, for compute-sanitizer to watch:

compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.gpu.sanitize
(also --tool racecheck, initcheck and synccheck). Any argument is a word that a case's name must hold.
"""

import sys

from tests.gpu.cuda_device import Gpu, GpuKernels
from tests.kernels.cases import CUDA_CASES, CUDA_NAMES


def main(words: list[str]) -> int:
    gpu = Gpu()
    cases = [case for case in CUDA_CASES if all(word in case.name for word in words)]
    names = {case.spec: CUDA_NAMES[case.spec] for case in cases}
    kernels = GpuKernels(gpu, names, gpu.target)
    wrong = 0
    for case in cases:
        problem = case.build()
        kernels.run(problem, case.max_tokens)
        try:
            problem.check()
        except AssertionError as error:
            wrong += 1
            print(f"{case.name}: {error}", file=sys.stderr)
    print(f"{len(cases)} cases on {gpu.target}, {wrong} wrong", file=sys.stderr)
    return 1 if wrong or not cases else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
