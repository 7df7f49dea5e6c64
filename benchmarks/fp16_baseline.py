"""Decode speed of the same model in fp16 with PyTorch, to stand beside `gqsac bench` in one run on one GPU.

    python benchmarks/fp16_baseline.py llama-7b --at 128 1024

Two baselines, weights random: `linears`, only the linears (cuBLAS, one token, in a CUDA graph), which
no fp16 engine can undercut by much; and `transformers`, the whole model with a static KV cache under
torch.compile, which is what PyTorch users get. Prints JSON.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from benchmarks.random_checkpoint import CONFIGS

STEPS = 64


def time_linears(model) -> float:
    """Seconds of all linears on one token, each reading its own weights, in one CUDA graph; the median."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {layer.in_features: torch.randn(1, layer.in_features, device="cuda").half() for layer in layers}

    def run():
        for layer in layers:
            torch.nn.functional.linear(inputs[layer.in_features], layer.weight)

    with torch.inference_mode():
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return time_on_gpu(graph.replay)


def time_on_gpu(function, repeats: int = 20) -> float:
    """Median seconds between CUDA events around `function`."""
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def time_decode(model, context: int, compiled: bool) -> tuple[float, float]:
    """(median seconds of a decode step after `context` tokens, seconds until the first compiled step)."""
    cache = StaticCache(config=model.config, max_cache_len=context + STEPS + 8)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if compiled else model.forward
    token = torch.ones(1, 1, dtype=torch.long, device="cuda")
    times = []
    with torch.inference_mode():
        model(torch.ones(1, context, dtype=torch.long, device="cuda"), past_key_values=cache, use_cache=True)
        began = time.perf_counter()
        for step in range(STEPS + 4):
            position = torch.tensor([context + step], device="cuda")
            start = time.perf_counter()
            logits = forward(
                token, past_key_values=cache, cache_position=position, position_ids=position[None], use_cache=True
            ).logits
            int(logits[0, -1].argmax())  # what a decode loop must wait for
            times.append(time.perf_counter() - start)
            if step == 3:
                warm_s = time.perf_counter() - began
    return statistics.median(times[4:]), warm_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(CONFIGS))
    parser.add_argument("--at", type=int, nargs="+", default=[128])
    parser.add_argument("--no-compile", action="store_true", help="Leave out torch.compile, which takes a minute.")
    args = parser.parse_args()
    config = dict(CONFIGS[args.model])
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    torch.set_default_device("cuda")
    torch.set_default_dtype(torch.float16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cuda").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config, device="cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    torch.set_default_device("cpu")
    torch.set_default_dtype(torch.float32)

    n_bytes = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed_tokens" not in n)
    linears_s = time_linears(model)
    report = {
        "model": args.model,
        "gpu": torch.cuda.get_device_name(),
        "weights_gb": n_bytes / 1e9,
        "linears": {"ms": 1e3 * linears_s, "tokens_per_s": 1 / linears_s, "gb_per_s": n_bytes / 1e9 / linears_s},
        "transformers": [],
    }
    for context in args.at:
        seconds, warm_s = time_decode(model, context, not args.no_compile)
        report["transformers"].append(
            {
                "context": context,
                "compiled": not args.no_compile,
                "decode_ms": 1e3 * seconds,
                "decode_tokens_per_s": 1 / seconds,
                "warm_up_s": warm_s,
            }
        )
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
