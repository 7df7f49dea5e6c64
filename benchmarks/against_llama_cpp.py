"""Decode on a CPU beside llama.cpp's, in turn on the same machine, each pair with the same instructions.

    python benchmarks/against_llama_cpp.py --gqsa model.gqsa --gguf model.Q4_0.gguf --threads 2 \\
        --pair best=x86_64_v4_vnni,llama-bench-avx512 --pair avx2=x86_64_v3,llama-bench-avx2

A pair is NAME=TARGET,BINARY[,BINARY…]: one of the file's CPU targets, and builds of llama.cpp's llama-bench, each run
without and with flash attention. A round runs each side once, in a process of its own; a process loads its model, warms
up, and decodes --tokens tokens behind --depth others, --repeats times. Other programs only take time, so the best of
all rounds is compared, and the medians beside it. Steps of gqsac choose the next token, those of llama-bench do not.
Pin both sides with `taskset -c 2,3 python …` where the machine has more cores than --threads.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gqsa", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="llama.cpp's file of the same model")
    parser.add_argument("--pair", action="append", default=[], metavar="NAME=TARGET,BINARY[,…]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=128, help="tokens in the cache before the first timed step")
    parser.add_argument("--tokens", type=int, default=64, help="timed steps")
    parser.add_argument("--repeats", type=int, default=3, help="of those steps in a process")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write all samples here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(_decode(args)))
        return 0
    if args.gguf is None or not args.pair:
        parser.error("--gguf and at least one --pair are needed")
    report = {"cpu": _cpu(), "cpus": sorted(os.sched_getaffinity(0)), "threads": args.threads, "pairs": {}}
    pairs = dict(pair.split("=", 1) for pair in args.pair)
    for round_ in range(args.rounds):
        for name, pair in pairs.items():
            target, *binaries = pair.split(",")
            sides = {"gqsac": lambda target=target: _ours(args, target)}
            for binary in binaries:
                for flash in (0, 1):
                    key = f"{Path(binary).name} -fa {flash}"
                    sides[key] = lambda binary=binary, flash=flash: _theirs(args, binary, flash)
            samples = report["pairs"].setdefault(name, {"target": target, "tokens_per_s": {}})["tokens_per_s"]
            for key, run in sides.items():
                samples.setdefault(key, []).extend(run())
        print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr)
    _show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _ours(args: argparse.Namespace, target: str) -> list[float]:
    """Tokens per second, one number a repeat."""
    command = [sys.executable, __file__, "--worker", "--gqsa", str(args.gqsa)]
    for name in ("threads", "depth", "tokens", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    return json.loads(_output(command, {**os.environ, "GQSA_CPU_TARGET": target}))


def _decode(args: argparse.Namespace) -> list[float]:
    import numpy as np
    from gqsa_runtime import Model
    from gqsa_runtime.sequence import Sequence

    speeds = []
    with Model.open(args.gqsa, device="cpu", threads=args.threads, context=args.depth + args.tokens + 1) as model:
        prompt = np.random.default_rng(0).integers(0, model.program.vocab_size, args.depth)
        for _ in range(args.repeats + 1):
            sequence = Sequence()
            token = model.engine.extend_choosing(sequence, prompt)
            began_s = time.perf_counter()
            for _ in range(args.tokens):
                token = model.engine.extend_choosing(sequence, [token])
            speeds.append(args.tokens / (time.perf_counter() - began_s))
    return speeds[1:]  # the first warms up


def _theirs(args: argparse.Namespace, binary: str, flash: int) -> list[float]:
    """Tokens per second, one number a repeat."""
    command = [binary, "-m", str(args.gguf), "-p", "0", "-n", str(args.tokens), "-d", str(args.depth)]
    command += ["-r", str(args.repeats), "-t", str(args.threads), "-fa", str(flash), "-o", "json"]
    (found,) = json.loads(_output(command, dict(os.environ)))
    return found["samples_ts"]


def _output(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _cpu() -> str:
    with open("/proc/cpuinfo") as lines:
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())


def _show(report: dict) -> None:
    print(f"{report['cpu']}, CPUs {report['cpus']}, {report['threads']} threads")
    print("| pair | side | best, tokens/s | median | against it: best, median |\n|---|---|---|---|---|")
    for name, pair in report["pairs"].items():
        samples = pair["tokens_per_s"]
        ours = samples["gqsac"]
        for side, speeds in samples.items():
            best, middle = max(speeds), statistics.median(speeds)
            against = f"{max(ours) / best:.3f}, {statistics.median(ours) / middle:.3f}"
            shown = f"gqsac {pair['target']} | {best:.1f} | {middle:.1f} | " if side == "gqsac" else (
                f"{side} | {best:.1f} | {middle:.1f} | {against}"
            )  # fmt: skip
            print(f"| {name} | {shown} |")


if __name__ == "__main__":
    sys.exit(main())
