"""Does an artifact compute what its checkpoint says? Greedy tokens and perplexity beside transformers.

    python benchmarks/parity.py smollm2/ smollm2.gqsa --text wiki.test.raw --window 2048 --device cpu

The reference is transformers in fp32 on the dequantised weights (on a GPU where there is one), with the head and the
table of tokens as the artifact holds them, so that what differs is arithmetic. Greedy tokens must be identical where
activations are f32 (`--exact`), and otherwise identical or first differ where the reference's two best logits lie
within 2e-2; perplexities must agree within 0.1 %. Exits with 1 otherwise. --head also scores the checkpoint's own head.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from gqsa_runtime import Model
from gqsa_runtime.operators import OPERATORS
from gqsa_runtime.perplexity import perplexity as artifact_perplexity
from gqsa_runtime.reader import ArtifactFile
from transformers import AutoModelForCausalLM

import gqsac  # noqa: F401  registers the "gqsa" quantisation method
from gqsac.evaluate.perplexity import perplexity as torch_perplexity

PROMPTS = (
    "The capital of France is",
    "It was a dark and stormy night, and the old man",
    "The most important thing about mathematics is",
    "She opened the letter slowly, and when she had read it",
    "In the year 1850 the railway between the two towns",
)
N_TOKENS = 64
MAX_GAP = 2e-2
MAX_PERPLEXITY_RATIO = 1.001


def compare_greedy(model: Model, reference, prompt: str) -> dict:
    """Feeds both with the reference's greedy tokens; reports the first difference and logit errors."""
    ids = model.tokenize(prompt)
    model.engine.reset()
    ours = model.engine.prefill(ids)
    device = reference.device
    with torch.inference_mode():
        out = reference(torch.tensor([ids], device=device), use_cache=True)
        errors = []
        for step in range(N_TOKENS):
            theirs = out.logits[0, -1].float().cpu().numpy()
            errors.append(float(np.abs(ours - theirs).max()))
            token = int(theirs.argmax())
            if int(ours.argmax()) != token:
                second, best = np.sort(theirs)[-2:]
                return {"prompt": prompt, "same": step, "gap": float(best - second), "error": max(errors)}
            if step < N_TOKENS - 1:
                ours = model.engine.decode(token)
                out = reference(
                    torch.tensor([[token]], device=device), past_key_values=out.past_key_values, use_cache=True
                )
    return {"prompt": prompt, "same": N_TOKENS, "gap": None, "error": max(errors)}


def adopt_head(reference, file: ArtifactFile, family: str) -> None:
    """Gives the reference the artifact's head and table of tokens, which a build may round."""
    plan = file.program.plans[family]
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    for step in plan.phases["decode"]:
        kernel = kernels[step.kernel]
        operator, params = OPERATORS[kernel.op], kernel.params
        given = {operand.name: arg for operand, arg in zip(operator.operands, step.args, strict=True)}
        if kernel.op == "embedding_records":
            theirs = reference.get_input_embeddings()
        elif operator.layout is not None and given.get("out") and given["out"].name == "logits":
            theirs = reference.get_output_embeddings()
        else:
            continue
        arrays = {part.name: file.read(given[part.name].named) for part in operator.layout.parts}
        theirs.weight.data = torch.tensor(operator.layout.unpack(arrays, params)).to(theirs.weight.device)


def is_exact(model: Model) -> bool:
    """Whether no linear rounds its activations."""
    return not any(kernel.op.endswith("_records") for kernel in model.program.plans[model.family].kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--head", action="store_true", help="with --text: perplexity with the checkpoint's head, too")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    where = "cuda" if torch.cuda.is_available() else "cpu"
    reference = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).to(where).eval()
    report = {"artifact": args.artifact.name, "device": args.device, "prompts": []}
    failed = False
    with Model.open(args.artifact, device=args.device) as model:
        if args.text:
            text = args.text.read_text(encoding="utf-8")
            ids, window = model.tokenize(text), {"window": args.window, "max_windows": args.max_windows}
            if args.head:
                report["own_head"] = torch_perplexity(reference, ids, **window).perplexity
                print(f"perplexity with the checkpoint's own head {report['own_head']:.4f}", file=sys.stderr)
        with ArtifactFile.open(args.artifact) as file:
            adopt_head(reference, file, model.family)
        for prompt in PROMPTS:
            result = compare_greedy(model, reference, prompt)
            failed |= result["gap"] is not None and (is_exact(model) or result["gap"] >= MAX_GAP)
            report["prompts"].append(result)
            gap = "" if result["gap"] is None else f", gap of the two best {result['gap']:.1e}"
            print(
                f"{result['same']:3d}/{N_TOKENS} tokens the same{gap}, largest logit error {result['error']:.1e}",
                file=sys.stderr,
            )
        if args.text:
            ours = artifact_perplexity(model, text, stride=args.window, **window)
            theirs = torch_perplexity(reference, ids, **window).perplexity
            ratio = ours.perplexity / theirs
            failed |= not 1 / MAX_PERPLEXITY_RATIO <= ratio <= MAX_PERPLEXITY_RATIO
            report |= {
                "perplexity": ours.perplexity, "reference": theirs, "tokens": ours.n_tokens,
                "tokens_per_s": ours.n_tokens / ours.seconds,
            }  # fmt: skip
            print(
                f"perplexity {ours.perplexity:.4f}, reference {theirs:.4f} over {ours.n_tokens} tokens "
                f"({ours.n_tokens / ours.seconds:.0f} tokens/s)",
                file=sys.stderr,
            )
    report["passed"] = not failed
    if args.json:
        print(json.dumps(report, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
