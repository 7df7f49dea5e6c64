"""A launch plan that would point a kernel outside its memory is refused, rule by rule."""

import dataclasses
import re
import time

import pytest
from gqsa_runtime.errors import FormatError
from gqsa_runtime.operators import OPERATORS, check_params, families_of
from gqsa_runtime.program import Argument, Binary, Kernel, KVLayer, Launch, Plan, Program, Rope
from gqsa_runtime.reader import TensorInfo
from gqsa_runtime.validate import ContentChecks, validate

from tests.format import records_program, tiny


def infos(**changes) -> dict[str, TensorInfo]:
    arrays = {**tiny.tensors(), **changes}
    return {
        name: TensorInfo(array.shape, f"{array.dtype.kind}{8 * array.dtype.itemsize}", 0, array.nbytes)
        for name, array in arrays.items()
    }


PLAN_FIELDS = {field.name for field in dataclasses.fields(Plan)}


def cubin(plan: Plan) -> Binary:
    return tiny.binary("sm_90", "cubin", dict.fromkeys([kernel.name for kernel in plan.kernels], (0, 10)))


def cuda_program(plan: Plan | None = None) -> dict:
    """Changes that make the tiny program one for CUDA."""
    plan = plan or tiny.cuda_plan()
    return {"plans": {"cuda": plan}, "binaries": (cubin(plan),)}


def program(**changes) -> Program:
    """The tiny program with changes to it or to its plan."""
    in_plan = {name: changes.pop(name) for name in PLAN_FIELDS & changes.keys()}
    return tiny.program(**({"plans": {"cpu": tiny.plan(**in_plan)}} if in_plan else {}), **changes)


def refuse(match: str, tensors=None, context=None, **changes) -> None:
    with pytest.raises(FormatError, match=match):
        validate(program(**changes), tensors or infos(), context)


def with_buffer(name: str, **changes) -> tuple:
    return tuple(dataclasses.replace(b, **changes) if b.name == name else b for b in tiny.plan().buffers)


def with_kernel(kernel_name: str, /, **changes) -> tuple:
    return tuple(dataclasses.replace(k, **changes) if k.name == kernel_name else k for k in tiny.plan().kernels)


def with_launch(target: str = "", **changes) -> Plan:
    """The CUDA plan whose kernels have one launch, changed."""
    launches = {target: dataclasses.replace(Launch((1, 1, 1), 128, 0), **changes)}
    return tiny.cuda_plan(kernels=with_launches(launches))


def with_launches(launches: dict) -> tuple:
    return tuple(dataclasses.replace(kernel, launches=launches) for kernel in tiny.plan().kernels)


def with_param(name: str, **changes) -> tuple:
    (kernel,) = [k for k in tiny.plan().kernels if k.name == name]
    return with_kernel(name, params={**kernel.params, **changes})


def with_arg(phase: str, step: int, name: str, argument: Argument) -> dict:
    """Phases with one argument replaced, found by its parameter's name."""
    phases = dict(tiny.plan().phases)
    steps = list(phases[phase])
    (op,) = [k.op for k in tiny.plan().kernels if k.name == steps[step].kernel]
    args = list(steps[step].args)
    args[[p.name for p in OPERATORS[op].operands].index(name)] = argument
    steps[step] = dataclasses.replace(steps[step], args=tuple(args))
    return {**phases, phase: tuple(steps)}


def test_the_tiny_program_is_sound():
    validate(tiny.program(), infos())
    validate(tiny.program(), infos(), context=8)


