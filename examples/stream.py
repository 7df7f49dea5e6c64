"""Prints a model's text as it is made. Usage: python stream.py model.gqsa "Once upon a time"."""

import sys

from gqsa_runtime import Model


def main(path: str, prompt: str) -> None:
    with Model.open(path) as model:
        for piece in model.generate(prompt, max_new_tokens=64, temperature=0.8, top_p=0.95, seed=1):
            print(piece, end="", flush=True)
        print()
        stats = model.stats
        print(
            f"{stats.new_tokens} tokens, {stats.decode_tokens_per_second:.1f} per second on {model.device.name}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(*sys.argv[1:3])
