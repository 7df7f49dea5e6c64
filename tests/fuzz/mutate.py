"""Changes of JSON values, bytes and texts, drawn from a random.Random."""

from __future__ import annotations

import copy
import json
from random import Random

INTEGERS = (0, 1, -1, 2, 3, 7, 16, 63, 64, 255, 256, 4096, 65535, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 31),
            1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64)  # fmt: skip
NUMBERS = (*INTEGERS, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e38, -1e38, 1e308, -1e308)
STRINGS = ("", " ", "a", "\0", "\ud800", "\x1b[31m", "é", "▁", "##", "<unk>", "Sequence", "../x", "%s", "a" * 300,
           "(a+)+b", r"\s*\s*x", "[", "(?=a)", r"\p{L}+", "a{2,}", "🙂" * 20)  # fmt: skip
_MAX_PLACES = 100_000  # a copy that has more is changed no further, nor is it multiplied to more
_MAX_CHARACTERS = 4 << 20
BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFF)


def _places(value, path=()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    found, rest = [], [(value, path)]
    while rest:
        item, where = rest.pop()
        found.append(where)
        if isinstance(item, dict):
            rest.extend((child, (*where, key)) for key, child in item.items())
        elif isinstance(item, list):
            rest.extend((child, (*where, index)) for index, child in enumerate(item))
    return found


def _get(value, path):
    for key in path:
        value = value[key]
    return value


def _scalar(random: Random, old):
    if type(old) in (int, float) and random.random() < 0.6:
        return random.choice((old + 1, old - 1, old * 2, -old, old + 16, random.choice(NUMBERS)))
    if isinstance(old, str) and random.random() < 0.6:
        place = random.randint(0, len(old))
        return random.choice((old[:place], old[:place] + random.choice(STRINGS) + old[place:], random.choice(STRINGS)))
    return random.choice((random.choice(NUMBERS), random.choice(STRINGS), None, True, False, [], {}, [old], {"a": old}))


def json_value(random: Random, original, changes: int):
    """A copy of a JSON value with so many changes in it."""
    value = copy.deepcopy(original)
    for _ in range(changes):
        places = _places(value)[1:]
        if not 0 < len(places) <= _MAX_PLACES:
            return value
        # Large lists and tables would draw nearly all changes to themselves.
        depth = random.choice(sorted({len(place) for place in places}))
        path = random.choice([place for place in places if len(place) == depth])
        parent, key = _get(value, path[:-1]), path[-1]
        kind = random.randrange(7)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            parent[key] = copy.deepcopy(_get(value, random.choice(places)))
        elif kind == 2 and isinstance(parent, list):
            parent.insert(random.randint(0, len(parent)), copy.deepcopy(parent[key]))
        elif kind == 3 and isinstance(parent, list):
            most = 1 + _MAX_PLACES // len(_places(parent[key]))
            times = min(random.choice((2, 3, 40, 1000)), most)
            # Copies: a later change inside one that all share would be multiplied too.
            parent[key : key + 1] = [copy.deepcopy(parent[key]) for _ in range(times)]
        elif kind == 4 and isinstance(parent, dict):
            parent[random.choice((*STRINGS, *parent))] = copy.deepcopy(parent[key])
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
