"""Activations that are alive at the same time never share memory."""

from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.plan_memory import plan_memory
from gqsac.compiler.passes.specialize import RESERVED, Launch, Launches, ValueRef

SPEC = KernelSpec.make("elementwise")


def launch(writes: str, *reads: str) -> Launch:
    args = (*(ValueRef(name) for name in reads), ValueRef(writes), ValueRef("state"))
    return Launch(SPEC, args, writes)


def plan(body, widths):
    phases = {"prefill_body": tuple(body), "decode": (), "last_logits": (launch("last", "d"),), "all_log_probs": ()}
    return plan_memory(Launches(phases, {**widths, "last": 8, "logits": 100}), prefill_chunk=4)


def overlap(a, b) -> bool:
    def end(buffer):
        return buffer.offset + buffer.elements * 4

    return a.offset < end(b) and b.offset < end(a)


def test_live_values_are_apart_and_dead_ones_are_reused():
    body = [launch("a", "tokens"), launch("b", "a"), launch("c", "b"), launch("d", "b", "c")]
    memory = plan(body, {"a": 1000, "b": 1000, "c": 1000, "d": 8})
    buffers = {buffer.name: buffer for buffer in memory.buffers}
    for first, second in [("a", "b"), ("b", "c"), ("c", "d"), ("b", "d")]:
        assert not overlap(buffers[first], buffers[second])
    assert overlap(buffers["a"], buffers["c"])
    assert memory.arena_bytes < 3 * 1000 * 4 * 4


def test_reserved_buffers_overlap_nothing_and_the_arena_holds_all():
    body = [launch("a", "tokens"), launch("d", "a")]
    memory = plan(body, {"a": 64, "d": 8})
    buffers = {buffer.name: buffer for buffer in memory.buffers}
    assert set(RESERVED) <= set(buffers)
    for name in RESERVED:
        assert not any(overlap(buffers[name], other) for other in memory.buffers if other.name != name)
    assert all(buffer.offset % 64 == 0 for buffer in memory.buffers)
    assert memory.arena_bytes >= max(buffer.offset + buffer.elements * 4 for buffer in memory.buffers)
