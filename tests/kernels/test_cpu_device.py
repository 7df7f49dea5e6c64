"""CpuDevice: runs programs as the oracles say, on any number of threads, and refuses what it cannot."""

import io
import threading
import time

import numpy as np
import pytest
from gqsa_runtime import device_cpu
from gqsa_runtime.device_cpu import CpuDevice, choose_binary, probe, supported_targets
from gqsa_runtime.engine import launch_state
from gqsa_runtime.errors import DeviceError
from gqsa_runtime.operators import state_elements
from gqsa_runtime.program import Argument, Binary, Buffer, Kernel, KVLayer, Plan, Program, Rope, Step
from gqsa_runtime.rope import rope_table

from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.compile_cpu import compile_cpu
from gqsac.compiler.passes.render import render
from tests.kernels import oracles

pytestmark = pytest.mark.skipif(not supported_targets(), reason="this CPU runs no gqsac kernels")

VOCAB, HEADS, HEAD_DIM, CONTEXT = 300, 3, 32, 40
WIDTH = HEADS * HEAD_DIM
ATTENTION = {"heads": HEADS, "kv_heads": HEADS, "head_dim": HEAD_DIM, "kv_dtype": "f16", "window": 0, "q_stride": WIDTH}
SPECS = {
    "embed": KernelSpec.make(
        "embedding", tokens=1, width=WIDTH, vocab=VOCAB, source="tokens", position_offset=0, scale=1.0,
        out_stride=WIDTH,
    ),
    "append": KernelSpec.make(
        "kv_append", tokens=1, rotary_dim=HEAD_DIM, k_stride=WIDTH, v_stride=WIDTH, **ATTENTION
    ),
    "attend": KernelSpec.make("attention", tokens=1, scale=HEAD_DIM**-0.5, out_stride=WIDTH, **ATTENTION),
    "head": KernelSpec.make(
        "linear_dense", tokens=1, rows=VOCAB, k=WIDTH, x_stride=WIDTH, out_stride=VOCAB, bias=False,
        activation="none", residual=False, residual_stride=VOCAB,
    ),
}  # fmt: skip


def make_program(targets=("x86_64_v4", "x86_64_v3", "aarch64")):
    """Embedding, one attention whose q, k and v are all the embedding, logits by the tied table."""

    def buffer(name, offset=0):
        return Argument("buffer", name, offset)

    table, state, cache = Argument("tensor", "table"), buffer("state"), (Argument("k_cache", 0), Argument("v_cache", 0))
    steps = (
        Step("embed", (buffer("tokens"), table, buffer("rows", WIDTH), state)),
        Step("embed", (buffer("tokens"), table, buffer("x"), state)),
        Step("append", (buffer("rows", WIDTH), buffer("x"), buffer("x"), Argument("rope", "main"), *cache, state)),
        Step("attend", (buffer("rows", WIDTH), *cache, buffer("x"), state)),
        Step("head", (buffer("x"), table, Argument("null"), Argument("null"), buffer("logits"), state)),
    )
    buffers = (
        Buffer("tokens", "i32", 1, 0),
        Buffer("state", "i32", state_elements(1), 64),
        Buffer("x", "f32", WIDTH, 128),
        Buffer("rows", "f32", 2 * WIDTH, 128 + 4 * WIDTH),
        Buffer("logits", "f32", VOCAB, 128 + 12 * WIDTH),
    )
    kernels = tuple(Kernel(name, spec.op, dict(spec.params), {}) for name, spec in SPECS.items())
    plan = Plan(1, 1, buffers, 128 + 12 * WIDTH + 4 * VOCAB, kernels, {"decode": steps})
    return Program(
        name="test", model_class="Test", vocab_size=VOCAB, max_context=CONTEXT, bos_token_id=None,
        eos_token_ids=(), kv_dtype="f16", kv_layers=(KVLayer(HEADS, HEAD_DIM),),
        ropes={"main": Rope("inv_freq", HEAD_DIM, 1.0)}, plans={"cpu": plan},
        binaries=tuple(Binary(target, "shared_object", f"so.{target}", 0, "", {"": (0, 0)}) for target in targets),
    )  # fmt: skip


def make_tensors(seed=0):
    rng = np.random.default_rng(seed)
    inv_freq = (10000.0 ** (-np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)).astype(np.float32)
    return {"table": rng.standard_normal((VOCAB, WIDTH)).astype(np.float16), "inv_freq": inv_freq}


def shared_object(binary):
    return compile_cpu({name: render("cpu", spec, name) for name, spec in SPECS.items()}, binary.target)


def open_device(tensors=None, context=CONTEXT, threads=None, program=None, slots=1):
    return CpuDevice(program or make_program(), tensors or make_tensors(), shared_object, context, threads, slots)


def decode(device, tokens, start=0, slot=0, context=CONTEXT):
    """Logits [len(tokens), VOCAB]."""
    rows = []
    for position, token in enumerate(tokens, start):
        device.upload("tokens", np.array([token]))
        device.upload("state", launch_state(context, slot, np.array([position])))
        device.launch("decode")
        rows.append(device.download("logits", VOCAB))
    return np.array(rows)


