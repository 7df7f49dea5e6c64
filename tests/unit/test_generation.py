"""Generations that end early: cancelled from another thread, by an asyncio task, or left by their consumer."""

import asyncio
import contextlib
import threading
import time

import pytest
from gqsa_runtime import turns as turns_module
from gqsa_runtime.errors import BusyError, InputError

from tests.format import tiny
from tests.unit import fake_device
from tests.unit.test_turns import started, until


class Gate:
    """Lets a device begin so many launches and holds the next one. held: set while one waits."""

    def __init__(self, device, permits=0):
        self.permits, self.held = threading.Semaphore(permits), threading.Event()
        self._launch, device.launch = device.launch, self.launch

    def launch(self, *phases):
        """Stands in for the device's own."""
        if not self.permits.acquire(blocking=False):
            self.held.set()
            assert self.permits.acquire(timeout=10)
        self._launch(*phases)

    def open(self):
        """Holds no launch any more."""
        self.permits.release(1000)


def test_another_thread_cancels_what_runs():
    model = fake_device.model("ab", "c" * 20)
    gate, pieces = Gate(model.device, permits=3), []  # one for the prompt, then one for each token
    generation = model.generate("ab", max_new_tokens=20)
    thread = started(lambda: pieces.extend(generation))
    assert gate.held.wait(10)  # in the midst of a step
    generation.cancel()
    gate.open()
    thread.join(10)
    assert not thread.is_alive()
    assert "".join(pieces) == "ccc"
    assert generation.stats is model.stats and model.stats.finish_reason == "cancelled"
    assert "".join(model.generate("ab", max_new_tokens=5)) == "ccccc"  # the model goes on
    generation.cancel()  # once more: nothing happens
    assert model.stats.finish_reason == "length"


def test_a_long_prompt_ends_after_its_chunk():
    model = fake_device.model("ab", "c" * 20)
    chunk = model.device.plan.prefill_chunk
    assert 3 * chunk <= tiny.CONTEXT
    gate = Gate(model.device)
    generation, pieces = model.generate([1] * (3 * chunk)), []
    thread = started(lambda: pieces.extend(generation))
    assert gate.held.wait(10)
    generation.cancel()
    gate.open()
    thread.join(10)
    assert not pieces and generation.stats.finish_reason == "cancelled"
    assert model.engine.position == chunk
    assert "".join(model.generate("ab", max_new_tokens=5)) == "ccccc"


def test_cancelled_before_it_begins_and_while_it_waits():
    model = fake_device.model("ab", "c" * 20)
    early = model.generate("ab")
    early.cancel()
    assert list(early) == [] and early.stats.finish_reason == "cancelled"
    gate = Gate(model.device)
    running, waiting, pieces = model.generate("ab", max_new_tokens=3), model.generate("ab"), []
    first = started(lambda: pieces.extend(running))
    assert gate.held.wait(10)
    second = started(lambda: pieces.extend(waiting))
    until(lambda: len(model._turns._queue) == 2)
    waiting.cancel()
    second.join(10)
    assert not second.is_alive() and not pieces and waiting.stats.finish_reason == "cancelled"
    gate.open()
    first.join(10)
    assert "".join(pieces) == "ccc"


def test_a_paused_one_keeps_nobody_waiting():
    model = fake_device.model("ab", "c" * 20)
    generation = model.generate("ab")
    assert next(generation) == "c"
    refused = []

    def try_now():
        try:
            list(model.generate("ab", max_new_tokens=1, wait=False))
        except BusyError as error:
            refused.append(error)

    started(try_now).join()
    assert len(refused) == 1
    generation.cancel()
    started(try_now).join()
    assert len(refused) == 1
    assert list(generation) == [] and generation.stats.finish_reason == "cancelled"


def test_async_pieces_are_those_of_generate():
    model = fake_device.model("ab", "c" * 20, chat_template="{{ messages[0].content }}")
    expected = list(model.generate("ab", max_new_tokens=8))

    async def collect(generation):
        return [piece async for piece in generation], generation.stats.finish_reason

    assert asyncio.run(collect(model.generate_async("ab", max_new_tokens=8))) == (expected, "length")
    messages = [{"role": "user", "content": "ab"}]
    assert asyncio.run(collect(model.chat_async(messages, max_new_tokens=8))) == (expected, "length")

    async def both():  # each whole, one after the other
        return await asyncio.gather(*(collect(model.generate_async("ab", max_new_tokens=8)) for _ in range(3)))

    assert asyncio.run(both()) == [(expected, "length")] * 3
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        asyncio.run(collect(model.generate_async("ab", max_new_tokens=0)))
    until(lambda: not any(thread.name.startswith("gqsa-generation") for thread in threading.enumerate()))


def test_the_event_loop_never_waits_for_a_step():
    model = fake_device.model("ab", "c" * 20)
    gate, turns_of_the_loop = Gate(model.device), 0

    async def consume():
        return [piece async for piece in model.generate_async("ab", max_new_tokens=3)]

    async def main():
        nonlocal turns_of_the_loop
        task = asyncio.create_task(consume())
        while not gate.held.is_set() or turns_of_the_loop < 100:
            await asyncio.sleep(0)
            turns_of_the_loop += 1
        assert not task.done()  # held in its first step, while the loop went round
        gate.open()
        return await task

    assert "".join(asyncio.run(main())) == "ccc"


def test_a_cancelled_task_cancels_its_generation(monkeypatch):
    monkeypatch.setattr(turns_module, "PATIENCE_S", 60)  # a turn that is not given back is seen
    model = fake_device.model("ab", "c" * 20)
    gate, generation = Gate(model.device), model.generate_async("ab")

    async def consume():
        return [piece async for piece in generation]

    async def main():
        task = asyncio.create_task(consume())
        await asyncio.to_thread(gate.held.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task  # before the step has ended
        gate.open()
        return [piece async for piece in model.generate_async("ab", max_new_tokens=3)]

    assert "".join(asyncio.run(main())) == "ccc"
    assert generation.stats.finish_reason == "cancelled"


@pytest.mark.parametrize("explicit", [False, True])
def test_an_async_consumer_may_leave(monkeypatch, explicit):
    monkeypatch.setattr(turns_module, "PATIENCE_S", 60)
    model = fake_device.model("ab", "c" * 20)

    async def main():
        if explicit:
            generation = model.generate_async("ab")
            async with contextlib.aclosing(generation) as pieces:
                assert await anext(pieces) == "c"
            assert [piece async for piece in generation] == []
        else:
            async for piece in model.generate_async("ab"):
                assert piece == "c"
                break
        return [piece async for piece in model.generate_async("ab", max_new_tokens=3)]

    began_s = time.monotonic()
    assert "".join(asyncio.run(main())) == "ccc"
    assert time.monotonic() - began_s < 30  # half of the patience that would have been waited
    until(lambda: not any(thread.name.startswith("gqsa-generation") for thread in threading.enumerate()))
