"""Turns: calls go in the order in which they came, one at a time, and nobody waits for ever."""

import threading
import time

import numpy as np
import pytest
from gqsa_runtime import turns as turns_module
from gqsa_runtime.errors import BusyError, ClosedError
from gqsa_runtime.turns import Turns

from tests.unit import fake_device


def started(function, *args) -> threading.Thread:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    return thread


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for ten seconds"
        time.sleep(0.001)


def test_first_come_first_served():
    turns, order = Turns(), []

    def call(number):
        with turns.turn():
            order.append(number)

    held = turns.take()
    threads = []
    for number in range(8):
        threads.append(started(call, number))
        until(lambda: len(turns._queue) == number + 2)
    turns.release(held)
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_who_may_not_wait_is_refused():
    turns = Turns()
    held = turns.take()
    with pytest.raises(BusyError, match="in use by another call"):
        turns.take(wait=False)
    turns.release(held)
    with turns.turn(wait=False):
        pass


def test_a_paused_turn_is_kept_for_a_while_and_then_lost(monkeypatch):
    monkeypatch.setattr(turns_module, "PATIENCE_S", 0.2)
    turns, order = Turns(), []
    held = turns.take()
    started(turns.pause, held).join()  # by another thread: a caller is never kept from its own turn
    began_s = time.monotonic()

    def call():
        with turns.turn():
            order.append(("other", time.monotonic() - began_s))

    thread = started(call)
    thread.join()
    turns.resume(held)
    order.append(("held", time.monotonic() - began_s))
    assert [name for name, _ in order] == ["other", "held"] and order[0][1] >= 0.19
    with pytest.raises(BusyError):
        turns.take(wait=False)
    turns.release(held)


def test_a_resumed_turn_is_not_lost(monkeypatch):
    monkeypatch.setattr(turns_module, "PATIENCE_S", 0.05)
    turns, done = Turns(), []
    held = turns.take()
    started(turns.pause, held).join()
    turns.resume(held)

    def call():
        with turns.turn():
            done.append(True)

    thread = started(call)
    time.sleep(0.15)
    assert not done
    turns.release(held)
    thread.join()
    assert done


def test_a_thread_does_not_wait_for_itself():
    turns = Turns()
    held = turns.take()
    turns.pause(held)
    with turns.turn(wait=False):
        pass
    turns.resume(held)
    turns.release(held)


def test_close_ends_who_waits():
    turns, ended = Turns(), []
    held = turns.take()

    def call():
        with pytest.raises(ClosedError):
            turns.take()
        ended.append(True)

    thread = started(call)
    until(lambda: len(turns._queue) == 2)
    turns.close()
    thread.join()
    with pytest.raises(ClosedError):
        turns.resume(held)
    assert ended and turns._queue == [held]


class OneAtATime(fake_device.FakeDevice):
    """Fails where two threads are inside it, or where it is used after it was closed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.inside = threading.Lock()

    def _only(self, function, *args):
        assert not self.closed and self.inside.acquire(blocking=False)
        try:
            time.sleep(0.0002)
            return function(*args)
        finally:
            self.inside.release()

    def upload(self, *args):
        return self._only(super().upload, *args)

    def launch(self, *args):
        return self._only(super().launch, *args)

    def download(self, *args):
        return self._only(super().download, *args)

    def close(self):
        self._only(super().close)


@pytest.fixture
def model():
    made = fake_device.model()
    made.engine.device = made.device = OneAtATime(made.program, made.context)
    return made


def test_any_number_of_threads(model):
    texts = ["one", "two", "three", "four"]
    alone = {text: ("".join(model.generate(text, 12, temperature=1.0, seed=1)), model.score(text)) for text in texts}
    wrong = []

    def call(text):
        for _ in range(5):
            generated = "".join(model.generate(text, 12, temperature=1.0, seed=1))
            scored = model.score(text)
            if generated != alone[text][0] or not np.array_equal(scored.log_probs, alone[text][1].log_probs):
                wrong.append(text)

    threads = [started(call, text) for text in texts]
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_busy_model_refuses_who_does_not_wait(model):
    generation = model.generate("a", 30, temperature=1.0, seed=1)
    started(next, generation).join()
    for call in (lambda: model.score("ab", wait=False), lambda: next(model.generate("a", wait=False))):
        with pytest.raises(BusyError):
            call()
    generation.close()
    model.score("ab", wait=False)


def test_close_waits_for_those_before_it(model):
    texts = []

    def call():
        texts.append("".join(model.generate("a", 20, temperature=1.0, seed=1)))

    expected = "".join(model.generate("a", 20, temperature=1.0, seed=1))
    thread = started(call)
    until(lambda: model._turns._queue)
    model.close(wait=True)
    thread.join()
    assert texts == [expected] and model.device.closed
