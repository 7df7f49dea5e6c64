"""From a model folder to tokens: compress, build, open, and the numbers are those of transformers."""

import json
import shutil

import numpy as np
import pytest
from gqsa_runtime import Model, device_cuda
from gqsa_runtime.device_cpu import supported_targets
from gqsa_runtime.reader import ArtifactFile
from safetensors.numpy import load_file, save_file

from gqsac.rounding import Rounding
from tests.e2e.checkpoints import CONFIGS, save_checkpoint, save_multi_stream
from tests.e2e.command import TARGET, gqsac, refusal, succeed
from tests.e2e.reference import (
    check_draws,
    expected_greedy,
    expected_log_probs,
    expected_logits,
    greedy,
    load_reference,
    load_rounded_reference,
    round_outer,
)
from tests.format.signing import Authority, save_key

pytestmark = pytest.mark.skipif(not supported_targets(), reason="this CPU runs none of gqsac's kernels")

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of " * 4
# Around the chunk of 128 tokens that one prefill launch takes, and odd tails of the kernels' tiles of 8.
LENGTHS = (1, 7, 128, 129, 300)
INTEGER = ("--target", TARGET, "--kv-dtype", "f32")  # what a build does unless asked otherwise
EXACT = ("--target", TARGET, "--exact")  # with a cache of f32, unless asked otherwise
# Activations of 16 bits: each is off by up to 2^-16 of its tile's largest, logits of about 10 by some thousandths.
ACTIVATIONS_16 = 2e-2
SEEDS = {"llama": 2, "qwen2": 1, "opt": 7}  # of wider models whose continuations do not repeat one token


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {name: save_checkpoint(folder / name, name) for name in CONFIGS}


@pytest.fixture(scope="module")
def built(tmp_path_factory, sources):
    """name -> (compressed folder, .gqsa file), made when first asked for."""
    folder = tmp_path_factory.mktemp("built")
    made = {}

    def make(name: str):
        if name not in made:
            compressed, file = folder / name, folder / f"{name}.gqsa"
            succeed("compress", sources[name], "-o", compressed, "--sparsity", 0.25, "--samples", 4, "--seq-len", 32)
            succeed("build", compressed, "-o", file, *EXACT)
            made[name] = compressed, file
        return made[name]

    return make


@pytest.fixture(scope="module")
def in_records(tmp_path_factory):
    """name -> compressed folder all of whose linears fit records, made when first asked for."""
    folder = tmp_path_factory.mktemp("records")

    def make(name: str):
        compressed = folder / name
        if not compressed.is_dir():
            wider = {"ffn_dim" if name == "opt" else "intermediate_size": 128}
            source = save_checkpoint(folder / f"{name}-source", name, seed=SEEDS[name], **wider)
            options = ("--quant-group-size", 64, "--sparsity", 0.25, "--samples", 4, "--seq-len", 32)
            succeed("compress", source, "-o", compressed, *options)
        return compressed

    return make


def check_parity(folder, file, n_tokens=12, tolerance=1e-4, reference=None):
    """Greedy tokens, log-probabilities and logits after prompts of every length equal the reference's."""
    reference = reference or load_reference(folder)
    with Model.open(file, device="cpu", threads=1) as model:
        assert model.program.kv_dtype == "f32" and model.engine.device.plan.prefill_chunk == 128
        ids = model.tokenize(TEXT)
        for length in LENGTHS:
            model.engine.reset()
            error = np.abs(model.engine.prefill(ids[:length]) - expected_logits(reference, ids[:length])[-1]).max()
            assert error < tolerance, f"logits after {length} tokens differ by {error:.1e}"
        for length in (2, 129, 300):
            scored = model.score(ids[:length])
            assert scored.log_probs.dtype == np.float32 and len(scored.log_probs) == length - 1
            assert np.abs(scored.log_probs - expected_log_probs(reference, ids[:length])).max() < tolerance
            best = expected_logits(reference, ids[:length])[:-1].argmax(axis=1)
            assert (scored.greedy == (best == ids[1:length])).all()
        for length in (7, 129):
            expected = expected_greedy(reference, ids[:length], n_tokens)
            assert greedy(model, ids[:length], n_tokens) == expected
            assert len(set(expected)) > 3  # a model that repeats one token would hide mistakes
            check_draws(model, ids[:length], n_tokens, temperature=0.9, top_p=0.95)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_compressed_model_computes_what_transformers_computes(built, name):
    check_parity(*built(name))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_with_scales_of_64_columns(in_records, tmp_path, name, exact):
    folder, file = in_records(name), tmp_path / "model.gqsa"
    succeed("build", folder, "-o", file, *(EXACT if exact else INTEGER))
    with ArtifactFile.open(file) as artifact:
        ops = {kernel.op for kernel in artifact.program.plans["cpu"].kernels}
        expected = {"linear_sparse", "linear_dense"} if exact else {"linear_records", "quantize", "embedding_records"}
        others = {"linear_records", "quantize", "embedding_records", "linear_sparse", "linear_dense"} - expected
        assert expected <= ops and not ops & others
    if exact:
        check_parity(folder, file)
    else:
        check_parity(folder, file, tolerance=ACTIVATIONS_16, reference=round_outer(load_reference(folder)))


