"""What a user does wrong, and machines that lack something: one clear sentence, and nothing half-made."""

import json
import re
import resource
import shutil
import sys
from ctypes import CDLL
from types import SimpleNamespace

import cuda.bindings
import numpy as np
import pytest
from gqsa_runtime import cuda_errors, device_cpu, device_cuda, memory
from gqsa_runtime.format import FORMAT_VERSION
from gqsa_runtime.reader import ArtifactFile
from safetensors.numpy import load_file, save_file

from gqsac.compiler import pipeline
from gqsac.compiler.passes import compile_cpu
from tests.e2e.checkpoints import save_checkpoint
from tests.e2e.command import TARGET, gqsac, refusal, spawn, succeed
from tests.format import gguf_bytes, tiny

pytestmark = pytest.mark.skipif(not device_cpu.supported_targets(), reason="this CPU runs none of gqsac's kernels")

SAMPLES = ("--bits", 4, "--samples", 2, "--seq-len", 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sources") / "llama", "llama")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("compressed") / "llama"
    succeed("compress", source, "-o", folder, *SAMPLES)
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, compressed):
    file = tmp_path_factory.mktemp("built") / "llama.gqsa"
    succeed("build", compressed, "-o", file, "--target", TARGET)
    return file


@pytest.fixture
def edited(tmp_path, source):
    """A copy of the uncompressed folder with changes in its config."""

    def edit(**changes):
        folder = shutil.copytree(source, tmp_path / "edited")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    return edit


def both_refuse(model, tmp_path, *words):
    """compress and build --bits each refuse the folder, with each word in their sentence, and make nothing."""
    work = tmp_path / "work"
    work.mkdir()
    for command in (("compress", model, "-o", work / "out", *SAMPLES), build(model, work)):
        message = refusal(gqsac(*command))
        for word in words:
            assert re.search(word, message), f"no {word!r} in: {message}"
        assert [path for path in work.iterdir() if path.suffix != ".partial"] == []


def build(model, folder, *options):
    return ("build", model, "-o", folder / "out.gqsa", "--bits", 4, "--target", TARGET, *options)


# The model folder


def test_a_missing_folder(tmp_path):
    both_refuse(tmp_path / "nowhere", tmp_path, "nowhere does not exist", "model folder")


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    both_refuse(tmp_path / "empty", tmp_path, "config.json")


def test_a_file_for_a_folder(tmp_path):
    (tmp_path / "model.txt").write_text("hello")
    both_refuse(tmp_path / "model.txt", tmp_path, "is not a folder|is a file", "model folder")


def test_a_config_without_weights(tmp_path, edited):
    model = edited()
    (model / "model.safetensors").unlink()
    both_refuse(model, tmp_path, r"no weights \(\*\.safetensors\)")


def test_damaged_json_and_weights(tmp_path, edited):
    model = edited()
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    both_refuse(model, tmp_path, "model.safetensors is damaged|could not load the model")
    (model / "config.json").write_text('{"model_type": "llama"')
    shutil.rmtree(tmp_path / "work")
    both_refuse(model, tmp_path, "config.json is not valid JSON")


def test_an_unknown_architecture(tmp_path, edited):
    both_refuse(edited(model_type="martian"), tmp_path, "'martian'")


def test_an_unknown_operator_in_a_known_class(tmp_path, edited):
    message = refusal(gqsac(*build(edited(hidden_act="mish"), tmp_path)))
    assert "LlamaForCausalLM: operator aten.mish in model.layers.0.mlp.act_fn" in message
    assert not (tmp_path / "out.gqsa").exists()


def test_missing_weights(tmp_path, edited):
    both_refuse(edited(num_hidden_layers=3), tmp_path, r"model\.layers\.2\.")


def test_weights_of_another_shape(tmp_path, edited):
    message = refusal(gqsac(*build(edited(intermediate_size=128), tmp_path)))
    assert re.search(r"layers\.0\.mlp\.(gate|up)_proj.* 96.* 128", message)
    assert not list(tmp_path.glob("*out*"))


def test_nan_weights(tmp_path, edited):
    model = edited()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    both_refuse(model, tmp_path, "model.layers.1.mlp.up_proj.weight.*NaN")


