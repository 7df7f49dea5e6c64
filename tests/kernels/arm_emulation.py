"""Runs kernels of aarch64 shared objects on any machine, by Unicorn: QEMU's processor as a Python package.

The object is the one that a file would carry. It is loaded as ld.so would, with the few functions of libc that
kernels call answered from here, and a kernel sees nothing but its arguments: what lies beside them is not mapped.
"""

import ctypes
import math
import struct

import numpy as np
import pytest

unicorn = pytest.importorskip("unicorn", reason="needs the emulator: pip install unicorn")
from unicorn import arm64_const as arm  # noqa: E402

_BASE, _LIBC, _POINTERS, _ARRAYS = 0x40_0000, 0x10_0000, 0x20_0000, 0x1_0000_0000
_STACK, _STACK_BYTES = 0x1000_0000, 16 << 20  # as large as the runtime makes it
_PAGE = 1 << 16
_RETURN = struct.pack("<I", 0xD65F03C0)
_LOAD, _DYNAMIC = 1, 2  # kinds of segments
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_PLTRELSZ, _DT_JMPREL = 4, 5, 6, 2, 23
_JUMP_SLOT = 1026
_ARGUMENTS = (arm.UC_ARM64_REG_X0, arm.UC_ARM64_REG_X1, arm.UC_ARM64_REG_X2)


class ArmLibrary:
    """A loaded shared object. data: as `compile_cpu` makes it for one of the aarch64 targets.

    dot_products: whether the processor has them (ARMv8.2; a Cortex-A72 otherwise, where they are no instructions).
    """

    def __init__(self, data: bytes, dot_products: bool = False):
        self._machine = machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX if dot_products else arm.UC_CPU_ARM64_A72)
        machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vectors may be used
        machine.mem_map(_LIBC, _PAGE)
        machine.mem_map(_STACK, _STACK_BYTES)
        self._libc: dict[int, str] = {}
        self._kernels = self._load(data)
        machine.hook_add(unicorn.UC_HOOK_CODE, self._call_libc, begin=_LIBC, end=_LIBC + _PAGE - 1)

    def count_instructions(self) -> None:
        """From now on `instructions` counts those that kernels execute."""
        self.instructions = 0

        def count(machine, address: int, size: int, _) -> None:
            self.instructions += size // 4

        self._machine.hook_add(unicorn.UC_HOOK_BLOCK, count, begin=_BASE, end=_BASE + (1 << 30))

    def run(self, name: str, arguments: list, n_shares: int) -> None:
        """Runs each share of a kernel in turn, on arrays, or views of them, and None."""
        machine, places, address = self._machine, [], _ARRAYS
        owners = [_owner(argument) for argument in arguments if argument is not None]
        for root in {id(owner): owner for owner in owners}.values():
            # The end lies at the end of what is mapped, as near as the alignment of 64 bytes allows.
            size = -(-max(root.nbytes, 1) // _PAGE) * _PAGE
            start = address + (size - root.nbytes) // 64 * 64
            machine.mem_map(address, size)
            machine.mem_write(start, root.tobytes())
            places.append((root, start, address, size))
            address += size + _PAGE
        machine.mem_map(_POINTERS, _PAGE)
        pointers = [0 if argument is None else _moved(argument, places) for argument in arguments]
        machine.mem_write(_POINTERS, struct.pack(f"<{len(pointers)}Q", *pointers))
        end = _LIBC + _PAGE - 4
        try:
            for share in reversed(range(n_shares)):
                for register, value in zip(_ARGUMENTS, (_POINTERS, share, n_shares), strict=True):
                    machine.reg_write(register, value)
                machine.reg_write(arm.UC_ARM64_REG_SP, _STACK + _STACK_BYTES)
                machine.reg_write(arm.UC_ARM64_REG_LR, end)
                machine.emu_start(_BASE + self._kernels[name], end)
            for root, start, _, _ in places:
                ctypes.memmove(root.ctypes.data, bytes(machine.mem_read(start, root.nbytes)), root.nbytes)
        finally:
            for _, _, address, size in places:
                machine.mem_unmap(address, size)
            machine.mem_unmap(_POINTERS, _PAGE)

    def _load(self, data: bytes) -> dict[str, int]:
        """Maps the segments and binds what they import; returns the offset of each exported symbol."""
        machine = self._machine
        table, entry_bytes, entries = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
        segments = [struct.unpack_from("<II6Q", data, table + entry_bytes * i) for i in range(entries)]
        loaded = [segment for segment in segments if segment[0] == _LOAD]
        top = max(virtual + memory_bytes for _, _, _, virtual, _, _, memory_bytes, _ in loaded)
        machine.mem_map(_BASE, -(-top // _PAGE) * _PAGE)
        for _, _, offset, virtual, _, file_bytes, _, _ in loaded:
            machine.mem_write(_BASE + virtual, data[offset : offset + file_bytes])

        def read(layout: str, address: int) -> tuple:
            return struct.unpack(layout, machine.mem_read(_BASE + address, struct.calcsize(layout)))

        (dynamic,) = (virtual for kind, _, _, virtual, *_ in segments if kind == _DYNAMIC)
        tags: dict[int, int] = {}
        while (tag := read("<QQ", dynamic))[0]:
            tags[tag[0]] = tag[1]
            dynamic += 16

        def symbol(index: int) -> tuple[str, int, int]:
            name, _, _, section, value, _ = read("<IBBHQQ", tags[_DT_SYMTAB] + 24 * index)
            return bytes(read("256s", tags[_DT_STRTAB] + name)[0]).split(b"\0")[0].decode(), section, value

        for start in range(0, tags.get(_DT_PLTRELSZ, 0), 24):
            place, info, _ = read("<QQq", tags[_DT_JMPREL] + start)
            assert info & 0xFFFFFFFF == _JUMP_SLOT, "a relocation of another kind"
            address = _LIBC + 4 * len(self._libc)
            self._libc[address] = symbol(info >> 32)[0]
            machine.mem_write(address, _RETURN)
            machine.mem_write(_BASE + place, struct.pack("<Q", address))
        _, n_symbols = read("<II", tags[_DT_HASH])
        symbols = map(symbol, range(n_symbols))
        return {name: value for name, section, value in symbols if section}

    def _call_libc(self, machine, address: int, size: int, _) -> None:
        name = self._libc[address]
        first, second, third = map(machine.reg_read, _ARGUMENTS)
        if name in ("memcpy", "memmove"):
            machine.mem_write(first, bytes(machine.mem_read(second, third)))
        elif name == "memset":
            machine.mem_write(first, bytes([second & 0xFF]) * third)
        elif name == "log":
            (x,) = struct.unpack("<d", struct.pack("<Q", machine.reg_read(arm.UC_ARM64_REG_D0)))
            (bits,) = struct.unpack("<Q", struct.pack("<d", math.log(x)))
            machine.reg_write(arm.UC_ARM64_REG_D0, bits)
        else:
            raise NotImplementedError(f"a kernel calls {name}")


def _owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _moved(argument: np.ndarray, places: list) -> int:
    """Where the argument lies in the emulated memory."""
    for root, start, _, _ in places:
        offset = argument.ctypes.data - root.ctypes.data
        if 0 <= offset < root.nbytes or (offset == 0 and not argument.nbytes):
            return start + offset
    raise ValueError("an argument is in none of the arrays")