@pytest.mark.parametrize("context", [0, tiny.CONTEXT + 1])
def test_context_out_of_range(context):
    refuse("context is", context=context)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": "258"},
        {"vocab_size": True},
        {"eos_token_ids": ("x",)},
        {"bos_token_id": 1.5},
        {"kv_layers": (KVLayer("1", 16),)},
        {"ropes": {"main": Rope(3, 4, 1.0)}},
        {"buffers": (7,)},
        {"phases": []},
        {"name": None},
        {"binaries": 3},
        cuda_program(with_launch(grid=(1, 1))),
        {"plans": {"cpu": None}},
    ],
)
def test_wrong_types(changes):
    refuse("expected", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 0},
        {"max_context": -1},
        {"prefill_chunk": 2**31},
        {"score_chunk": 0},
        {"score_chunk": tiny.CHUNK + 1},
        {"kv_dtype": "i8"},
        {"arena_bytes": -1},
        {"kv_layers": (KVLayer(0, 16),)},
        {"kv_layers": (KVLayer(1, 16, -1),)},
        {"kv_layers": (KVLayer(1, 16, 2**30),)},
        {"eos_token_ids": (258,)},
        {"bos_token_id": -1},
    ],
)
def test_numbers_out_of_range(changes):
    refuse("launch plan is wrong", **changes)


@pytest.mark.parametrize("number", [10**400, -(10**400), 1e39, -1e39, float("nan"), float("inf")])
def test_numbers_that_float32_does_not_hold(number):
    refuse("eps is .*float32", kernels=with_param("rms_norm_t1", eps=number))
    refuse("is scaled by .*float32", ropes={"main": dataclasses.replace(tiny.program().ropes["main"], scaling=number)})


@pytest.mark.parametrize("name", ["a\x1b[31mb", "\ud800", "a\nb", "x" * 257])
def test_names_that_cannot_be_shown(name):
    refuse("name is .*printable", name=name)
    refuse("model_class is .*printable", model_class=name)


def test_a_program_too_large_to_parse():
    began_s = time.perf_counter()
    with pytest.raises(FormatError, match="60000000 characters, expected at most"):
        Program.from_json("[]," * 20_000_000)
    assert time.perf_counter() - began_s < 1


def test_buffers():
    plan = tiny.plan()
    refuse("same name", buffers=(*plan.buffers, plan.buffers[0]))
    refuse("dtype", buffers=with_buffer("x", dtype="f64"))
    refuse("elements at byte", buffers=with_buffer("x", elements=-1))
    refuse("elements at byte", buffers=with_buffer("x", offset=-64))
    refuse("elements at byte", buffers=with_buffer("x", offset=4))
    refuse("the arena has", arena_bytes=plan.arena_bytes - 64)
    refuse("the arena has", buffers=with_buffer("x", offset=1 << 40))
    (state,) = [b for b in plan.buffers if b.name == "state"]
    refuse("'state' and 'x' overlap", buffers=with_buffer("x", offset=state.offset))
    (choice,) = [b for b in plan.buffers if b.name == "argmax"]
    refuse("'argmax' and 'x' overlap", buffers=with_buffer("x", offset=choice.offset))


@pytest.mark.parametrize("name", ["tokens", "targets", "state", "logits", "log_probs", "argmax"])
def test_reserved_buffers(name):
    refuse(f"buffer '{name}'", buffers=tuple(b for b in tiny.plan().buffers if b.name != name))
    refuse(f"buffer '{name}'", buffers=with_buffer(name, elements=1))
    refuse(f"buffer '{name}'", buffers=with_buffer(name, dtype="i8"))


def test_ropes():
    refuse("frequencies", ropes={"main": Rope("inv_freq", 6, 1.0)})
    refuse("no tensor", ropes={"main": Rope("nothing", 4, 1.0)})
    refuse("is f16, expected f32", ropes={"main": Rope("embed", 4, 1.0)})
    refuse("scaled by", ropes={"main": Rope("inv_freq", 4, float("nan"))})
    validate(tiny.program(ropes={"main": Rope("inv_freq", 4, 1.0, "inv_freq", 8)}), infos())
    for long, original, match in (
        ("inv_freq", None, "but not both"),
        (None, 8, "but not both"),
        ("inv_freq", 0, "beyond 0 positions"),
        ("inv_freq", tiny.CONTEXT, f"beyond {tiny.CONTEXT} positions, expected 1 to {tiny.CONTEXT - 1}"),
        ("nothing", 8, "no tensor"),
        ("norm", 8, "32 frequencies for 4 dimensions"),
    ):
        refuse(match, ropes={"main": Rope("inv_freq", 4, 1.0, long, original)})


