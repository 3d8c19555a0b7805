"""Read weights from .caffemodel files, in the old and the new format (the FCN authors' and VGG's).

Only the protobuf messages that are needed are defined here, with the field numbers of ``caffe.proto``.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from fcn_jax.errors import InputError, first_line

_SIDES = {"num": 1, "channels": 2, "height": 3, "width": 4}
# Message -> field -> number, type (a message's name, or of FieldDescriptorProto), and whether it is repeated. Numbers
# of a blob are declared as bytes: on the wire these equal a packed list, and need no copy number by number.
_MESSAGES: dict[str, dict[str, tuple[int, str, bool]]] = {
    "BlobShape": {"dim": (1, "TYPE_INT64", True)},
    "BlobProto": {
        **{name: (number, "TYPE_INT32", False) for name, number in _SIDES.items()},
        "data": (5, "TYPE_BYTES", False),
        "double_data": (8, "TYPE_BYTES", False),
        "shape": (7, "BlobShape", False),
    },
    "LayerParameter": {
        "name": (1, "TYPE_STRING", False),
        "type": (2, "TYPE_STRING", False),
        "blobs": (7, "BlobProto", True),
    },
    "V1LayerParameter": {
        "name": (4, "TYPE_STRING", False),
        "type": (5, "TYPE_INT32", False),
        "blobs": (6, "BlobProto", True),
    },
    "NetParameter": {"layers": (2, "V1LayerParameter", True), "layer": (100, "LayerParameter", True)},
}
_LINEAR = ("InnerProduct", 14)  # the layer's type in the new format, and its number in the old one


@functools.cache
def net_parameter() -> Any:
    """Build the protobuf message class NetParameter."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="fcn_jax/caffe.proto", package="fcn_jax.caffe", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            made = message.field.add(name=field, number=number, label=label)
            if kind in _MESSAGES:
                made.type, made.type_name = kinds.TYPE_MESSAGE, f".fcn_jax.caffe.{kind}"
            else:
                made.type = getattr(kinds, kind)
            if kind == "TYPE_INT64":
                made.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("fcn_jax.caffe.NetParameter"))


def read_caffe(path: Path) -> dict[str, np.ndarray]:
    """Return ``LAYER.weight`` and ``LAYER.bias`` of every layer with weights.

    Axes are torch's: convolutions (out, in, k, k), transposed convolutions (in, out, k, k), linear layers (out, in),
    vectors (c,). Scale layers have one weight per channel, or a single one.

    Raises:
        InputError: not a complete Caffe file, or a layer with other blobs than a weight and a bias.
    """
    from google.protobuf.message import DecodeError

    net = net_parameter()()
    try:
        net.ParseFromString(path.read_bytes())
    except (DecodeError, RuntimeError) as error:
        raise InputError(f"{path}: not a whole Caffe file ({first_line(error)}); fetch it again") from error
    arrays: dict[str, np.ndarray] = {}
    for layer in (*net.layers, *net.layer):
        if len(layer.blobs) > 2:
            raise InputError(f"{path}: layer {layer.name!r} has {len(layer.blobs)} blobs, expected a weight and a bias")
        for leaf, blob in zip(("weight", "bias"), layer.blobs, strict=False):
            name = f"{layer.name}.{leaf}"
            if name in arrays:
                raise InputError(f"{path}: two layers are called {layer.name!r}; fetch it again")
            arrays[name] = _array(blob, leaf, layer.type in _LINEAR, f"{path}: {name}")
    if not arrays:
        raise InputError(f"{path}: not a Caffe file with weights; give a .caffemodel, not a .prototxt or solverstate")
    return arrays


def _array(blob: Any, leaf: str, linear: bool, what: str) -> np.ndarray:
    if blob.HasField("shape"):
        shape = tuple(blob.shape.dim)
    else:  # the old format always has four sides, padded with ones in front
        sides = (blob.num, blob.channels, blob.height, blob.width)
        shape = sides[-1:] if leaf == "bias" else sides[-2:] if linear else sides
    data, dtype = (blob.double_data, "<f8") if blob.double_data else (blob.data, "<f4")
    if min(shape, default=1) < 1 or math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise InputError(f"{what} has {len(data)} bytes for shape {'x'.join(map(str, shape))}; fetch it again")
    return np.frombuffer(data, dtype).reshape(shape)
