"""Counts the instructions that linear_records takes for a tile of 16 rows by 64 columns on 64-bit Arm, emulated.

    python -m tests.kernels.measure_arm

For one token, and for each of 4 and of 16: what all of a kernel takes, divided by its tiles. How long they take, an
emulator does not know.
"""

import numpy as np
from gqsa_runtime.engine import launch_state
from gqsa_runtime.layouts import RECORDS
from gqsa_runtime.layouts.records import make_plan
from gqsa_runtime.operators import OPERATORS

from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.compile_cpu import compile_cpu
from gqsac.compiler.passes.render import render
from tests.kernels.arm_emulation import ArmLibrary
from tests.kernels.random_records import random_keep, random_matrix

ROWS, K = 256, 512
KINDS = [(1, "all"), (2, "all"), (3, "all"), (4, "all"), (8, "all"), (2, "groups"), (4, "groups"), (8, "groups")]


def per_tile(target: str, width: int, pattern: str, tokens: int) -> float:
    """Instructions for a tile and a token. pattern: which groups are kept, as in `random_keep`."""
    matrix = random_matrix(ROWS, K, np.full(ROWS, width), random_keep(ROWS, K, pattern), scale=K**-0.5)
    plan = make_plan(matrix.row_bits, K, matrix.keep)
    params = {
        "rows": ROWS, "k": K, "x_stride": K, "out_width": ROWS, "out_stride": ROWS, "residual_stride": ROWS,
        "bias": False, "residual": False, "activation": "none", "epilogue": "rows", "norm": "none", "eps": 0.0,
        **plan.constants,
    }  # fmt: skip
    spec = KernelSpec.make("linear_records", tokens=tokens, **params)
    library = ArmLibrary(compile_cpu({"linear": render("cpu", spec, "linear")}, target), target.endswith("dotprod"))
    arguments = {part.name: RECORDS.pack(part.name, (matrix, plan), params) for part in RECORDS.parts}
    arguments["x"] = np.ones((tokens, K), np.float32)
    arguments["planes"], arguments["ranges"] = (
        np.ones((tokens, 2 * K), np.int8),
        np.ones((tokens, K // 64, 2), np.float32),
    )
    arguments["out"], arguments["state"] = (
        np.zeros((tokens, ROWS), np.float32),
        launch_state(tokens, 0, np.arange(tokens)),
    )
    library.count_instructions()
    library.run("linear", [arguments.get(operand.name) for operand in OPERATORS[spec.op].operands], 1)
    return library.instructions / (tokens * ROWS / 16 * K / 64)


def main() -> None:
    print(f"{'':24}" + "".join(f"{'S50 ' * (pattern == 'groups')}W{width}".rjust(9) for width, pattern in KINDS))
    for target in ("aarch64", "aarch64_dotprod"):
        for tokens in (1, 4, 16):
            counts = [per_tile(target, *kind, tokens) for kind in KINDS]
            print(f"{target:16} {tokens:2} tokens" + "".join(f"{count:9.0f}" for count in counts), flush=True)


if __name__ == "__main__":
    main()