def test_kernels():
    refuse("same name", kernels=(*tiny.plan().kernels, tiny.plan().kernels[0]))
    refuse("unknown operator", kernels=with_kernel("last_row", op="matmul"))
    refuse("C identifier", kernels=with_kernel("last_row", name="last row"))
    refuse("no such kernel", kernels=tiny.plan().kernels[1:])


def test_launches():
    def refuse_launch(match, target="", **changes):
        refuse(match, **cuda_program(with_launch(target, **changes)))

    refuse_launch("has the grid", grid=(0, 1, 1))
    refuse_launch("has the grid", grid=(1, 1 << 17, 1))
    refuse_launch("threads", block=2048)
    refuse_launch("bytes shared", shared_bytes=1 << 20)
    refuse_launch("for cuda has launches for \\['sm_90'\\]", target="sm_90")
    refuse("for cpu has launches for \\[''\\]", kernels=with_launches({"": Launch((1, 1, 1), 128, 0)}))
    launches = {"": Launch((1, 1, 1), 128, 0), "sm_90": Launch((1, 0, 1), 128, 0)}
    refuse("has the grid", **cuda_program(tiny.cuda_plan(kernels=with_launches(launches))))


def test_plans():
    cuda, cpu = tiny.cuda_plan(), tiny.plan()
    both = {"plans": {"cuda": cuda, "cpu": cpu}, "binaries": (*tiny.program().binaries, cubin(cuda))}
    validate(tiny.program(**both), infos())
    assert Program.from_json(tiny.program(**both).to_json()) == tiny.program(**both)
    refuse(r"has no plan: there are those of \['cuda'\]", plans={"cuda": cuda})
    refuse(r"plans for \['cpu', 'tpu'\] and binaries for \['cpu'\]", plans={"cpu": cpu, "tpu": cpu})
    refuse(r"plans for \[\] and binaries for \[\]", plans={}, binaries=())
    short = tiny.cuda_plan(kernels=cuda.kernels[1:])
    refuse("for cuda .*no such kernel", **cuda_program(short))


def test_a_target_may_have_a_launch_of_its_own():
    others, own = Launch((1, 1, 1), 128, 0), Launch((7, 1, 1), 64, 16)
    kernel = with_launches({"": others, "sm_90": own})[0]
    assert kernel.launch("sm_90") == own and kernel.launch("sm_80") == kernel.launch("compute_80") == others


APPEND_ATTENTION = {"tokens": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "kv_dtype": "f16", "rotary_dim": 4,
                    "scale": 0.25, "window": 0, "splits": 8, "q_stride": 32, "k_stride": 16, "v_stride": 16,
                    "out_stride": 32}  # fmt: skip


ATTENTION_HALVES = {"tokens": 128, "heads": 2, "kv_heads": 1, "head_dim": 16, "kv_dtype": "f16", "scale": 0.25,
                    "window": 0, "q_stride": 32, "out_stride": 32}  # fmt: skip
HALVES = {"tokens": 128, "k": 64, "x_stride": 64, "norm": "rms", "eps": 1e-5}
MATMUL_RECORDS = {
    **{
        name: value
        for name, value in records_program.kernels()["linear_records_t8"].params.items()
        if name not in ("x_stride", "norm", "eps")
    },
    "tokens": 128,
}


