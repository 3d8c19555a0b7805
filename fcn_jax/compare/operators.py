"""Rows of single operators, at the sizes at which the encoder and the heads use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fcn_jax.compare.rows import Numbers, Pair, Row, Runner, jax_runner
from fcn_jax.compare.settings import NUM_CLASSES, Settings
from fcn_jax.models.layers import Compute, conv, max_pool, scaled
from fcn_jax.models.upsample import transposed_conv
from fcn_jax.models.vgg import STAGE_CHANNELS

__all__ = ["POOL_SUM", "matmul_row", "operator_rows"]

POOL_SUM = "pool-sum"
"""Not a row but the sum of the rows of the five pools."""
# float32: other orders of sums of up to 10^5 products; bfloat16: both sides round each result to 8 bits.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
_CPU, _GPU = ("contiguous", "channels_last"), ("contiguous", "channels_last", "channels_last compiled")
_TO_TORCH = {"image": (0, 3, 1, 2), "kernel": (3, 2, 0, 1), "upsample kernel": (2, 3, 0, 1), "matrix": (0, 1)}
Array = Any
Function = Callable[..., tuple[Array, ...]]


def _draw(settings: Settings, *shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape, np.float32).astype(settings.jax_dtype) for shape in shapes)


def _row(
    name: str,
    settings: Settings,
    ours: Function,
    torch_function: Callable[[Any], Any],
    shapes: tuple[tuple[int, ...], ...],
    kinds: tuple[str, ...],
    results: dict[str, str],
    flops: int | None,
    group: str = "operators",
) -> Row:
    """Make a row.

    Args:
        name: of the row.
        settings: device and dtype.
        ours: (*arguments) -> results.
        torch_function: makes torch's, given the module ``torch_side``.
        shapes: of the arguments, in our axes.
        kinds: of the arguments, keys of ``_TO_TORCH``.
        results: name -> kind.
        flops: of one call.
        group: of the row.
    """

    def numbers(out: Any) -> Numbers:
        arrays = zip(results.items(), out, strict=True)
        return {name: {"": _transposed(np.asarray(y).astype(np.float32), kind)} for (name, kind), y in arrays}

    def open_pair() -> Pair:
        arguments = _draw(settings, *shapes)

        def theirs(variant: str) -> Runner:
            from fcn_jax.compare import bench_torch as torch_side

            turned = tuple(_transposed(x, kind) for x, kind in zip(arguments, kinds, strict=True))
            return torch_side.operator(torch_function(torch_side), turned, tuple(results), settings, variant)

        return Pair(lambda: jax_runner(jax.jit(ours), arguments, numbers), theirs)

    variants = ("contiguous",) if group == "machine" else _CPU if settings.kind == "cpu" else _GPU
    tolerances = dict.fromkeys(results, _TOLERANCE[settings.dtype])
    about = {"shapes": [list(shape) for shape in shapes], "dtype": settings.dtype}
    return Row(name, group, open_pair, tolerances, variants, flops, about=about)


def _transposed(x: np.ndarray, kind: str) -> np.ndarray:
    return x.transpose(_TO_TORCH[kind])


def matmul_row(settings: Settings) -> Row:
    """Make the row of one large square matrix product: the rate that the others are a share of."""
    n = settings.matmul_size
    return _row(
        f"matmul-{n}",
        settings,
        lambda a, b: (a @ b,),
        lambda torch_side: torch_side.matmul,
        ((n, n), (n, n)),
        ("matrix", "matrix"),
        {"out": "matrix"},
        2 * n**3,
        group="machine",
    )


def operator_rows(settings: Settings) -> Iterator[Row]:
    """Yield the rows: transposed convolutions, poolings, and the three parts of 3x3 convolutions."""
    for stride in (32, 16, 8):
        yield _upsample_row(settings, stride)
    channels = [scaled(count, settings.width) for count in STAGE_CHANNELS]
    for stage, count in enumerate(channels):
        yield _pool_row(settings, settings.image_size >> stage, count)
    # The first stage's second layer, the second's first, and the heaviest of the third and fourth.
    for stage, c_in in enumerate((channels[0], channels[0], channels[2], channels[3])):
        for part in ("forward", "dx", "dw"):
            yield _conv_row(settings, settings.image_size >> stage, c_in, channels[stage], part)


def _upsample_row(settings: Settings, stride: int) -> Row:
    b, n, k = settings.batch_size, settings.upsampled_size, 2 * stride
    small = n // stride

    def ours(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, ...]:
        out, vjp = jax.vjp(lambda x, kernel: transposed_conv(x, kernel, stride, stride // 2), x, kernel)
        return out, *vjp(cotangent)

    forward = 2 * b * small * small * k * k * NUM_CLASSES * NUM_CLASSES
    return _row(
        f"upsample-k{k}-s{stride}",
        settings,
        ours,
        lambda torch_side: torch_side.upsample(stride),
        ((b, small, small, NUM_CLASSES), (k, k, NUM_CLASSES, NUM_CLASSES), (b, n, n, NUM_CLASSES)),
        ("image", "upsample kernel", "image"),
        {"out": "image", "dx": "image", "dw": "upsample kernel"},
        3 * forward,
    )


def _pool_row(settings: Settings, size: int, channels: int) -> Row:
    def ours(x: Array, cotangent: Array) -> tuple[Array, ...]:
        out, vjp = jax.vjp(lambda x: max_pool(x, "ceil"), x)
        return out, *vjp(cotangent)

    b = settings.batch_size
    return _row(
        f"pool-{size}x{size}x{channels}",
        settings,
        ours,
        lambda torch_side: torch_side.pool,
        ((b, size, size, channels), (b, size // 2, size // 2, channels)),
        ("image", "image"),
        {"out": "image", "dx": "image"},
        None,
    )


def _conv_row(settings: Settings, size: int, c_in: int, c_out: int, part: str) -> Row:
    compute = Compute(settings.jax_dtype, settings.jax_dtype)
    layer = conv(c_out, 3, compute, padding=1, bias=False)

    def forward(x: Array, kernel: Array) -> Array:
        return layer.apply({"params": {"kernel": kernel}}, x)

    parts: dict[str, Function] = {
        "forward": lambda x, kernel, g: (forward(x, kernel),),
        "dx": lambda x, kernel, g: jax.vjp(lambda x: forward(x, kernel), x)[1](g),
        "dw": lambda x, kernel, g: jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](g),
    }
    b = settings.batch_size
    return _row(
        f"conv-{size}x{size}-{c_in}-{c_out}-{part}",
        settings,
        parts[part],
        lambda torch_side: torch_side.conv_part(part),
        ((b, size, size, c_in), (3, 3, c_in, c_out), (b, size, size, c_out)),
        ("image", "kernel", "image"),
        {part: "kernel" if part == "dw" else "image"},
        2 * b * size * size * 9 * c_in * c_out,
    )
