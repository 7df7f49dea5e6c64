"""An application that needs no Python where it runs: answers one question with a model. See README.md here.

Usage: answer model.gqsa "Name three rivers."
"""

import sys

import gqsa_runtime


def main() -> None:
    gqsa_runtime.freeze_support()  # first: chat templates are rendered by another process of this program
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    path, question = sys.argv[1:]
    try:
        with gqsa_runtime.Model.open(path) as model:
            if model.has_chat_template:
                pieces = model.chat([{"role": "user", "content": question}], max_new_tokens=64)
            else:
                pieces = model.generate(question, max_new_tokens=64)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
    except gqsa_runtime.GqsaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