def test_multi_stream_linears_compute_what_transformers_computes(tmp_path, sources):
    folder = save_multi_stream(tmp_path / "mixed", sources["qwen2"])
    succeed("build", folder, "-o", tmp_path / "mixed.gqsa", *EXACT)
    with ArtifactFile.open(tmp_path / "mixed.gqsa") as file:
        bits = {kernel.params["bits"] for kernel in file.program.plans["cpu"].kernels if kernel.op == "linear_sparse"}
        assert bits == {4, 8}
        assert any(
            kernel.params.get("accumulate")
            for kernel in file.program.plans["cpu"].kernels
            if kernel.op == "linear_sparse"
        )
    check_parity(folder, tmp_path / "mixed.gqsa")


def test_an_exported_model_is_built_to_the_same_numbers(tmp_path, sources):
    compressed, exported, file = tmp_path / "compressed", tmp_path / "exported", tmp_path / "exported.gqsa"
    succeed("compress", sources["llama"], "-o", compressed, "--sparsity", 0, "--samples", 4, "--seq-len", 32)
    assert succeed("export", compressed, "-o", exported).stderr == f"written to {exported}\n"
    succeed("build", exported, "-o", file, *EXACT)
    check_parity(compressed, file)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])
def test_a_linear_that_lost_all_groups(in_records, tmp_path, exact):
    folder = shutil.copytree(in_records("llama"), tmp_path / "empty")
    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.1.self_attn.o_proj."
    tensors[stem + "keep"][:] = 0
    for part in ("levels.4", "scales", "zeros"):
        tensors[stem + part] = tensors[stem + part][:0]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    succeed("build", folder, "-o", tmp_path / "empty.gqsa", *(EXACT if exact else INTEGER))
    if exact:
        check_parity(folder, tmp_path / "empty.gqsa")
    else:
        reference = round_outer(load_reference(folder))
        check_parity(folder, tmp_path / "empty.gqsa", tolerance=ACTIVATIONS_16, reference=reference)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_without_data(tmp_path, sources, bits, exact):
    file = tmp_path / "rounded.gqsa"
    source, group_size, tolerance = sources["llama"], 16, 1e-4
    if not exact:  # groups that records hold
        source = save_checkpoint(tmp_path / "source", "llama", intermediate_size=128)
        group_size, tolerance = 64, ACTIVATIONS_16
    options = ("--bits", bits, "--group-size", group_size, "--sparsity", 0.3, *(EXACT if exact else INTEGER))
    result = succeed("build", source, "-o", file, *options)
    assert "note: rounding without calibration data" in result.stderr
    reference = load_rounded_reference(source, Rounding(bits, group_size, 0.3), head_bits=16 if exact else 8)
    with Model.open(file, device="cpu", threads=1) as model:
        ids = model.tokenize(TEXT)[:60]
        assert np.abs(model.score(ids).log_probs - expected_log_probs(reference, ids)).max() < tolerance
        assert greedy(model, ids, 8) == expected_greedy(reference, ids, 8)


@pytest.mark.parametrize("kv_dtype, tolerance", [("f16", 5e-3), ("int8", 0.1)])
def test_a_smaller_kv_cache_stays_close(built, tmp_path, kv_dtype, tolerance):
    folder, _ = built("llama")
    file = tmp_path / "smaller.gqsa"
    succeed("build", folder, "-o", file, "--target", TARGET, "--exact", "--kv-dtype", kv_dtype)
    assert f"layers of {kv_dtype} KV cache" in succeed("inspect", file).stdout
    reference = load_reference(folder)
    with Model.open(file, device="cpu", threads=1) as model:
        assert model.program.kv_dtype == kv_dtype
        ids = model.tokenize(TEXT)[:200]
        expected = expected_log_probs(reference, ids)
        assert np.abs(model.score(ids).log_probs - expected).max() < tolerance
        # Token by token the cache is the same but for the last bits, and so is a session's in another model.
        model.engine.reset()
        rows = [model.engine.prefill(ids[:150]), *(model.engine.decode(token) for token in ids[150:160])]
        best = np.array(rows, np.float64)
        log_probs = best - np.log(np.exp(best).sum(1, keepdims=True))
        assert np.abs(log_probs[np.arange(11), ids[150:161]] - expected[149:160]).max() < tolerance
        model.save_session(tmp_path / "s")
        n_bytes = 160 * (4 + model.program.kv_bytes(1))
        assert (tmp_path / "s").stat().st_size == 80 + n_bytes
        following = model.engine.decode(ids[160])
    with Model.open(file, device="cpu", threads=2) as model:
        model.load_session(tmp_path / "s")
        np.testing.assert_array_equal(model.engine.decode(ids[160]), following)


