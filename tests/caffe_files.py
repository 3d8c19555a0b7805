"""A writer of .caffemodel files, independent of our reader, with names and shapes of the reference's net.py."""

from __future__ import annotations

import numpy as np

V1_TYPES = {"Convolution": 4, "InnerProduct": 14, "Deconvolution": 39}


def _varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def field(number, payload):
    """Encode a field: a varint if the payload is an integer, otherwise bytes."""
    if isinstance(payload, int):
        return _varint(number << 3) + _varint(payload)
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def blob(array, legacy):
    data = np.ascontiguousarray(array, "<f4").tobytes()
    if legacy:
        sides = (1,) * (4 - array.ndim) + array.shape
        return b"".join(field(number, side) for number, side in enumerate(sides, 1)) + field(5, data)
    dims = b"".join(_varint(side) for side in array.shape)
    return field(5, data) + field(7, field(1, dims))


def kind_of(name):
    if name.startswith("upscore"):
        return "Deconvolution"
    return "Scale" if name.startswith("scale") else "Convolution"


def write_caffe(path, arrays, legacy=False, linear=()):
    """Write LAYER.weight and LAYER.bias; ``linear`` layers are InnerProducts, ``legacy`` selects the older format."""
    layers, out = {}, field(1, b"net")
    for name, array in arrays.items():
        layers.setdefault(name.rpartition(".")[0], []).append(np.asarray(array))
    for name, blobs in layers.items():
        kind = "InnerProduct" if name in linear else kind_of(name)
        body = b"".join(field(6 if legacy else 7, blob(each, legacy)) for each in blobs)
        if legacy:
            out += field(2, field(4, name.encode()) + field(5, V1_TYPES[kind]) + body)
        else:
            out += field(100, field(1, name.encode()) + field(2, kind.encode()) + body)
    out += field(100, field(1, b"drop6") + field(2, b"Dropout")) if not legacy else b""  # layers without weights
    path.write_bytes(out)
    return path