def test_weights_beyond_half_precision(tmp_path, edited):
    model = edited()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 3e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = refusal(gqsac(*build(model, tmp_path)))
    assert "model.layers.1.mlp.up_proj.weight" in message and "3e+06" in message
    assert not list(tmp_path.glob("*out*"))


def test_a_nan_in_a_compressed_folder(tmp_path, compressed):
    model = shutil.copytree(compressed, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][7] = np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = refusal(gqsac("build", model, "-o", tmp_path / "out.gqsa", "--target", TARGET))
    assert "model.layers.0.mlp.up_proj.scales holds a NaN" in message
    assert not list(tmp_path.glob("*out*"))


def test_another_quantisation(tmp_path, edited):
    both_refuse(edited(quantization_config={"quant_method": "fp8"}), tmp_path, "'fp8'")


def test_a_gguf_file_is_compressed_first(tmp_path):
    (tmp_path / "qwen.gguf").write_bytes(gguf_bytes.gguf({"general.architecture": "llama"}, {}))
    message = refusal(gqsac("build", tmp_path / "qwen.gguf", "-o", tmp_path / "out.gqsa", "--bits", 4))
    assert f"gqsac compress {tmp_path / 'qwen.gguf'} -o OUT" in message


def test_compressed_or_not(tmp_path, source, compressed):
    message = refusal(gqsac("build", source, "-o", tmp_path / "out.gqsa"))
    assert "not compressed" in message and "gqsac compress" in message and "--bits" in message
    assert "compressed already" in refusal(gqsac(*build(compressed, tmp_path)))
    assert "already compressed" in refusal(gqsac("compress", compressed, "-o", tmp_path / "out"))


def test_tokenizers_and_templates_that_will_not_do(tmp_path, compressed):
    model = shutil.copytree(compressed, tmp_path / "model")
    build = ("build", model, "-o", tmp_path / "out.gqsa", "--target", TARGET)
    (model / "chat_template.jinja").write_text("{% for message in messages %}")
    assert "chat template cannot be compiled" in refusal(gqsac(*build))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["new"] = 100_000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert re.search(r"model.vocab\['new'\] is 100000, expected an integer from 0 to \d+", refusal(gqsac(*build)))
    (model / "tokenizer.json").write_text('{"model": 5}')
    assert f"{model / 'tokenizer.json'}: the file's tokenizer cannot be read" in refusal(gqsac(*build))
    (model / "tokenizer.json").unlink()
    assert "holds no tokenizer.json" in refusal(gqsac(*build))
    assert not list(tmp_path.glob("*out*"))