@pytest.mark.parametrize("op", sorted(OPERATORS))
def test_every_param_is_checked(op):
    examples = {kernel.op: kernel.params for kernel in tiny.plan().kernels}
    examples["layer_norm"] = {"tokens": 1, "width": 8, "eps": 1e-5, "x_stride": 8, "out_stride": 8}
    examples["gated_activation"] = {"tokens": 1, "width": 8, "activation": "silu", "gate_stride": 8, "up_stride": 8,
                                    "out_stride": 8}  # fmt: skip
    examples["elementwise"] = {"tokens": 1, "width": 8, "function": "add", "scalar": 1, "a_stride": 8, "b_stride": 8,
                               "out_stride": 8}  # fmt: skip
    examples |= {kernel.op: kernel.params for kernel in records_program.kernels().values()}
    examples["append_attention"] = APPEND_ATTENTION
    examples["halves"] = HALVES
    examples["matmul_records"] = MATMUL_RECORDS
    examples["attention_halves"] = ATTENTION_HALVES
    good = examples[op]
    assert check_params(op, good) is None
    assert "expected" in check_params(op, {**good, "more": 1})
    for name in good:
        assert "expected" in check_params(op, {key: value for key, value in good.items() if key != name})
        for bad in (-1, None, "x", [], float("inf"), 2**40):
            fine = (
                bad == -1
                and OPERATORS[op].constants[name] == "a number that float32 holds"
                or bad == 2**40
                and name in ("scale", "scalar", "eps")
            )
            if not fine:
                assert name in check_params(op, {**good, name: bad}), (name, bad)


def test_a_family_has_its_own_operators_alone():
    kernel = Kernel("append_attention_t1", "append_attention", APPEND_ATTENTION, {})
    refuse("cpu targets have no operator 'append_attention'", kernels=(*tiny.plan().kernels, kernel))
    cuda = tiny.cuda_plan()
    cuda = dataclasses.replace(
        cuda, kernels=(*cuda.kernels, dataclasses.replace(kernel, launches={"": Launch((1, 1, 1), 128, 0)}))
    )
    validate(tiny.program(**cuda_program(cuda)), infos())
    families = {op: set(operator.families) for op, operator in OPERATORS.items()}
    assert {op for op, of in families.items() if of != {"cuda", "cpu"}} == {
        "append_attention", "attention_halves", "halves", "matmul_records", "quantize",
    }  # fmt: skip
    linear = records_program.kernels()["linear_records_t8"]
    assert families_of(linear.op, linear.params) == ("cpu",)
    assert families_of(linear.op, {**linear.params, "tokens": 4}) == ("cuda",)
    assert set(families_of(linear.op, {**linear.params, "tokens": 1})) == {"cuda", "cpu"}


def test_params_that_do_not_fit_together():
    assert "multiple of 64" in check_params("halves", {**HALVES, "k": 65})
    assert "64" in check_params("matmul_records", {**MATMUL_RECORDS, "tokens": 64})
    for head_dim in (24, 144):
        assert "multiple of 16 up to 128" in check_params(
            "attention_halves", {**ATTENTION_HALVES, "head_dim": head_dim}
        )
    for head_dim in (24, 272):
        assert "multiple of 16 up to 256" in check_params(
            "append_attention", {**APPEND_ATTENTION, "head_dim": head_dim}
        )
    refuse("whole groups", kernels=with_param("linear_sparse_t1", k=40))
    refuse("whole groups", kernels=with_param("linear_sparse_t1", k=16 * 5000))
    refuse("KV heads", kernels=with_param("attention_t1", heads=2, kv_heads=3))
    refuse("rotary_dim", kernels=with_param("kv_append_t1", rotary_dim=3))
    refuse("rotary_dim", kernels=with_param("kv_append_t1", rotary_dim=18))
    refuse("bits is 4.0", kernels=with_param("linear_sparse_t1", bits=4.0))
    refuse("bias is 0", kernels=with_param("linear_sparse_t1", bias=0))