def test_the_same_input_gives_the_same_bytes(built, tmp_path):
    folder, file = built("qwen2")
    options = (*EXACT, "--json")
    again = json.loads(succeed("build", folder, "-o", tmp_path / "again.gqsa", *options).stdout)
    assert (again["kernels_compiled"], again["kernels_cached"]) == (0, 1)
    anew = json.loads(succeed("build", folder, "-o", tmp_path / "anew.gqsa", *options, "--no-cache").stdout)
    assert (anew["kernels_compiled"], anew["kernels_cached"]) == (1, 0)
    assert (tmp_path / "again.gqsa").read_bytes() == (tmp_path / "anew.gqsa").read_bytes() == file.read_bytes()


def test_a_signed_file_runs_where_its_maker_is_trusted(built, tmp_path):
    folder, _ = built("qwen2")
    file = tmp_path / "m.gqsa"
    private, public = save_key(tmp_path / "maker.pem")
    build = ("build", folder, "-o", file, *EXACT)
    assert "there is no such file to sign with" in refusal(gqsac(*build, "--sign", tmp_path / "none.pem"))
    assert "nothing can be signed with this" in refusal(gqsac(*build, "--sign", public))
    assert not file.exists()
    assert f"signed: {file}.sig" in succeed(*build, "--sign", private).stderr
    run = ("run", file, "--raw", "-p", "Hi", "--max-new-tokens", 4, "--device", "cpu")
    assert succeed(*run, "--require-signature", public).stdout == succeed(*run).stdout
    _, other = save_key(tmp_path / "other.pem")
    assert "made with another key" in refusal(gqsac(*run, "--require-signature", other))

    firm = Authority("firm", Authority("root"), ca=False).save(tmp_path)
    succeed("sign", file, "--key", tmp_path / "firm.key", "--certificate", firm, "-o", tmp_path / "by-firm.sig")
    assert "nothing can be signed with this" in refusal(gqsac("sign", file, "--key", private, "--certificate", firm))
    assert "there is no such file to sign;" in refusal(gqsac("sign", tmp_path / "none.gqsa", "--key", private))
    assert "cannot be written" in refusal(gqsac("sign", file, "--key", private, "-o", tmp_path / "none" / "m.sig"))
    assert gqsac("sign", file, "--key", private, "--chain", firm).exit_code == 2
    with file.open("r+b") as changed:
        changed.write(b"g")
    assert "this is not a .gqsa file" in refusal(gqsac(*run, "--require-signature", public))


def test_json_says_what_was_built(built, tmp_path):
    folder, _ = built("opt")
    dumped = succeed("build", folder, "-o", tmp_path / "o.gqsa", "--target", TARGET, "--kv-dtype", "f32", "--json")
    summary = json.loads(dumped.stdout)
    assert summary["targets"] == [TARGET]
    assert summary["file_bytes"] == (tmp_path / "o.gqsa").stat().st_size
    assert summary["sparsity"] == pytest.approx(0.25, abs=0.02)
    facts = json.loads(succeed("inspect", tmp_path / "o.gqsa", "--json").stdout)
    assert facts["name"] == "opt"
    assert json.loads(succeed("verify", tmp_path / "o.gqsa", "--json").stdout)["ok"] is True


