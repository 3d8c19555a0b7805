"""Reads one array out of a .mat file as MATLAB 5 and later write it, in bounded memory whatever the file says.

Differs from SciPy's loadmat, which a damaged file makes allocate any amount of memory, or crash the process.
Source of the format: MAT-File Format, The MathWorks, chapter 1 (level 5).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np

__all__ = ["MOST_BYTES", "read_field"]

MOST_BYTES = 2**28
"""Of a variable once unpacked; those of SBD have less than a million."""

_HEADER = 128
_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15
_STRUCT = 2
_NUMERIC = range(6, 16)
# The types that numbers are stored in.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def read_field(data: bytes, variable: str, field: str) -> np.ndarray:
    """Return a field of a variable, a structure, as an array of numbers of the file's shape and stored type.

    Raises:
        ValueError: it is not such a file, has no such field, is damaged, or unpacks to more than ``MOST_BYTES``.
    """
    orders = {b"IM": "<", b"MI": ">"}
    if len(data) < _HEADER or data[126:128] not in orders:
        raise ValueError("no header of a level 5 file")
    order = orders[data[126:128]]
    for kind, content in _variables(memoryview(data)[_HEADER:], order):
        if kind == _MATRIX:
            class_, shape, name, rest = _array(content, order)
            if name == variable:
                if class_ != _STRUCT or math.prod(shape) != 1:
                    raise ValueError(f"{variable} is no structure")
                return _numbers(_fields(rest, order, field), order, field)
    raise ValueError(f"no variable {variable}")


def _variables(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Yield the variables of a file, unpacked."""
    for kind, content in _elements(data, order):
        if kind != _COMPRESSED:
            yield kind, content
            continue
        try:
            plain = zlib.decompressobj().decompress(content, MOST_BYTES + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if len(plain) > MOST_BYTES:
            raise ValueError(f"it unpacks to more than {MOST_BYTES} bytes")
        yield from _elements(memoryview(plain), order)


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Yield the type and the content of each element in a row of them."""
    start = 0
    while start < len(data):
        if len(data) - start < 8:
            raise ValueError("cut short")
        kind, size = struct.unpack_from(order + "II", data, start)
        if kind >> 16:  # a small element: its size in the upper half, its content in the tag's second half
            kind, size, first, end = kind & 0xFFFF, kind >> 16, start + 4, start + 8
        else:
            first = start + 8
            end = first + (size if kind == _COMPRESSED else -(-size // 8) * 8)
        if first + size > min(end, len(data)):
            raise ValueError("cut short")
        yield kind, data[first : first + size]
        start = end


def _array(content: memoryview, order: str) -> tuple[int, tuple[int, ...], str, list[tuple[int, memoryview]]]:
    """Return the class, the shape and the name of an array, and the elements that follow them."""
    parts = list(_elements(content, order))
    if [kind for kind, _ in parts[:3]] != [_UINT32, _INT32, _INT8] or len(parts[0][1]) != 8 or len(parts[1][1]) % 4:
        raise ValueError("an array without class, shape and name")
    (_, flags), (_, sizes), (_, name), *rest = parts
    shape = struct.unpack(f"{order}{len(sizes) // 4}i", sizes)
    if min(shape, default=-1) < 0:
        raise ValueError(f"an array of shape {shape}")
    return struct.unpack_from(order + "I", flags)[0] & 0xFF, shape, bytes(name).decode("latin-1"), rest


def _fields(rest: list[tuple[int, memoryview]], order: str, field: str) -> memoryview:
    """Return the array of a field from what follows a structure's name: a length, the names in it, the arrays."""
    if len(rest) < 2 or rest[0][0] != _INT32 or len(rest[0][1]) != 4:
        raise ValueError("a structure without fields")
    (length,) = struct.unpack(order + "i", rest[0][1])
    text = bytes(rest[1][1])
    if length < 1 or len(text) // length > len(rest):
        raise ValueError("a structure whose fields have no names")
    names = [text[at : at + length].partition(b"\0")[0] for at in range(0, len(text), length)]
    found = dict(zip(names, rest[2:], strict=False)).get(field.encode())
    if found is None or found[0] != _MATRIX:
        raise ValueError(f"no field {field}")
    return found[1]


def _numbers(content: memoryview, order: str, field: str) -> np.ndarray:
    class_, shape, _, rest = _array(content, order)
    if class_ not in _NUMERIC or len(rest) != 1 or rest[0][0] not in _NUMBERS:  # a complex one has two parts
        raise ValueError(f"{field} is no array of real numbers")
    return np.frombuffer(rest[0][1], order + _NUMBERS[rest[0][0]]).reshape(shape, order="F")