def test_binaries():
    def refuse_binary(match, **changes):
        binary = dataclasses.replace(tiny.program().binaries[0], **changes)
        refuse(match, binaries=(binary,))

    refuse_binary("kind", kind="wasm")
    refuse_binary("target", kind="cubin")
    refuse_binary("target", target="../x")
    refuse_binary("no tensor", tensor="nothing")
    refuse_binary("is f16, expected i8", tensor="embed")
    refuse_binary("exactly", kernels={})
    refuse_binary("exactly", kernels={"": (0, 1), "x": (0, 1)})
    for place in ((0, 101), (-1, 5), (100, 1), (0, 0), (1 << 60, 1)):
        refuse_binary("lies at", kernels={"": place})
    for n_bytes in (0, -1, (64 << 20) + 1):
        refuse_binary(f"has {n_bytes} bytes of code, expected 1 to 67108864", n_bytes=n_bytes)
    for sha256 in ("", "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n"):
        refuse_binary("has the sha256", sha256=sha256)
    twice = tiny.program().binaries * 2
    refuse("same target", binaries=twice)
    validate(tiny.program(**cuda_program()), infos())
    short = cubin(tiny.cuda_plan(kernels=tiny.cuda_plan().kernels[1:]))
    refuse("exactly", **{**cuda_program(), "binaries": (short,)})


def test_phases():
    phases = tiny.plan().phases
    refuse("phases are", phases={key: steps for key, steps in phases.items() if key != "decode"})
    refuse("phases are", phases={**phases, "train": ()})
    short = dataclasses.replace(phases["decode"][0], args=phases["decode"][0].args[1:])
    refuse("3 arguments, expected 4", phases={**phases, "decode": (short, *phases["decode"][1:])})


@pytest.mark.parametrize(
    ("phase", "step", "name", "argument", "match"),
    [
        ("decode", 0, "ids", Argument("buffer", "targets"), "expected 'tokens'"),
        ("decode", 0, "ids", Argument("buffer", "tokens", 1), "expected 'tokens'"),
        ("decode", 0, "state", Argument("buffer", "tokens"), "expected 'state'"),
        ("decode", 0, "state", Argument("null"), "'null', expected a 'buffer'"),
        ("decode", 0, "table", Argument("buffer", "x"), "'buffer', expected a 'tensor'"),
        ("decode", 0, "table", Argument("tensor", "nothing"), "no tensor 'nothing'"),
        ("decode", 0, "table", Argument("tensor", 3), "no tensor 3"),
        ("decode", 0, "table", Argument("tensor", "norm"), "is f32, expected f16"),
        ("decode", 0, "table", Argument("tensor", "embed", 1), "has the offset 1"),
        ("decode", 0, "out", Argument("tensor", "norm"), "'tensor', expected a 'buffer'"),
        ("decode", 0, "out", Argument("buffer", "tokens"), "expected one of f32"),
        ("decode", 0, "out", Argument("buffer", "nothing"), "expected one of f32"),
        ("decode", 0, "out", Argument("buffer", "x", -1), "has the offset -1"),
        ("decode", 0, "out", Argument("buffer", "x", 4 * 32 - 31), "31 elements of 'x', expected at least 32"),
        ("prefill_body", 0, "out", Argument("buffer", "x", 1), "127 elements of 'x', expected at least 128"),
        ("decode", 1, "weight", Argument("tensor", "inv_freq"), "2 elements of 'inv_freq', expected at least 32"),
        ("decode", 2, "bias", Argument("tensor", "norm"), "'tensor', expected a 'null'"),
        ("decode", 2, "residual", Argument("buffer", "x"), "'buffer', expected a 'null'"),
        ("decode", 3, "rope", Argument("null"), "'null', expected a 'rope'"),
        ("decode", 3, "rope", Argument("rope", "other"), "elements of 'other'"),
        ("decode", 3, "k_cache", Argument("k_cache", 1), "elements of 1"),
        ("decode", 3, "k_cache", Argument("k_cache", -1), "elements of -1"),
        ("decode", 3, "k_cache", Argument("k_cache", "0"), "elements of '0'"),
        ("decode", 3, "k_cache", Argument("v_cache", 0), "'v_cache', expected a 'k_cache'"),
        ("last_logits", 0, "x", Argument("buffer", "y", 1), "127 elements of 'y', expected at least 128"),
        ("all_log_probs", 1, "targets", Argument("buffer", "tokens"), "expected 'targets'"),
        ("all_log_probs", 1, "argmax", Argument("buffer", "state"), "writes to 'state'"),
        ("decode", 6, "token", Argument("buffer", "tokens"), "writes to 'tokens'"),
        ("decode", 6, "token", Argument("buffer", "argmax", 1), "expected the start of 'argmax'"),
        (
            "decode",
            6,
            "counters",
            Argument("buffer", "argmax"),
            "writes to 'argmax', which only choose and log_probs may",
        ),
        ("decode", 6, "partials", Argument("buffer", "last"), "expected one of i32"),
        ("last_logits", 2, "logits", Argument("buffer", "logits", 4), "expected the start of 'logits'"),
    ],
)
def test_arguments(phase, step, name, argument, match):
    refuse(match, phases=with_arg(phase, step, name, argument))


