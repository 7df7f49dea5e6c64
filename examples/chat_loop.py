"""A chat that keeps its history. Usage: python chat_loop.py model.gqsa (an empty line ends it).

Each turn renders the whole conversation again, but only what is new since the last turn is computed.
"""

import sys

from gqsa_runtime import Model


def main(path: str) -> None:
    messages = [{"role": "system", "content": "Answer in one short sentence."}]
    with Model.open(path) as model:
        while line := sys.stdin.readline().strip():
            messages.append({"role": "user", "content": line})
            answer = ""
            for piece in model.chat(messages, max_new_tokens=128):
                print(piece, end="", flush=True)
                answer += piece
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(sys.argv[1])
