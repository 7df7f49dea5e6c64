"""One model, many threads: every answer is the one that a single thread gets, and closing never crashes.

Each check runs in a process of its own, because what it guards against ends the process.
"""

import subprocess
import sys
import textwrap

import pytest
from gqsa_runtime.device_cpu import supported_targets

from tests.e2e.checkpoints import save_checkpoint
from tests.e2e.command import TARGET, succeed

pytestmark = pytest.mark.skipif(not supported_targets(), reason="this CPU runs none of gqsac's kernels")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("threads")
    source = save_checkpoint(folder / "llama", "llama")
    succeed("build", source, "-o", folder / "model.gqsa", "--bits", 4, "--target", TARGET)
    return folder / "model.gqsa"


def run(code: str, artifact) -> str:
    """What a process prints that runs `code` with the open model as `model`."""
    head = """
        import sys, threading, time
        import numpy as np
        from gqsa_runtime import Model
        from gqsa_runtime.errors import ClosedError

        def together(function, arguments):
            results = [None] * len(arguments)
            def work(index):
                results[index] = function(arguments[index])
            threads = [threading.Thread(target=work, args=(index,)) for index in range(len(arguments))]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            return results

        model = Model.open(sys.argv[1], device="cpu", threads=2)
    """
    script = textwrap.dedent(head) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def test_scores_from_many_threads(artifact):
    out = run(
        """
        texts = [f"It was the {word} of times, " * 9 for word in ("best", "worst", "age", "epoch")]
        alone = [model.score(text).log_probs for text in texts]
        def score(index):
            return sum(not np.array_equal(model.score(texts[index]).log_probs, alone[index]) for _ in range(30))
        print("wrong", sum(together(score, range(4))))
        """,
        artifact,
    )
    assert out == "wrong 0\n"


def test_generations_from_many_threads(artifact):
    out = run(
        """
        prompts = ["It was the best", "Call me", "In a hole in", "All happy families"]
        alone = ["".join(model.generate(prompt, max_new_tokens=24)) for prompt in prompts]
        def generate(prompt):
            return "".join(model.generate(prompt, max_new_tokens=24))
        print("right", sum(together(generate, prompts) == alone for _ in range(6)))
        """,
        artifact,
    )
    assert out == "right 6\n"


@pytest.mark.parametrize("call", ['list(model.generate("It was", max_new_tokens=300))', 'model.score("times " * 40)'])
def test_closing_while_another_thread_works(artifact, call):
    out = run(
        f"""
        ended = []
        for delay in range(12):
            model = Model.open(sys.argv[1], device="cpu", threads=2)
            def work():
                try:
                    while True:
                        {call}
                except ClosedError as error:
                    ended.append(str(error))
            worker = threading.Thread(target=work)
            worker.start()
            time.sleep(0.003 * delay)
            model.close()
            worker.join()
        print(len(ended), set(ended))
        """,
        artifact,
    )
    assert out == "12 {'the model is closed'}\n"
