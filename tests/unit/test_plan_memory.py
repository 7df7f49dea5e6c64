"""Storages that are alive at the same time never share memory, and those that never meet do."""

import dataclasses

from gqsa_runtime.program import DTYPE_BYTES

from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.plan_memory import plan_memory
from gqsac.compiler.passes.specialize import RESERVED, Call, Calls, Storage, ValueRef

SPEC = KernelSpec.make("elementwise")


def call(*names: str) -> Call:
    return Call(SPEC, (*(ValueRef(name) for name in names), ValueRef("state")))


def calls(body, widths, decode=(), few=()) -> Calls:
    """Calls whose hidden state is "d"; widths of f32 storages."""
    phases = {
        "decode": tuple(decode),
        "prefill_body": tuple(body),
        "few_body": tuple(few),
        "last_logits": (call("d", "last"),),
        "all_log_probs": (),
    }
    reserved = {name: Storage("i32", per_token=2, fixed=3) for name in RESERVED}
    return Calls(phases, {**reserved, **{name: Storage("f32", per_token=width) for name, width in widths.items()}})


def place(made: Calls):
    memory = plan_memory(made, prefill_chunk=4, score_chunk=4)
    return memory, {buffer.name: buffer for buffer in memory.buffers}


def end(buffer) -> int:
    return buffer.offset + buffer.elements * DTYPE_BYTES[buffer.dtype]


def overlap(a, b) -> bool:
    return a.offset < end(b) and b.offset < end(a)


def test_live_values_are_apart_and_dead_ones_are_reused():
    body = [call("tokens", "a"), call("a", "b"), call("b", "c"), call("b", "c", "d")]
    memory, buffers = place(calls(body, {"a": 1000, "b": 1000, "c": 1000, "d": 8}))
    for first, second in [("a", "b"), ("b", "c"), ("c", "d"), ("b", "d")]:
        assert not overlap(buffers[first], buffers[second])
    assert overlap(buffers["a"], buffers["c"])
    assert memory.arena_bytes < 3 * 1000 * 4 * 4


def test_reserved_buffers_overlap_nothing_and_the_arena_holds_all():
    memory, buffers = place(calls([call("tokens", "a"), call("a", "d")], {"a": 64, "d": 8}))
    assert set(RESERVED) <= set(buffers)
    for name in RESERVED:
        assert not any(overlap(buffers[name], other) for other in memory.buffers if other.name != name)
    assert all(buffer.offset % 64 == 0 for buffer in memory.buffers)
    assert memory.arena_bytes >= max(map(end, memory.buffers))


def test_what_decode_alone_uses_holds_one_token_and_lies_where_a_prefill_lies():
    widths = {"a": 1000, "d": 100}
    body = [call("tokens", "a"), call("a", "d")]
    decode = [call("tokens", "one.a"), call("one.a", "one.d"), call("one.d", "logits")]
    alone, _ = place(calls(body, widths))
    both, buffers = place(calls(body, {**widths, "one.a": 1000, "one.d": 100}, decode))
    assert both.arena_bytes == alone.arena_bytes
    assert [buffers[name].elements for name in ("a", "one.a", "one.d")] == [4000, 1000, 100]
    assert not overlap(buffers["one.a"], buffers["one.d"])
    assert overlap(buffers["one.a"], buffers["a"])


def test_storages_have_types():
    made = calls([call("tokens", "a"), call("a", "d")], {"a": 64, "d": 8})
    storages = {**made.storages, "a": Storage("i8", per_token=100, fixed=28)}
    _, buffers = place(dataclasses.replace(made, storages=storages))
    assert (buffers["a"].dtype, buffers["a"].elements) == ("i8", 428)
    assert (buffers["state"].dtype, buffers["state"].elements) == ("i32", 11)


def test_a_few_tokens_have_room_for_a_few():
    body, few = [call("a", "b"), call("b", "d")], [call("few.a", "few.b"), call("few.b", "d")]
    made = calls(body, dict.fromkeys(("a", "b", "d", "few.a", "few.b"), 16), few=few)
    buffers = {buffer.name: buffer for buffer in plan_memory(made, prefill_chunk=32, score_chunk=4).buffers}
    assert buffers["few.a"].elements == buffers["few.b"].elements == 8 * 16
    assert buffers["a"].elements == buffers["d"].elements == 32 * 16
    assert overlap(buffers["b"], buffers["few.a"]) and not overlap(buffers["d"], buffers["few.b"])
