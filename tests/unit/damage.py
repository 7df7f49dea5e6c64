"""Damage to one of a dict's arrays."""


def change(name, how):
    """A function that changes, in a dict of arrays, a copy of the one of that name."""

    def apply(tensors):
        tensors[name] = how(tensors[name].copy())

    return apply


def put(index, value):
    """A function that sets elements of an array."""

    def apply(array):
        array[index] = value
        return array

    return apply
