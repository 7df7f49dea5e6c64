"""Changes of JSON values, bytes and texts, drawn from a random.Random."""

from __future__ import annotations

import itertools
import json
import marshal
from random import Random

INTEGERS = (0, 1, -1, 2, 3, 7, 16, 63, 64, 255, 256, 4096, 65535, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 31),
            1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64)  # fmt: skip
NUMBERS = (*INTEGERS, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e38, -1e38, 1e308, -1e308)
STRINGS = ("", " ", "a", "\0", "\ud800", "\x1b[31m", "é", "▁", "##", "<unk>", "Sequence", "../x", "%s", "a" * 300,
           "(a+)+b", r"\s*\s*x", "[", "(?=a)", r"\p{L}+", "a{2,}", "🙂" * 20)  # fmt: skip
_MAX_PLACES = 100_000  # a copy that has more is changed no further, nor is it multiplied to more
_MAX_CHARACTERS = 4 << 20
_CONTAINERS = (dict, list)
BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFF)


def _levels(value) -> list[list[tuple]]:
    """(container, key or index) of every value inside a JSON value, by depth."""
    levels, containers = [], [value]
    while containers:
        places, inner = [], []
        for container in containers:
            if type(container) is dict:
                places += zip(itertools.repeat(container), container)
                inner += [child for child in container.values() if type(child) in _CONTAINERS]
            elif type(container) is list:
                places += zip(itertools.repeat(container), range(len(container)))
                inner += [child for child in container if type(child) in _CONTAINERS]
        if places:
            levels.append(places)
        containers = inner
    return levels


def count(value) -> int:
    """How many values are in a JSON value, itself among them."""
    return 1 + sum(map(len, _levels(value)))


def copied(value):
    """A copy of a JSON value in which nothing is shared."""
    return marshal.loads(marshal.dumps(value, 2))  # a version that knows no references, and the fastest way


def _scalar(random: Random, old):
    if type(old) in (int, float) and random.random() < 0.6:
        return random.choice((old + 1, old - 1, old * 2, -old, old + 16, random.choice(NUMBERS)))
    if isinstance(old, str) and random.random() < 0.6:
        place = random.randint(0, len(old))
        return random.choice((old[:place], old[:place] + random.choice(STRINGS) + old[place:], random.choice(STRINGS)))
    return random.choice((random.choice(NUMBERS), random.choice(STRINGS), None, True, False, [], {}, [old], {"a": old}))


def json_value(random: Random, original, changes: int):
    """A copy of a JSON value with so many changes in it."""
    value = copied(original)
    for _ in range(changes):
        levels = _levels(value)
        n_places = sum(map(len, levels))
        if not 0 < n_places < _MAX_PLACES:
            return value
        # Large lists and tables would draw nearly all changes to themselves.
        parent, key = random.choice(random.choice(levels))
        kind = random.randrange(7)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            source, place = random.choice([*itertools.chain.from_iterable(levels)])
            parent[key] = copied(source[place])
        elif kind == 2 and isinstance(parent, list):
            parent.insert(random.randint(0, len(parent)), copied(parent[key]))
        elif kind == 3 and isinstance(parent, list):
            most = 1 + _MAX_PLACES // count(parent[key])
            times = min(random.choice((2, 3, 40, 1000)), most)
            # Copies: a later change inside one that all share would be multiplied too.
            parent[key : key + 1] = [copied(parent[key]) for _ in range(times)]
        elif kind == 4 and isinstance(parent, dict):
            parent[random.choice((*STRINGS, *parent))] = copied(parent[key])
        elif kind == 5:
            for _ in range(random.choice((1, 2, 5, 50))):
                parent[key] = random.choice(([parent[key]], {"type": "Sequence", key: [parent[key]]}))
        else:
            parent[key] = _scalar(random, parent[key])
    return value


def json_text(random: Random, original, changes: int) -> str:
    """The text of such a copy."""
    return json.dumps(json_value(random, original, changes))[:_MAX_CHARACTERS]


def data(random: Random, original: bytes, changes: int) -> bytes:
    """A copy of bytes with so many of them set, or stretches of them removed, doubled or inserted."""
    made = bytearray(original)
    for _ in range(changes):
        place, length = random.randrange(len(made) + 1), random.choice((1, 1, 2, 4, 8, 64, 512))
        kind = random.randrange(8)
        if kind < 4 and place < len(made):
            made[place] = random.choice((*BYTES, random.randrange(256), made[place] ^ 1 << random.randrange(8)))
        elif kind == 4:
            del made[place : place + length]
        elif kind == 5:
            made[place:place] = made[place : place + length]
        elif kind == 6:
            made[place:place] = bytes(random.choice(BYTES) for _ in range(length))
        else:  # a number of 4 or 8 bytes
            size = random.choice((4, 8))
            made[place : place + size] = (random.choice(INTEGERS) % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(made)
