"""The layer table of a network: output shapes, parameters and FLOPs, without computing anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fcn_jax.models.fcn import FCN
from fcn_jax.models.layers import BatchNorm
from fcn_jax.models.upsample import TransposedConv


@dataclass(frozen=True)
class LayerRow:
    """One layer: its path in the parameter tree, its kind, the output's shape, its parameters and its FLOPs."""

    path: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    flops: int


def summarize(model: FCN, image_size: tuple[int, int], batch: int = 1) -> list[LayerRow]:
    """List the layers with parameters in the order in which they run, for images of ``image_size`` (height, width).

    A multiplication and an addition count as two FLOPs. A transposed convolution counts the products of its definition
    (every input pixel times the whole kernel, once); pooling, ReLU and interpolation are left out.

    Raises:
        InputError: the model does not support this size.
    """
    rows: list[LayerRow] = []

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_call(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and isinstance(module, nn.Conv | TransposedConv | BatchNorm):
            shapes = {name: value.shape for name, value in module.variables.get("params", {}).items()}
            count = sum(math.prod(shape) for shape in shapes.values())
            flops = _flops(module, args[0].shape, out.shape, shapes)
            kind = "Conv" if isinstance(module, nn.Conv) else type(module).__name__
            rows.append(LayerRow("/".join(module.path), kind, out.shape, count, flops))
        return out

    def forward(key: jax.Array, images: jax.Array) -> Any:
        with nn.intercept_methods(record):
            return model.init(key, images)

    jax.eval_shape(forward, jax.random.key(0), jax.ShapeDtypeStruct((batch, *image_size, 3), jnp.float32))
    return rows


def _flops(module: nn.Module, inputs: tuple[int, ...], outputs: tuple[int, ...], shapes: dict[str, Any]) -> int:
    if isinstance(module, BatchNorm):
        return 2 * math.prod(outputs)
    pixels = inputs if isinstance(module, TransposedConv) else outputs
    bias = math.prod(outputs) if "bias" in shapes else 0
    return 2 * math.prod(pixels[:3]) * math.prod(shapes["kernel"]) + bias