def test_dump_holds_every_stage(built, tmp_path):
    folder, _ = built("llama")
    dump = tmp_path / "dump"
    options = (*EXACT, "--target", "sm_90", "--dump-dir", dump)
    succeed("build", folder, "-o", tmp_path / "m.gqsa", *options)
    for name in ("1-legalized.txt", "2-fused.txt"):
        text = (dump / name).read_text()
        assert text.startswith("LlamaForCausalLM: vocabulary 256, context 320\n") and "Attention(" in text
    plans = json.loads((dump / "3-plan.json").read_text())["plans"]
    kernels, of_cpu = ({kernel["name"] for kernel in plans[family]["kernels"]} for family in ("cuda", "cpu"))
    assert {path.stem for path in (dump / "cuda").glob("*.cu")} == kernels
    assert of_cpu < {path.stem for path in (dump / "cpu").glob("*.c")}  # and the thread pool
    assert {path.stem for path in (dump / "sm_90").glob("*.cubin")} == kernels
    assert all("registers" in path.read_text() for path in (dump / "sm_90").glob("*.log"))
    assert (dump / TARGET / "kernels.so").read_bytes().startswith(b"\x7fELF")


def test_a_dry_run_writes_nothing(built, tmp_path, kernel_cache):
    folder, _ = built("llama")
    before = sorted(kernel_cache.rglob("*"))
    result = succeed("build", folder, "-o", tmp_path / "m.gqsa", "--dry-run", "--json", "--max-context", 77)
    assert json.loads(result.stdout)["file_bytes"] is None
    assert list(tmp_path.iterdir()) == [] and sorted(kernel_cache.rglob("*")) == before


def test_cuda_targets_hold_every_kernel(built, tmp_path):
    folder, _ = built("llama")
    file = tmp_path / "gpu.gqsa"
    result = succeed("build", folder, "-o", file, "--target", "compute_80", "--target", "sm_90")
    assert "registers (spilled bytes)" in result.stderr
    with ArtifactFile.open(file) as artifact:
        program = artifact.program
        assert [(binary.target, binary.kind) for binary in program.binaries] == [
            ("sm_90", "cubin"),
            ("compute_80", "ptx"),
        ]
        for binary in program.binaries:
            data = artifact.code(binary)
            assert set(binary.kernels) == {kernel.name for kernel in program.plans["cuda"].kernels}
            for name, (offset, size) in binary.kernels.items():
                code = data[offset : offset + size]
                assert code.startswith(b"\x7fELF" if binary.kind == "cubin" else b"//")
                assert name.encode() in code
    succeed("verify", file)


def test_a_chat_and_a_score_through_the_command(built, tmp_path):
    _, file = built("qwen2")
    chat = succeed("chat", file, "--max-new-tokens", 5, "--temperature", 0, "--device", "cpu", stdin="Hi\n/exit\n")
    with Model.open(file, device="cpu") as model:
        expected = "".join(model.chat([{"role": "user", "content": "Hi"}], max_new_tokens=5))
    assert chat.stdout == f"{expected}\n"
    (tmp_path / "text.txt").write_text(TEXT)
    scored = succeed("eval", "ppl", file, "--text", tmp_path / "text.txt", "--window", 100, "--json")
    torch_scored = succeed("eval", "ppl", built("qwen2")[0], "--text", tmp_path / "text.txt", "--window", 100, "--json")
    assert json.loads(scored.stdout)["perplexity"] == pytest.approx(
        json.loads(torch_scored.stdout)["perplexity"], rel=1e-3
    )


@pytest.mark.parametrize("name", ["qwen2-novels", "opt-novels"])
def test_trained_models_match_on_real_prompts(tmp_path, shared_model, name):
    source = shared_model(name)
    file = tmp_path / f"{name}.gqsa"
    options = ("--bits", 4, "--sparsity", 0.05, *EXACT)
    succeed("build", source, "-o", file, *options)
    reference = load_rounded_reference(source, Rounding(4, 16, 0.05))
    with Model.open(file, device="cpu") as model:
        for prompt in ("It was a dark and stormy night, and the", "She opened the letter slowly, and"):
            ids = model.tokenize(prompt)
            assert greedy(model, ids, 16) == expected_greedy(reference, ids, 16)
            assert np.abs(model.score(ids).log_probs - expected_log_probs(reference, ids)).max() < 1e-4


def test_a_gpu_that_is_not_there_is_one_sentence(built, tmp_path):
    try:
        device_cuda.Gpu(0)
    except device_cuda.DeviceError:
        pass
    else:
        pytest.skip("this machine has a GPU")
    folder, _ = built("llama")
    succeed("build", folder, "-o", tmp_path / "gpu.gqsa", "--target", "sm_90")
    message = refusal(gqsac("run", tmp_path / "gpu.gqsa", "--device", "cuda", "--prompt", "x"))
    assert "no NVIDIA driver found" in message or "finds no GPU" in message
    message = refusal(gqsac("run", tmp_path / "gpu.gqsa", "--prompt", "x"))
    assert "nothing here runs this file" in message and "--target" in message