def test_caches_and_ropes_of_other_sizes():
    refuse("elements of 0", kv_layers=(KVLayer(1, 8),))
    refuse("elements of 0", kv_layers=(KVLayer(2, 16),))
    for kv_dtype in ("f16", "int8"):
        refuse("elements of 0", kernels=with_param("attention_t1", kv_dtype=kv_dtype))
    for kernel in ("attention_t1", "kv_append_t8"):  # its rows end where those of the layer's window do
        refuse("elements of 0", kernels=with_param(kernel, window=4))
    refuse("elements of 0", kv_layers=(KVLayer(1, 16, 4),))
    refuse("at most 512 where layers have windows", kv_layers=(KVLayer(1, 16, 4),), prefill_chunk=513)
    refuse("elements of 'main'", kernels=with_param("kv_append_t1", rotary_dim=8))


def test_position_table_must_cover_the_context():
    def kernels(offset):
        return with_param("embedding_t1", source="positions", position_offset=offset)

    validate(program(kernels=kernels(tiny.VOCAB - tiny.CONTEXT)), infos())
    refuse("position table", kernels=kernels(tiny.VOCAB - tiny.CONTEXT + 1))


def test_tables_must_cover_the_vocabulary():
    refuse("table has 257 rows", kernels=with_param("embedding_t1", vocab=257))
    refuse("257 logits", kernels=with_param("log_probs", vocab=257))
    for vocab in (257, 259):  # one more than the vocabulary would make a token that there is not
        refuse(f"{vocab} logits for 258 tokens", kernels=with_param("choose", vocab=vocab))


def test_stream_sizes():
    sound = tiny.tensors()
    for name in ("q.values", "q.groups", "q.crow_indices", "q.tasks"):
        refuse(re.escape("elements"), tensors=infos(**{name: sound[name][:-1]}))


def contents(**changes) -> None:
    arrays = {**tiny.tensors(), **changes}
    checks = ContentChecks(tiny.program(), infos(**changes))
    assert set(checks.names) == {"q.crow_indices", "q.groups", "q.tasks"}
    for name, array in arrays.items():
        checks.check(name, array, None)


def test_index_contents():
    contents()
    sound = tiny.tensors()

    def changed(name, place, value):
        array = sound[name].copy()
        array[place] = value
        return {name: array}

    for name, place, value in (
        ("q.crow_indices", 0, -1),
        ("q.crow_indices", 0, 1),
        ("q.crow_indices", 5, 99),
        ("q.crow_indices", 5, -(2**31)),
        ("q.crow_indices", -1, 3),
        ("q.crow_indices", -1, 5),
        ("q.tasks", 1, 33),
        ("q.tasks", 0, 1),
        ("q.tasks", -1, 31),
        ("q.groups", 2, 2 << 16),
        ("q.groups", 2, -1),
    ):
        with pytest.raises(FormatError, match=name):
            contents(**changed(name, place, value))
