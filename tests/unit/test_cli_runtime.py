"""The command `gqsa`: what goes to which stream, exit codes, and what a fresh interpreter loads."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import pytest
from click.testing import CliRunner
from gqsa_runtime import Model, cli, load, memory
from gqsa_runtime import model as model_module
from gqsa_runtime.doctor import examine, examine_file, render
from gqsa_runtime.errors import InputError

from tests.format import gguf_bytes, tiny
from tests.unit import fake_device

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclass(frozen=True)
class Sized:
    size: int


@pytest.fixture
def gqsa(monkeypatch):
    """Runs `gqsa` in this process over the fake device; answer: what the model says after each prompt."""

    def run(*args, stdin=None, answer=None, prompt=""):
        def open_fake(kind, ordinal, program, tensors, binaries, context, threads, clock):
            return fake_device.FakeDevice(program, context, script)

        script = None
        if answer is not None:
            model = fake_device.model()
            script = [*model.tokenize(prompt), *model.tokenize(answer)]
        monkeypatch.setattr(load, "_open", open_fake)
        monkeypatch.setattr(load, "probe", lambda kind, program, ordinal: (kind == "cpu", f"about {kind}"))
        result = CliRunner().invoke(_Main(), args, input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


class _Main(cli.click.Command):
    """`cli.main` as a command, so that CliRunner can catch its streams."""

    def __init__(self):
        super().__init__("gqsa")

    def main(self, args=None, prog_name=None, **extra):
        cli.main(args=list(args or ()), prog_name="gqsa")


def test_run_puts_text_alone_on_stdout(gqsa, path):
    result = gqsa("run", path, "--raw", "--prompt", "Once", "--stats", answer=" upon", prompt="Once")
    assert (result.exit_code, result.stdout) == (0, " upon\n")
    assert "device cpu: about cpu; no GPU: about cuda" in result.stderr
    assert "generated 6" in result.stderr and "finished: stop" in result.stderr


def test_run_reads_the_prompt_from_stdin(gqsa, path):
    assert gqsa("run", path, "--raw", stdin="Once", answer=" upon", prompt="Once").stdout == " upon\n"


def test_a_session_is_made_and_gone_on_from(gqsa, path, tmp_path):
    session = tmp_path / "once.session"
    arguments = ("run", path, "--raw", "--prompt", "Once", "--stats", "--session", str(session))
    first = gqsa(*arguments, answer=" upon", prompt="Once")
    assert first.exit_code == 0 and "(0 kept)" in first.stderr and session.exists()
    again = gqsa(*arguments, answer=" upon", prompt="Once")
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert "tokens are in the cache" in again.stderr and "(0 kept)" not in again.stderr
    session.write_bytes(session.read_bytes()[:-1])
    damaged = gqsa(*arguments, answer=" upon", prompt="Once")
    assert damaged.exit_code == 1 and "is damaged" in damaged.stderr and damaged.stdout == ""


def test_a_session_that_could_not_be_written_is_told_before_anything_is_done(gqsa, path, tmp_path, monkeypatch):
    monkeypatch.setattr(model_module.Model, "open", lambda *args, **options: pytest.fail("opened"))
    result = gqsa("run", path, "--raw", "-p", "Once", "--session", str(tmp_path / "missing" / "x"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the session cannot be written: there is no folder" in result.stderr


def test_run_uses_the_chat_template_unless_raw(gqsa, path):
    prompt = "<s>[user]Hi\n[assistant]"
    assert gqsa("run", path, "-p", "Hi", "--context", "32", answer="Yo", prompt=prompt).stdout == "Yo\n"


def test_no_process_is_started_where_no_chat_template_is_used(gqsa, path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("started"))
    assert gqsa("run", path, "--raw", "-p", "Once", answer=" upon", prompt="Once").stdout == " upon\n"
    assert gqsa("inspect", path).exit_code == 0


def test_sampling_options_reach_the_model(gqsa, path):
    args = ("run", path, "--raw", "-p", "x", "--temperature", "1", "--max-new-tokens", "12")
    first, again, other = (gqsa(*args, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other
    result = gqsa("run", path, "--raw", "-p", "a", "--stop", "ND", answer=" END", prompt="a")
    assert result.stdout == " E\n"


def test_the_end_of_the_context(gqsa, path):
    result = gqsa("run", path, "--raw", "-p", "ab", "--context", "8", "--max-new-tokens", "30")
    assert result.exit_code == 0 and "the context of 8 tokens is full, so the text ends here" in result.stderr
    shifted = ("--context-shift", "--keep", "2", "--stats")
    result = gqsa("run", path, "--raw", "-p", "ab", "--context", "8", "--max-new-tokens", "30", *shifted)
    assert result.exit_code == 0 and "is full" not in result.stderr and "the context was shifted" in result.stderr
    result = gqsa("chat", path, "--max-new-tokens", "30", "--temperature", "0", stdin="abc\n")
    assert "the context of 32 tokens is full, so the text ends here" in result.stderr
    result = gqsa("run", path, "-p", "ab", "--keep", "2")
    assert result.exit_code == 1 and "without context_shift" in result.stderr


def test_chat(gqsa, path):
    result = gqsa("chat", path, "--temperature", "0", stdin="Hi\n\n/reset\nHi\n/exit\nnever\n", answer="Yo",
                  prompt="<s>[user]Hi\n[assistant]")  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "Yo\nYo\n")
    assert gqsa("chat", path, stdin="").exit_code == 0


def test_options_are_checked_before_the_model_is_loaded(gqsa, path, monkeypatch):
    monkeypatch.setattr(load, "open_device", lambda *args: pytest.fail("loaded"))
    for command in ("run", "chat"):
        result = gqsa(command, path, "--top-p", "2", stdin="Hi")
        assert result.exit_code == 1 and "top_p is 2.0" in result.stderr


def test_chat_forgets_the_oldest_where_the_context_is_full(gqsa, path):
    result = gqsa("chat", path, "--max-new-tokens", "1", stdin="abc\n" * 4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 4
    assert "the context of 32 tokens is full: the oldest" in result.stderr


def test_a_message_that_is_too_long_does_not_end_the_chat(gqsa, path):
    result = gqsa("chat", path, "--max-new-tokens", "1", "--seed", "1", stdin="x" * 99 + "\nab\n")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    assert "error: the prompt has" in result.stderr
    result = gqsa("chat", path, "--max-new-tokens", "1", "--seed", "1", stdin="x" * 9999 + "\nab\n")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    assert "more than 32 tokens can hold" in result.stderr


def test_ctrl_c_ends_an_answer_and_not_the_chat(gqsa, path, monkeypatch):
    asked = []

    def chat(self, messages, **options):
        asked.append([message["content"] for message in messages])
        yield "half"
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield " and whole"

    monkeypatch.setattr(model_module.Model, "chat", chat)
    monkeypatch.setattr(model_module.Model, "chat_tokens", lambda self, messages: [])
    result = gqsa("chat", path, stdin="a\nb\n")
    assert (result.exit_code, result.stdout) == (0, "half\nhalf and whole\n")
    assert asked[1] == ["a", "half", "b"]


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_streams_that_are_closed(path, closed):
    redirect = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-"}[closed]
    command = f'"{sys.executable}" -m gqsa_runtime inspect "{path}" {redirect}'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error(path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        command = [sys.executable, "-m", "gqsa_runtime", "inspect", path, "--kernels", "--tensors"]
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_inspect_at_a_context_that_the_model_has_not(gqsa, path):
    for context in ("0", "33"):
        result = gqsa("inspect", path, "--context", context)
        assert result.exit_code == 1 and f"--context is {context}, but this model is made for 1 to 32" in result.stderr


def test_inspect(gqsa, path):
    result = gqsa("inspect", path, "--kernels", "--tensors", "--context", "16")
    assert result.exit_code == 0
    for expected in ("tiny (TinyForCausalLM)", "bits per weight", "x86_64_v3", "linear_sparse_t8", "q.crow_indices"):
        assert expected in result.stdout
    facts = json.loads(gqsa("inspect", path, "--json", "--context", "16").stdout)
    stream = sum(tiny.tensors()[f"q.{part}"].nbytes for part in ("values", "groups", "crow_indices", "tasks"))
    assert facts["linears"] == {
        "weights": 32 * 32,
        "bytes": stream,
        "bits_per_weight": 8 * stream / (32 * 32),
        "sparsity": 1 - 4 * 16 / (32 * 32),
        "row_widths": None,
    }
    assert facts["plans"]["cpu"]["memory"]["context_bytes"] == 16 * (2 * 16 * 4 + 16)
    assert "kernel_list" not in facts


def test_inspect_tells_what_each_context_costs(gqsa, path):
    costs = json.loads(gqsa("inspect", path, "--json").stdout)["plans"]["cpu"]["contexts"]
    assert [row["context"] for row in costs] == [32]  # the model's longest: 2k, 8k and 32k are beyond it
    assert costs[0]["kv_cache"] == 32 * 2 * 16 * 4
    made = tiny.program(max_context=100_000)
    rows = memory.context_costs(made, {name: Sized(8) for name in tiny.tensors()}, "cpu")
    assert [row.context for row in rows] == [2048, 8192, 32768, 100_000]
    for row in rows:
        assert row.scratch == made.plans["cpu"].arena_bytes + 16 * row.context  # rotary tables: 4 f32 a position
        assert row.total == row.weights + row.kv_cache + row.scratch
    assert "memory of  context  weights" in gqsa("inspect", path).stdout


def test_context_auto(gqsa, path):
    result = gqsa("run", path, "--raw", "-p", "Once", "--context", "auto", answer=" upon", prompt="Once")
    assert (result.exit_code, result.stdout) == (0, " upon\n")
    assert "context 32: all that the model is made for" in result.stderr
    result = gqsa("bench", path, "--context", "most")
    assert result.exit_code == 2 and "'most' is neither a number of tokens nor auto" in result.stderr


def test_check(gqsa, path, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 10**12)  # or it would change from call to call
    result = gqsa("check", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{path} runs here: cpu: about cpu; no GPU: about cuda\nit opens with 32 of 32 tokens" in result.stdout
    assert "cpu, 32 tokens" in result.stdout and "cuda" not in result.stdout.split("\n", 1)[1]
    facts = json.loads(gqsa("check", path, "--json", "--context", "7").stdout)
    assert facts == json.loads(json.dumps(asdict(Model.check(path, context=7))))
    result = gqsa("check", path, "--device", "cuda")
    assert result.exit_code == 3 and result.stdout.startswith(f"{path} does not run here: about cuda\n")
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: memory.CPU_HEADROOM_BYTES + 100)
    result = gqsa("check", path, "--json")
    assert result.exit_code == 3 and json.loads(result.stdout)["largest_context"] == 0
    assert gqsa("check", path, "--context", "33").exit_code == 1
    assert gqsa("check", path, "--context", "many").exit_code == 2
    (tmp_path / "text").write_text("Hello")
    assert gqsa("check", str(tmp_path / "text")).exit_code == 1


def test_verify(gqsa, path):
    result = gqsa("verify", path)
    assert result.exit_code == 0 and "is sound: 8 tensors" in result.stdout
    assert json.loads(gqsa("verify", path, "--json").stdout)["ok"] is True
    with open(path, "r+b") as file:
        file.seek(-400, os.SEEK_END)
        byte = file.read(1)
        file.seek(-400, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    result = gqsa("verify", path)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and "damaged" in result.stderr


def test_bench(gqsa, path):
    result = gqsa("bench", path, "--at", "4,9", "--decode", "5", "--repeats", "2", "--json")
    found = json.loads(result.stdout)
    rows = found["decode"]
    assert [row["context"] for row in rows] == [4, 9] and all(row["steps"] == 10 for row in rows)
    assert all(row["ms_p90"] >= row["ms"] > 0 for row in rows)
    # One layer of f32: 16 values of K and of V a position; halfway through the steps the first row's cache holds 6.
    weights = sum(tiny.tensors()[name].nbytes for name in tiny.tensors() if name not in ("inv_freq", "binary.cpu"))
    assert [1e6 * row["mb"] - weights for row in rows] == pytest.approx([6 * 128, 11 * 128])
    linears = 2 * (tiny.ROWS * tiny.WIDTH + tiny.VOCAB * tiny.ROWS)
    assert [1e9 * row["gflop"] - linears for row in rows] == pytest.approx([4 * 6 * 32, 4 * 11 * 32])
    assert all(row["share"] == pytest.approx(row["gb_per_s"]) for row in rows)  # the fake memory moves 1 GB/s
    assert [row["prompt"] for row in found["prefill"]] == [32] and found["prefill"][0]["tokens_per_s"] > 0
    # Of every token its matrix, of the last one the head; token i attends to i + 1 positions with 2 heads of 16.
    operations = 2 * (32 * tiny.ROWS * tiny.WIDTH + tiny.VOCAB * tiny.ROWS) + 4 * (32 * 33 // 2) * 32
    assert found["prefill"][0]["tflop_per_s"] * found["prefill"][0]["ms"] == pytest.approx(operations / 1e9)
    assert found["first_token_seconds"] > found["open_seconds"]["total"] > 0 and "profile" not in found
    assert found["memory_bytes"] > weights


def test_bench_in_words(gqsa, path):
    result = gqsa("bench", path, "--at", "4", "--decode", "2", "--prompts", "4,8", "--profile")
    for words in (
        "tokens_per_s",
        "first token",
        "in threads beside it: tokenizer",
        "decode\ncontext",
        "prefill\nprompt",
    ):
        assert words in result.stdout
    found = gqsa("bench", path, "--at", "4", "--decode", "2", "--profile", "--json")
    rows = json.loads(found.stdout)["profile"]
    assert {row["phase"] for row in rows} == {"decode", "few_body"}
    assert sum(row["of_phase"] for row in rows) == pytest.approx(2)
    head = next(row for row in rows if row["kernel"] == "linear_dense_t1")
    assert head["us"] == pytest.approx(20) and head["gb_per_s"] == pytest.approx(
        2 * tiny.VOCAB * tiny.ROWS / 20e-6 / 1e9
    )


def test_bench_refuses_lengths_that_do_not_fit(gqsa, path):
    for option in ("--at", "--prompts"):
        result = gqsa("bench", path, option, "40")
        assert result.exit_code == 1 and "does not fit the model's context of 32" in result.stderr
        assert gqsa("bench", path, option, "many").exit_code == 2
    # By default it measures what fits.
    found = json.loads(gqsa("bench", path, "--decode", "2", "--json").stdout)
    assert [row["context"] for row in found["decode"]] == [30]


def test_bench_plot(gqsa, path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "roofline.png"
    bench = ("bench", path, "--at", "4,9", "--decode", "2", "--plot")
    assert gqsa(*bench, str(plot)).exit_code == 0
    assert plot.read_bytes().startswith(b"\x89PNG") and list(tmp_path.glob("*.partial")) == []
    monkeypatch.setattr(load, "open_device", lambda *args: pytest.fail("loaded"))
    result = gqsa(*bench, str(tmp_path / "roofline.pdf"))
    assert result.exit_code == 1 and "ends with .png" in result.stderr
    result = gqsa(*bench, str(tmp_path / "none" / "roofline.png"))
    assert result.exit_code == 1 and "no folder" in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = gqsa(*bench, str(plot))
    assert result.exit_code == 1 and "install it with `pip install matplotlib`" in result.stderr


def test_eval_ppl(gqsa, path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.")
    result = gqsa("eval", "ppl", path, "--text", str(text), "--window", "8", "--json")
    found = json.loads(result.stdout)
    assert found["n_windows"] == 5 and found["n_tokens"] == 35 and found["perplexity"] > 1
    assert "perplexity" in gqsa("eval", "ppl", path, "--text", str(text), "--window", "8").stdout
    result = gqsa("eval", "ppl", path, "--text", str(tmp_path / "none"), "--window", "8")
    assert result.exit_code == 1 and "cannot be read" in result.stderr
    text.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in gqsa("eval", "ppl", path, "--text", str(text)).stderr


def test_doctor(gqsa):
    result = gqsa("doctor")
    assert result.exit_code == 0
    for subject in ("python", "gqsa-runtime", "numpy", "cpu", "gpu"):
        assert subject in result.stdout
    subjects = [finding["subject"] for finding in json.loads(gqsa("doctor", "--json").stdout)]
    assert subjects == [finding.subject for finding in examine()]


def test_doctor_of_a_file(gqsa, path, monkeypatch):
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 10**12)
    lines = gqsa("doctor", path).stdout.splitlines()
    assert any("cpu for it" in line and "about cpu; 999.87 GB can be used" in line for line in lines)
    assert not any("cuda" in line and "for it" in line for line in lines)  # it has no plan for GPUs
    assert any("cpu, 32 tokens" in line and "kv cache 0.00" in line and line.endswith("; fits") for line in lines)
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 100)
    assert "; does not fit" in gqsa("doctor", path).stdout
    monkeypatch.setattr(load, "probe", lambda *args: (False, "no kernels for it"))
    assert "-> no kernels for it" in render(examine_file(path))
    assert gqsa("doctor", path + ".none").exit_code == 1


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        ((), 2, "Usage"),
        (("run",), 2, "Missing argument 'FILE'"),
        (("fly",), 2, "No such command"),
        (("run", "FILE", "--top-k", "many"), 2, "is not a valid integer"),
        (("run", "nothing.gqsa", "-p", "x"), 1, "error: nothing.gqsa: there is no such file"),
        (("run", "FILE", "-p", "x", "--device", "tpu"), 1, "error: the device is 'tpu'"),
        (("run", "FILE", "-p", "x" * 99), 1, "tokens, but the context is 32"),
        (("run", "FILE", "-p", "x", "--context", "99"), 1, "the context is 99"),
        (("run", "FILE", "-p", "x", "--top-p", "2"), 1, "top_p is 2.0"),
    ],
)
def test_errors(gqsa, path, args, code, expected):
    result = gqsa(*(path if arg == "FILE" else arg for arg in args))
    assert result.exit_code == code
    assert expected in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize("command", [("inspect",), ("check",), ("verify",), ("run", "-p", "Hi")], ids=lambda c: c[0])
@pytest.mark.parametrize("plan", ["{", json.dumps({**json.loads(tiny.program().to_json()), "vocab_size": -1})])
def test_what_is_wrong_with_a_file_is_told_of_that_file(gqsa, tmp_path, command, plan):
    bad = tmp_path / "bad.gqsa"
    bad.write_bytes(gguf_bytes.gguf({**tiny.metadata(), "gqsa.program": plan}, tiny.tensors()))
    result = gqsa(command[0], str(bad), *command[1:])
    assert result.exit_code == 1 and result.stderr.startswith(f"error: {bad}: "), result.stderr


def test_interruption(monkeypatch, capsys):
    @cli.click.command()
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        cli.main(interrupted, [])
    assert caught.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_another_group_can_use_main(capsys):
    @cli.click.command()
    def broken():
        raise InputError("a sentence")

    with pytest.raises(SystemExit) as caught:
        cli.main(broken, [])
    assert (caught.value.code, capsys.readouterr().err) == (1, "error: a sentence\n")


def test_all_commands_have_help_and_an_example(gqsa):
    names = [command.name for command in cli.commands()]
    assert names == ["run", "chat", "check", "inspect", "verify", "bench", "eval", "doctor"]
    for name in names:
        result = gqsa(name, "--help")
        assert result.exit_code == 0 and f"gqsa {name}" in result.stdout and "Example" in result.stdout


def fresh(code: str, *args: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.path.join(ROOT, "runtime"), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-c", code, *args], env=environment, cwd="/", capture_output=True, text=True, timeout=60
    )


FORBIDDEN = (
    "import sys; bad = {'torch', 'transformers', 'gqsac', 'gguf', 'cryptography'} & "
    "{name.split('.')[0] for name in sys.modules}"
)


def test_a_fresh_interpreter_loads_nothing_heavy(path):
    use = (
        "import sys, gqsa_runtime, gqsa_runtime.model, gqsa_runtime.doctor, gqsa_runtime.bench\n"
        "from gqsa_runtime import Model, cli\n"
        "for args in (['--help'], ['inspect', sys.argv[1]], ['verify', sys.argv[1]], ['doctor']):\n"
        "    try: cli.main(args=args)\n"
        "    except SystemExit as end: assert end.code == 0, (args, end.code)\n"
    )
    done = fresh(f"{use}\n{FORBIDDEN}\nassert not bad, bad\nprint('clean')", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("clean\n")


def test_importing_the_format_loads_no_numpy():
    done = fresh(
        "import gqsa_runtime.format, sys; assert 'numpy' not in sys.modules and 'tokenizers' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_quiet(path):
    code = "from gqsa_runtime.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.path.join(ROOT, "runtime")}
    command = [sys.executable, "-c", code, "inspect", path, "--tensors", "--kernels"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.stderr == ""
