"""What `gqsac compress` says of bad texts, folders that are in the way, and too little memory or disk."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from gqsa_runtime.cli import main
from transformers import AutoConfig, AutoModelForCausalLM

from gqsac.cli import cli
from gqsac.compress import disk, memory, partial
from gqsac.compress.memory import first_short, what_would_fit
from gqsac.compress.needs import Free, ModelSize, needs
from gqsac.compress.options import MASTER_DTYPES, Options, checked
from gqsac.compress.run import compress
from gqsac.errors import DeviceError, InputError
from tests.unit.compress_models import TEXT, byte_tokenizer, save_model

SMALL = {"samples": 8, "seq_len": 16, "progress": False, "epochs": 1, "e2e_steps": 3, "batch_tokens": 64}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def refused(tmp_path, llama, capsys):
    """Runs the command, which must end with exit code 1 and leave nothing, and gives its one line."""

    def run(*arguments):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit) as stop:
            main(
                cli, ["compress", str(llama), "-o", str(tmp_path / "out"), "--bits", "4", *map(str, arguments)], "gqsac"
            )
        assert stop.value.code == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
        assert sorted(tmp_path.iterdir()) == before
        return said

    return run


@pytest.mark.parametrize(
    "content, message",
    [
        ("é".encode("latin-1") * 100, r"text is not UTF-8 text \(byte 0\); convert it"),
        (TEXT.encode("utf-16"), r"text is not UTF-8 text \(byte 0\)"),
        (b"\x7fELF\0\1" * 99, "text holds zero bytes, so it is a binary file; expected a UTF-8 text file"),
        (b"", "text is empty; expected text"),
        (b"\xef\xbb\xbf \n", "text is empty; expected text"),
        ("folder", "text is a folder; expected a UTF-8 text file"),
        (None, "text does not exist; expected a UTF-8 text file"),
        (b"x" * 127, r"4 samples of 32 tokens = 128 tokens, but \S+/text gives 127 tokens, enough for 3; give more"),
    ],
    ids=["latin", "utf-16", "binary", "nothing", "blank", "folder", "missing", "short"],
)
def test_a_bad_text_is_refused(tmp_path, refused, content, message):
    text = tmp_path / "text"
    if content == "folder":
        text.mkdir()
    elif content is not None:
        text.write_bytes(content)
    assert re.search(message, refused("--calibration", text, "--samples", 4, "--seq-len", 32))


def test_a_text_of_exactly_enough_tokens_is_taken(tmp_path, llama):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + b"x" * 128)
    small = {"bits": 4, "samples": 8, "seq_len": 16, "progress": False}
    compress(llama, tmp_path / "out", calibration=tmp_path / "text", **small)


def test_a_long_text_of_long_tokens_is_read_to_its_end():
    """Slices of a long text may hold less than a window where a token has very many characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from gqsac.compress.calibrate import calibration_tokens

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "x" * 50: 1}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    for words, enough in ((200, True), (31, False)):
        text = ("x" * 50 + " ") * words
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gqsac.compress.calibrate.read_text", lambda file, text=text: text)
            if enough:
                assert calibration_tokens(tokenizer, ["a"], 4, 8, 0).shape == (4, 8)
            else:
                with pytest.raises(InputError, match="a gives 31 tokens, enough for 3"):
                    calibration_tokens(tokenizer, ["a"], 4, 8, 0)


def test_samples_without_room_for_text_are_refused():
    from tokenizers.processors import TemplateProcessing

    from gqsac.compress.calibrate import calibration_tokens

    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="!:0 !:0 $A", special_tokens=[("!", 0)])
    with pytest.raises(InputError, match="samples of 2 tokens leave no room for text behind the 2 with which"):
        calibration_tokens(tokenizer, None, 4, 2, 0)