def expected_logits(tensors, tokens):
    table = tensors["table"].astype(np.float32)
    rope = rope_table(tensors["inv_freq"], 1.0, CONTEXT).reshape(-1)
    caches = {name: np.zeros(CONTEXT * WIDTH, np.float16) for name in ("k_cache", "v_cache")}
    rows = []
    for position, token in enumerate(tokens):
        x, state = table[token], launch_state(CONTEXT, 0, np.array([position]))
        arguments = {"q": x, "k": x, "v": x, "rope": rope, **caches, "state": state}
        out = oracles.run("kv_append", dict(SPECS["append"].params), arguments)
        caches = {name: out[name].astype(np.float16) for name in caches}
        arguments = {"q": out["q"].astype(np.float32), **caches, "out": np.zeros(WIDTH, np.float32), "state": state}
        rows.append(table @ oracles.run("attention", dict(SPECS["attend"].params), arguments)["out"])
    return np.array(rows)


def test_program_runs_as_the_oracles_say_on_any_number_of_threads():
    tensors, tokens = make_tensors(), np.random.default_rng(1).integers(0, VOCAB, CONTEXT)
    results = []
    for threads in (1, 2, 5):
        device = open_device(tensors, threads=threads)
        results.append(decode(device, tokens))
        device.close()
    # The cache is f16: a key that rounds the other way moves a logit by more than f32 arithmetic does.
    np.testing.assert_allclose(results[0], expected_logits(tensors, tokens), rtol=2e-3, atol=2e-2)
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


def test_slots_hold_sequences_apart():
    tensors = make_tensors()
    texts = np.random.default_rng(2).integers(0, VOCAB, (3, 10))
    device = open_device(tensors, context=12, threads=2, slots=3)
    for position in range(10):
        logits = [decode(device, [text[position]], position, slot, 12) for slot, text in enumerate(texts)]
    for text, last in zip(texts, logits, strict=True):
        np.testing.assert_allclose(last[0], expected_logits(tensors, text)[-1], rtol=2e-3, atol=2e-2)
    device.close()


def test_steps_and_memory_are_timed(monkeypatch):
    monkeypatch.setattr(device_cpu, "_BANDWIDTH_BYTES", 1 << 20)
    device = open_device(threads=2)
    first = decode(device, [7])
    seconds = device.step_seconds("decode", repeats=3)
    assert len(seconds) == len(make_program().plans["cpu"].phases["decode"]) and min(seconds) > 0
    assert device.download("logits", VOCAB).tobytes() == first.tobytes()  # the steps ran, in their order
    assert 1e6 < device.bandwidth() < 1e13
    device.close()


def test_threads_that_fell_asleep_wake_up():
    device = open_device(threads=4)
    first = decode(device, [7])
    for _ in range(20):
        time.sleep(0.005)  # longer than a waiting thread spins
        assert decode(device, [7]).tobytes() == first.tobytes()
    device.close()


def test_devices_run_side_by_side_in_their_own_threads():
    expected = {seed: expected_logits(make_tensors(seed), range(10)) for seed in (1, 2)}
    results = {}

    def run(seed):
        device = open_device(make_tensors(seed), threads=2)
        results[seed] = decode(device, range(10))
        device.close()

    workers = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in (1, 2):
        np.testing.assert_allclose(results[seed], expected[seed], rtol=2e-3, atol=2e-2)


def test_another_file_never_gets_a_closed_files_kernels():
    """The path of an in-memory library can come back for the next one."""
    returns = {}
    for value in (1.0, 2.0):
        text = f'__attribute__((visibility("default"))) double value(void) {{ return {value}; }}'
        library = device_cpu._load_library(compile_cpu({"value": text}, supported_targets()[0]))
        library.value.restype = device_cpu.ctypes.c_double
        returns[value] = library.value()
    assert returns == {1.0: 1.0, 2.0: 2.0}


