"""Ranks sentences by how likely a model finds them. Usage: python score.py model.gqsa "A sentence." "Another."."""

import sys

from gqsa_runtime import Model


def main(path: str, *sentences: str) -> None:
    with Model.open(path) as model:
        scored = [(model.score(sentence), sentence) for sentence in sentences]
    for score, sentence in sorted(scored, key=lambda pair: -pair[0].log_probs.mean()):
        print(f"{score.log_probs.mean():8.3f} per token, {score.greedy.mean():4.0%} greedy  {sentence}")


if __name__ == "__main__":
    main(*sys.argv[1:])