@pytest.mark.parametrize("device", ["meta", "tpu"])
def test_a_device_of_another_kind_is_refused(refused, device):
    assert f"the device is '{device}', expected auto, cpu, cuda or cuda:N" in refused("--device", device)


# OUT.partial


@pytest.fixture
def stopped(tmp_path, llama, monkeypatch):
    """Options and the folder of a run that was stopped behind its first stage."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = {"calibration": text, "stages": ("one-shot", "distill"), "allocation": "row", **SMALL}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gqsac.compress.run.prepare_training", _interrupt)
        compress(llama, tmp_path / "out", **options)
    return options, tmp_path / "out.partial"


def _interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"samples": 7}, "another samples: 8 there, 7 now"),
        ({"seed": 3}, "another seed: 0 there, 3 now"),
        ({"seq_len": 12}, "another seq_len: 16 there, 12 now"),
        ({"bits": 2}, "another bits: 4 there, 2 now"),
        ({"calibration": None}, "another calibration text: 'text.txt' there, 'built-in text' now"),
    ],
)
def test_a_resumed_run_names_what_differs(tmp_path, llama, stopped, changed, message):
    options, folder = stopped
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match=f"{folder} holds a compression with {message}; use the same"):
        compress(llama, tmp_path / "out", **options | changed)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_a_resumed_run_names_another_text_of_the_same_name_and_another_model(tmp_path, llama, stopped):
    options, _ = stopped
    with pytest.raises(InputError, match="holds a compression with another model"):
        compress(save_model(tmp_path / "qwen2", "qwen2"), tmp_path / "out", **options)
    options["calibration"].write_text(TEXT[::-1])
    with pytest.raises(InputError, match=r"with another calibration text \(by its tokens\)"):
        compress(llama, tmp_path / "out", **options)


def test_a_folder_of_an_older_format_is_refused(tmp_path, llama, stopped):
    options, folder = stopped
    state = json.loads((folder / "state.json").read_text())
    assert state.pop("format_version") == 2
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(
        InputError, match="another version of the checkpoint format: None there, 2 now; use the same .*or"
    ):
        compress(llama, tmp_path / "out", **options)


def test_steps_may_become_smaller_until_a_stage_has_taken_some(tmp_path, llama, stopped):
    options, folder = stopped
    (folder / "distill.state").touch()
    with pytest.raises(InputError, match="another batch_tokens: 64 there, 32 now"):
        compress(llama, tmp_path / "out", **options | {"batch_tokens": 32})
    (folder / "distill.state").unlink()
    report = compress(llama, tmp_path / "out", **options | {"batch_tokens": 32})
    assert report["resumed_blocks"] == 2
    assert report["stages"]["distill"]["tokens_per_step"] == 32


def test_a_foreign_folder_in_the_way_is_left_alone(tmp_path, refused):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    assert "out.partial is in the way and holds files of something else (there is no state.json); move it" in refused()
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


# memory and disk


@pytest.fixture(scope="module")
def smollm2():
    """Sizes of SmolLM2-135M."""
    return size_of(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama_7b():
    return size_of(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


def size_of(**config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config), dtype=torch.bfloat16)
    linears = [(name, module) for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    return ModelSize.of(
        model, "model.layers", {f"model.{name}": tuple(module.weight.shape) for name, module in linears}
    )


def options_of(*stages, seq_len=1024, batch_tokens=16384, **others):
    return checked(Options(stages=stages, seq_len=seq_len, batch_tokens=batch_tokens, sparsity=0.5, **others))


def gib(size, options, device, free=Free(None, None)):
    """Stage -> (GPU, memory) that it needs at least."""
    return {need.stage: (need.gpu / GIB, need.ram / GIB) for need in needs(size, options, device, free)}


def test_needs_come_near_what_was_measured(smollm2):
    """Distillation of SmolLM2-135M with 16 384 tokens a step had a peak of 22 GiB on a GPU, blocks not compiled."""
    assert smollm2.parameters == 134_515_008 and not smollm2.large
    assert 15 < gib(smollm2, options_of("distill"), CUDA)["distill"][0] < 22


def test_the_papers_setting_fits_on_a_card_of_24_gb(llama_7b):
    """At once of a block of 202 M weights 25 bytes each in BQPO; of 6.5 G weights in E2E-OQP a byte, and 17 a scale."""
    options = options_of("bqpo", "e2e-oqp", seq_len=2048, batch_tokens=2048, samples=64)
    found = gib(llama_7b, options, CUDA)
    assert 5 < found["bqpo"][0] < 8
    assert 14 < found["e2e-oqp"][0] < 17
    assert first_short(needs(llama_7b, options, CUDA, Free(None, None)), Free(23 * GIB, None)) is None
    in_bf16 = gib(llama_7b, replace(options, master_dtype="bfloat16"), CUDA)
    assert found["bqpo"][0] - in_bf16["bqpo"][0] == pytest.approx(8 * 202_375_168 / GIB)
    distill = [replace(options, stages=("distill",), master_dtype=dtype) for dtype in MASTER_DTYPES]
    assert gib(llama_7b, distill[0], CUDA)["distill"][0] > 120 > 75 > gib(llama_7b, distill[1], CUDA)["distill"][0]


def test_activations_count_as_memory_only_where_it_holds_them(smollm2):
    options = options_of("bqpo", samples=4096)
    states = 2 * 4096 * 1024 * 576 * 4 / GIB
    for free, held in ((Free(None, 64 * GIB), states), (Free(None, 16 * GIB), 0)):
        assert held <= gib(smollm2, options, CPU, free)["bqpo"][1] < held + 1


@pytest.mark.parametrize("free, device", [(Free(10 * GIB, 200 * GIB), CUDA), (Free(None, 9 * GIB), CPU)])
def test_the_advice_would_fit_and_twice_of_it_would_not(smollm2, free, device):
    options = options_of("bqpo", "distill", batch_tokens=32768)
    assert "distill needs at least" in first_short(needs(smollm2, options, device, free), free)
    advice = what_would_fit(smollm2, options, device, free)
    batch = int(re.search(r"--batch-tokens (\d+)", advice)[1])
    for tokens, short in ((batch, False), (2 * batch, True)):
        found = first_short(needs(smollm2, replace(options, batch_tokens=tokens), device, free), free)
        assert (found is not None) == short
    assert "no distill (--stages bqpo)" in advice
    assert ("--device cpu" in advice) == (device is CUDA)


def test_a_model_that_fits_nowhere(llama_7b):
    free = Free(2 * GIB, 4 * GIB)
    assert "use a machine with more memory, or a smaller model" in what_would_fit(
        llama_7b, options_of("bqpo"), CUDA, free
    )


def test_what_torch_keeps_of_a_gpu_is_free(monkeypatch):
    for name, value in (("mem_get_info", (10, 80)), ("memory_reserved", 7), ("memory_allocated", 3)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_memory(CUDA).gpu == 14 and memory.free_memory(CPU).gpu is None


def test_too_little_memory_is_refused_before_any_work(tmp_path, llama, refused, monkeypatch):
    monkeypatch.setattr(memory, "_free_swap_bytes", lambda: 0)
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 4_000_000)
    common = ("--device", "cpu", "--samples", 32, "--seq-len", 64, "--stages", "distill", "--e2e-steps", 1)
    said = refused(*common, "--batch-tokens", 2048)
    assert re.search(r"distill needs at least \S+ MB of memory, and 4.0 MB are free; what would fit: --batch-t", said)
    batch = re.search(r"--batch-tokens (\d+)", said)[1]
    with pytest.raises(SystemExit) as stop:
        main(
            cli,
            [
                "compress",
                str(llama),
                "-o",
                str(tmp_path / "out"),
                "--bits",
                "4",
                *map(str, common),
                "--batch-tokens",
                batch,
            ],
        )
    assert stop.value.code == 0


def test_weights_larger_than_the_memory_are_refused_before_they_are_read(refused, monkeypatch):
    monkeypatch.setattr(memory, "_free_swap_bytes", lambda: 50_000)
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 100_000)
    monkeypatch.setattr("gqsac.compress.run.load_source", lambda src: pytest.fail("was read"))
    said = refused()
    assert re.search(r"llama has 0\.[1-9] MB of weights, and 0.1 MB of memory are free; use a machine with more", said)


def test_weights_that_are_not_read_do_not_count(tmp_path, llama, monkeypatch):
    shutil.copytree(llama, tmp_path / "both")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(bytes(1_000_000))
    monkeypatch.setattr(memory, "_free_swap_bytes", lambda: 0)
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 1_000_000)
    memory.check_loading(tmp_path / "both")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator")]
)
def test_memory_that_runs_out_while_the_model_is_read_is_one_sentence(refused, monkeypatch, error):
    def full(src):
        raise error

    monkeypatch.setattr("gqsac.compress.run.load_source", full)
    said = refused("--stages", "bqpo")
    assert said.startswith("error: loading the model: the machine has too little memory (")
    assert said.endswith("); use a machine with more, or a smaller model\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "3"], "--epochs is for the stages bqpo, but --stages is one-shot; leave it out, or add a stage"),
        (["--stages", "distill", "--distill", "0.3"], "--distill is for the stages e2e-oqp, but --stages is distill"),
        (["--stages", "bqpo", "--e2e-steps", "5"], "--e2e-steps is for the stages distill and e2e-oqp, but"),
        (["--stages", "e2e-oqp", "--removal", "gradual"], "--removal is for the stages bqpo and distill, but"),
    ],
)
def test_an_option_that_no_stage_heeds_is_refused(tmp_path, llama, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(cli, ["compress", str(llama), "-o", str(tmp_path / "out"), *arguments], "gqsac")
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_text_too_short_to_train_on_names_its_own_option(tmp_path, refused):
    text = tmp_path / "short.txt"
    text.write_text("x" * 100)
    said = refused("--calibration", text, "--samples", 2, "--seq-len", 16, "--stages", "distill", "--train-samples", 9)
    assert "training needs 9 samples of 16 tokens = 144 tokens" in said and "ask for fewer (--train-samples)" in said


def test_too_little_disk_is_refused_before_any_work(tmp_path, llama, refused, monkeypatch):
    usage = type("Usage", (), {"free": 20_000})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage)
    said = refused()
    assert re.search(rf"out needs at least 0\.[1-9] MB of disk, and {tmp_path} has 0 MB free; free some space", said)
    monkeypatch.undo()
    compress(llama, tmp_path / "out", bits=4, progress=False, samples=4, seq_len=32)


def test_the_least_disk_is_near_what_is_taken(tmp_path, llama, monkeypatch):
    """At the end OUT.partial holds each stage's blocks and the finished model."""
    taken, wanted = [], []
    remove = partial._remove
    monkeypatch.setattr(disk.shutil, "disk_usage", shutil.disk_usage)
    monkeypatch.setattr("gqsac.compress.memory.check_disk", lambda out, needed: wanted.append(needed))

    def measured(folder):
        weights = [*folder.glob("*.safetensors"), *(tmp_path / "out").glob("*.safetensors")]
        taken.append(sum(file.stat().st_size for file in weights))
        remove(folder)

    monkeypatch.setattr(partial, "_remove", measured)
    compress(llama, tmp_path / "out", stages=("bqpo", "distill"), sparsity=0.5, **SMALL)
    assert 0.5 < wanted[0] / taken[0] < 1


def test_a_disk_refusal_is_an_error_of_the_device(tmp_path):
    with pytest.raises(DeviceError, match="of disk"):
        disk.check_disk(tmp_path / "new" / "out", 1 << 60)