def test_library_loads_from_a_private_file_where_memory_may_not_run_code(monkeypatch):
    real = device_cpu.ctypes.CDLL

    def refuse_memory(path):
        if path.startswith("/proc/"):
            raise OSError("failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(device_cpu.ctypes, "CDLL", refuse_memory)
    library, descriptor = device_cpu._open_library(shared_object(choose_binary(make_program().binaries)))
    assert descriptor is None and library.gqsa_run


def test_damaged_library_is_refused_in_one_sentence():
    with pytest.raises(DeviceError, match="cannot be loaded.*gqsa verify"):
        device_cpu._load_library(b"not a shared object")


def test_transfers_are_bounded():
    device = open_device()
    with pytest.raises(ValueError, match="2 values do not fit buffer 'tokens' of 1"):
        device.upload("tokens", np.zeros(2))
    with pytest.raises(ValueError, match="'state' holds 10 elements, not 11"):
        device.download("state", 11)
    device.upload("state", np.array([1, 2]))
    held = device.download("state", 2)
    device.upload("state", np.array([3, 4]))
    assert held.tolist() == [1, 2]  # a copy
    device.close()
    device.close()


def test_non_contiguous_tensor_is_refused():
    tensors = make_tensors()
    tensors["table"] = tensors["table"][:, ::-1]
    with pytest.raises(ValueError, match="'table' is not contiguous"):
        open_device(tensors)


def test_best_supported_target_is_chosen(monkeypatch):
    monkeypatch.setattr(device_cpu, "supported_targets", lambda: ("x86_64_v4", "x86_64_v3"))
    assert choose_binary(make_program().binaries).target == "x86_64_v4"
    assert choose_binary(make_program(("x86_64_v3", "aarch64")).binaries).target == "x86_64_v3"
    monkeypatch.setenv(device_cpu.TARGET_VARIABLE, "x86_64_v3")
    assert choose_binary(make_program().binaries).target == "x86_64_v3"
    monkeypatch.setenv(device_cpu.TARGET_VARIABLE, "aarch64")
    with pytest.raises(DeviceError, match="GQSA_CPU_TARGET=aarch64 cannot be used"):
        choose_binary(make_program().binaries)


def test_missing_binary_names_both_and_the_command(monkeypatch):
    monkeypatch.setattr(device_cpu, "supported_targets", lambda: ("x86_64_v3",))
    program = make_program(("aarch64",))
    expected = r"no kernels for this CPU \(x86_64_v3\): its CPU targets are aarch64; .*--target x86_64_v3"
    with pytest.raises(DeviceError, match=expected):
        choose_binary(program.binaries)
    runs, reason = probe(program)
    assert not runs and "--target x86_64_v3" in reason
    monkeypatch.setattr(device_cpu, "supported_targets", lambda: ())
    with pytest.raises(DeviceError, match="cannot run any gqsac kernels"):
        choose_binary(program.binaries)


def test_x86_targets_follow_the_cpu_flags(monkeypatch):
    monkeypatch.setattr(device_cpu.platform, "machine", lambda: "x86_64")
    v3, v4 = (device_cpu._TARGETS[name] for name in ("x86_64_v3", "x86_64_v4"))
    avx_vnni, vnni = v3 | {"avx_vnni"}, v4 | {"avx512_vnni"}
    for flags, targets in (
        (vnni | avx_vnni, ("x86_64_v4_vnni", "x86_64_v4", "x86_64_v3_vnni", "x86_64_v3")),
        (vnni, ("x86_64_v4_vnni", "x86_64_v4", "x86_64_v3")),
        (v4, ("x86_64_v4", "x86_64_v3")),
        (avx_vnni, ("x86_64_v3_vnni", "x86_64_v3")),
        (vnni - {"avx512vl"}, ("x86_64_v3",)),
        (avx_vnni - {"f16c"}, ()),
    ):
        monkeypatch.setattr(device_cpu, "_cpu_flags", lambda flags=flags: frozenset(flags))
        assert supported_targets() == targets


CPUINFO = {
    "aarch64": "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32{}\nCPU part\t: 0xd0b\n\n",
    "x86_64": "processor\t: 0\nmodel name\t: flags\nflags\t\t: fpu avx avx2 bmi1 bmi2 f16c fma abm movbe xsave{}\n\n",
}


@pytest.mark.parametrize(
    "machine, flag, targets",
    [
        ("aarch64", "", ("aarch64",)),
        ("aarch64", " asimddp", ("aarch64_dotprod", "aarch64")),
        ("x86_64", "", ("x86_64_v3",)),
        ("x86_64", " avx_vnni", ("x86_64_v3_vnni", "x86_64_v3")),
        ("", " avx_vnni", ()),
    ],
)
def test_flags_are_read_as_linux_writes_them(monkeypatch, machine, flag, targets):
    text = CPUINFO[machine or "x86_64"].format(flag)
    monkeypatch.setattr(device_cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(device_cpu, "open", lambda path: io.StringIO(text), raising=False)
    assert supported_targets() == targets


def test_thread_count_must_be_positive():
    with pytest.raises(DeviceError, match="0 threads"):
        open_device(threads=0)


@pytest.mark.parametrize("slots", [1, 2])
def test_rows_of_the_cache_bring_a_sequence_to_another_device(slots):
    tensors, tokens = make_tensors(), np.random.default_rng(3).integers(0, VOCAB, CONTEXT)
    first = open_device(tensors, slots=slots)
    decode(first, tokens[:9])
    rows = {cache: first.download_rows(cache, 0, 9) for cache in ("k_cache", "v_cache")}
    expected = decode(first, tokens[9:12], 9)
    second = open_device(tensors)
    for cache, values in rows.items():
        assert values.shape == (9, WIDTH) and values.any()
        second.upload_rows(cache, 0, values)
    assert decode(second, tokens[9:12], 9).tobytes() == expected.tobytes()
