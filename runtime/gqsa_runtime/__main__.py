"""`python -m gqsa_runtime` is the command `gqsa`."""

from gqsa_runtime.cli import main

if __name__ == "__main__":
    main()