def test_nothing_is_compiled_for_weights_that_will_not_do(tmp_path, edited, compressed, monkeypatch):
    def compile_nothing(*args):
        raise AssertionError("the weights' headers should have been looked at first")

    monkeypatch.setattr(pipeline, "compile_all", compile_nothing)
    assert "no tensor model.layers.2" in refusal(gqsac(*build(edited(num_hidden_layers=3), tmp_path)))
    model = shutil.copytree(compressed, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    message = refusal(gqsac("build", model, "-o", tmp_path / "out.gqsa", "--target", TARGET))
    assert re.search(r"layers\.0\.self_attn\.[kv]_proj.* 32x64.* 64x64", message)


# Options


@pytest.mark.parametrize(
    "options, words",
    [
        (("--bits", 5), "5.*2, 3, 4"),
        (("--bits", 4, "--sparsity", 1.0), "1.0.*0"),
        (("--bits", 4, "--sparsity", -0.1), "-0.1"),
        (("--bits", 4, "--sparsity", "nan"), "nan"),
        (("--bits", 4, "--group-size", 12), "12.*8, 16, 32, 64, 128"),
        (("--bits", 4, "--group-size", 64), r"model\.layers\.0\.mlp\.down_proj.* 96 .*64"),
    ],
)
def test_options_out_of_range(tmp_path, source, options, words):
    for command in (
        ("compress", source, "-o", tmp_path / "out", *SAMPLES, *options),
        ("build", source, "-o", tmp_path / "out.gqsa", "--target", TARGET, *options),
    ):
        assert re.search(words, refusal(gqsac(*command)))
        assert list(tmp_path.iterdir()) == []


def test_build_options_out_of_range(tmp_path, source):
    message = refusal(gqsac(*build(source, tmp_path, "--target", "sm_99")))
    assert "unknown target 'sm_99'" in message and "sm_90" in message and "x86_64_v3" in message
    assert "1 to 320" in refusal(gqsac(*build(source, tmp_path, "--max-context", 321)))
    assert "--dump-dir" in refusal(gqsac(*build(source, tmp_path, "--dump-dir", source / "config.json")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ("explode",),
        ("build",),
        ("build", "model"),  # neither -o nor --dry-run
        ("build", "model", "-o", "x", "--kv-dtype", "f64"),
        ("compress", "model"),
        ("compress", "model", "-o", "x", "--bits", "many"),
        ("compress", "model", "-o", "x", "--bits", 16),
        ("run",),
        ("run", "model.gqsa", "--no-such-option"),
        ("bench", "model.gqsa", "--at", "a,b"),
        ("eval", "ppl", "model.gqsa"),
        ("eval", "ppl", "model/", "--text", "text.txt", "--rebuild-kernels"),
        ("relink", "model.gqsa"),
    ],
)
def test_wrong_usage_is_code_2(args):
    result = gqsac(*args)
    assert result.exit_code == 2 and result.stdout == ""
    assert "Error: " in result.stderr and "Traceback" not in result.stderr


# Places to write


def test_an_output_that_is_a_folder(tmp_path, source, compressed):
    (tmp_path / "here").mkdir()
    message = refusal(gqsac("build", compressed, "-o", tmp_path / "here", "--target", TARGET))
    assert f"{tmp_path / 'here'}, which is a folder" in message
    assert "exists already" in refusal(gqsac("compress", source, "-o", tmp_path / "here", *SAMPLES))
    assert list((tmp_path / "here").iterdir()) == []


def test_an_output_in_no_folder(tmp_path, compressed):
    message = refusal(gqsac("build", compressed, "-o", tmp_path / "no" / "out.gqsa", "--target", TARGET))
    assert f"{tmp_path / 'no'} does not exist" in message and list(tmp_path.iterdir()) == []


def test_an_output_that_would_overwrite_something_else(tmp_path, compressed):
    model = shutil.copytree(compressed, tmp_path / "model")
    before = (model / "model.safetensors").read_bytes()
    message = refusal(gqsac("build", model, "-o", model / "model.safetensors", "--target", TARGET))
    assert "is not a .gqsa file" in message and (model / "model.safetensors").read_bytes() == before
    assert "not a regular file" in refusal(gqsac("build", model, "-o", "/dev/null", "--target", TARGET))


def without_override():
    """Takes from a child run by root the right to write where permissions forbid it."""
    pr_capbset_drop, cap_dac_override, cap_dac_read_search = 24, 1, 2
    libc = CDLL(None)
    for capability in (cap_dac_override, cap_dac_read_search):
        libc.prctl(pr_capbset_drop, capability, 0, 0, 0)


def test_a_read_only_folder(tmp_path, source, compressed):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    build = ("build", compressed, "-o", folder / "out.gqsa", "--target", TARGET)
    message = refusal(spawn(*build, preexec_fn=without_override))
    assert str(folder) in message and "cannot be written" in message
    message = refusal(spawn("compress", source, "-o", folder / "out", *SAMPLES, preexec_fn=without_override))
    assert str(folder) in message and "ermission" in message
    assert list(folder.iterdir()) == []


def limit_file_size(n_bytes: int):
    """A child that fails to write past n_bytes of any file, as on a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    return limit


def test_a_full_disk_while_building(tmp_path, compressed, artifact):
    old = artifact.read_bytes()
    (tmp_path / "out.gqsa").write_bytes(old)
    build = ("build", compressed, "-o", tmp_path / "out.gqsa", "--target", TARGET)  # its kernels are cached
    message = refusal(spawn(*build, preexec_fn=limit_file_size(len(old) // 2)))  # in the weights
    assert f"writing {tmp_path / 'out.gqsa'} failed" in message and "MB free" in message
    assert [path.name for path in tmp_path.iterdir()] == ["out.gqsa"]
    assert (tmp_path / "out.gqsa").read_bytes() == old


@pytest.mark.parametrize("n_bytes", [100, 20_000])  # in the state, in a block
def test_a_full_disk_while_compressing(tmp_path, source, n_bytes):
    command = ("compress", source, "-o", tmp_path / "out", *SAMPLES)
    message = refusal(spawn(*command, preexec_fn=limit_file_size(n_bytes)))
    assert "free" in message
    assert not (tmp_path / "out").exists()
    # With space again, the same command ends what was begun.
    succeed(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Compiled files


def run(file, *options):
    return ("run", file, "--prompt", "Hello", "--device", "cpu", *options)


def test_files_that_are_no_artifacts(tmp_path, source, artifact):
    sound = artifact.read_bytes()
    cases = {
        "truncated": (sound[: len(sound) // 2], "truncated"),
        "cut-header": (sound[:40], "truncated"),
        "empty": (b"", "not a .gqsa file"),
        "text": (b"Hello, hello", "not a .gqsa file"),
        "flipped": (_flip(sound, _place(artifact, "embed_tokens.records")), "damaged"),
        "newer": (
            tiny.file_bytes(**{"gqsa.format_version": FORMAT_VERSION + 1}),
            f"format version {FORMAT_VERSION + 1}.*pip install ./runtime",
        ),
        "older": (
            tiny.file_bytes(**{"gqsa.format_version": FORMAT_VERSION - 1}),
            f"format version {FORMAT_VERSION - 1}.*rebuild it with `gqsac build`",
        ),
        "llama": (gguf_bytes.gguf({"general.architecture": "llama"}, {}), "GGUF file for 'llama'.*gqsac build"),
    }
    for name, (data, words) in cases.items():
        file = tmp_path / f"{name}.gqsa"
        file.write_bytes(data)
        commands = [run(file), ("verify", file), ("bench", file, "--device", "cpu")]
        for command in commands if name == "flipped" else [*commands, ("inspect", file)]:
            message = refusal(gqsac(*command))
            assert re.search(words, message) and file.name in message, (name, command[0], message)
    assert "no such file" in refusal(gqsac(*run(tmp_path / "nowhere.gqsa")))
    assert "this is a folder" in refusal(gqsac(*run(source)))


def test_a_damaged_part_that_this_machine_does_not_need(tmp_path, compressed):
    """A file for many targets is not refused for damage to one of the others; verify looks at every part."""
    other = "x86_64_v3" if "aarch64" in device_cpu.supported_targets() else "aarch64"
    sound, damaged = tmp_path / "sound.gqsa", tmp_path / "damaged.gqsa"
    succeed("build", compressed, "-o", sound, "--target", TARGET, "--target", other)
    with ArtifactFile.open(sound) as file:
        (tensor,) = (binary.tensor for binary in file.program.binaries if binary.target == other)
    damaged.write_bytes(_flip(sound.read_bytes(), _place(sound, tensor)))
    assert succeed(*run(damaged)).stdout == succeed(*run(sound)).stdout
    message = refusal(gqsac("verify", damaged))
    assert tensor in message and "damaged" in message


def _place(artifact, tensor: str) -> int:
    """Where the middle byte of a tensor stands in the file."""
    with ArtifactFile.open(artifact) as file:
        info = file.tensors[tensor]
        return info.offset + info.size // 2


def _flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def test_prompts_and_contexts(tmp_path, artifact):
    message = refusal(gqsac(*run(artifact, "--context", 4)))
    assert re.search(r"prompt has \d+ tokens, but the context is 4; .*up to 320", message)
    assert "1 to 320" in refusal(gqsac(*run(artifact, "--context", 321)))
    assert "at least 1" in refusal(gqsac(*run(artifact, "--max-new-tokens", 0)))
    assert "'tpu'" in refusal(gqsac("run", artifact, "--device", "tpu", "-p", "x"))
    assert "at least 1" in refusal(gqsac(*run(artifact, "--threads", 0)))
    (tmp_path / "short.txt").write_text("H")
    ppl = ("eval", "ppl", artifact, "--device", "cpu", "--text")
    assert "use a longer text" in refusal(gqsac(*ppl, tmp_path / "short.txt", "--window", 64))
    assert "cannot be read" in refusal(gqsac(*ppl, tmp_path / "nowhere.txt"))
    assert re.search("window.*321|context", refusal(gqsac(*ppl, tmp_path / "short.txt", "--window", 321)))


def test_a_context_that_memory_does_not_allow(monkeypatch, artifact):
    with ArtifactFile.open(artifact) as file:
        bare = memory.needed_bytes(file.program, file.tensors, "cpu", 0)
        a_token = memory.context_bytes(file.program, 1)
    free = bare + 100 * a_token + memory.CPU_HEADROOM_BYTES
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: free)
    message = refusal(gqsac(*run(artifact, "--context", 300)))
    assert "context 300 needs" in message and "a context of 100 fits" in message
    result = succeed(*run(artifact, "--max-new-tokens", 2))  # without a wish, what fits is taken, and said
    assert "context 100: context 320 needs" in result.stderr
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: bare)
    assert "not even one position fits" in refusal(gqsac(*run(artifact)))


# Machines that lack something


@pytest.fixture(scope="module")
def gpu_artifact(tmp_path_factory, compressed):
    file = tmp_path_factory.mktemp("gpu") / "gpu.gqsa"
    succeed("build", compressed, "-o", file, "--target", "sm_90", "--target", "sm_86")
    return file


@pytest.mark.parametrize("major, minor", [(7, 5), (8, 0), (10, 0), (12, 0)])
def test_a_gpu_that_the_file_has_no_kernels_for(monkeypatch, gpu_artifact, major, minor):
    gpu = SimpleNamespace(name="Fake GPU", major=major, minor=minor, arch=f"sm_{major}{minor}", device=0)
    monkeypatch.setattr(device_cuda, "Gpu", lambda ordinal: gpu)
    message = refusal(gqsac("run", gpu_artifact, "--device", "cuda", "-p", "x"))
    assert "Fake GPU" in message and gpu.arch in message
    assert "its CUDA targets are sm_86, sm_90" in message
    assert f"gqsac relink FILE -o NEW --target {gpu.arch}" in message


@pytest.mark.parametrize(
    "status, words",
    [
        ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "driver is older.*update the NVIDIA driver"),
        ("CUDA_ERROR_NO_BINARY_FOR_GPU", "gqsac relink FILE -o NEW --target"),
        ("CUDA_ERROR_INVALID_IMAGE", "gqsac verify|gqsa verify"),
        ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "driver.*(restart|reboot)"),
        ("CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "update the NVIDIA driver"),
        ("CUDA_ERROR_STUB_LIBRARY", "stub.*NVIDIA driver"),
        ("CUDA_ERROR_NO_DEVICE", "no GPU; use --device cpu"),
        ("CUDA_ERROR_OUT_OF_MEMORY", "smaller --context"),
    ],
)
def test_driver_errors_are_sentences(status, words, function="cuInit"):
    message = cuda_errors.explain(function, status)
    assert re.search(words, message) and function in message and status in message
    assert "\n" not in message and len(message) < 300


def test_a_driver_too_old_to_know_a_function():
    error = RuntimeError('Function "cuLaunchKernelEx" not found')
    message = cuda_errors.explain_unavailable("cuLaunchKernelEx", error)
    assert "too old" in message and "cuLaunchKernelEx" in message and "525" in message


def test_no_driver(monkeypatch, gpu_artifact):
    def missing(*args):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(device_cuda, "_driver", lambda: SimpleNamespace(cuInit=missing))
    message = refusal(gqsac("run", gpu_artifact, "--device", "cuda", "-p", "x"))
    assert "no NVIDIA driver found" in message and "--device cpu" in message


def test_no_nvrtc(monkeypatch, tmp_path, compressed):
    build = ("build", compressed, "-o", tmp_path / "out.gqsa", "--target", "sm_90")

    def missing():
        raise RuntimeError("Failed to dlopen libnvrtc")

    with monkeypatch.context() as patch:
        patch.setattr(cuda.bindings, "nvrtc", SimpleNamespace(nvrtcVersion=missing), raising=False)
        message = refusal(gqsac(*build))
        assert "NVRTC, which was not found" in message and "pip install nvidia-cuda-nvrtc-cu12" in message
        assert "--target cpu" in message
    with monkeypatch.context() as patch:
        patch.delattr(cuda.bindings, "nvrtc", raising=False)
        patch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
        assert "pip install" in refusal(gqsac(*build))
    assert list(tmp_path.iterdir()) == []


def test_no_ziglang(monkeypatch, tmp_path, compressed):
    compile_cpu.compiler_version.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(compile_cpu, "find_spec", lambda name: None)
        message = refusal(gqsac("build", compressed, "-o", tmp_path / "out.gqsa", "--target", TARGET))
    assert "pip install ziglang" in message and list(tmp_path.iterdir()) == []
    assert compile_cpu.compiler_version().startswith("zig ")
