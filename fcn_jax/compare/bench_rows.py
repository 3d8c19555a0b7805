"""The benchmark rows: single operators at the sizes that occur in the networks, and whole networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fcn_jax.compare.bench import NETWORKS, NUM_CLASSES, Numbers, Row, Runner, Settings
from fcn_jax.compare.experiments import random_batch, random_variables
from fcn_jax.compare.jax_adapter import function_runner, train_runner, without_dropout
from fcn_jax.config import OptimConfig
from fcn_jax.models import MODELS, create_model, summarize
from fcn_jax.models.fcn import FCN, DilatedFCN
from fcn_jax.models.kernels import max_pool
from fcn_jax.models.layers import Compute, conv, scaled
from fcn_jax.models.upsample import transposed_conv
from fcn_jax.models.vgg import ENCODERS, STAGE_CHANNELS, VGG

# float32: sums of up to 10^5 products in a different order; bfloat16: both sides round each result to 8 bits.
_OPERATOR_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# "update" is the change of all parameters in one step. In float32, gradients of two computations already differ by
# 2e-4, because rounding changes the sign of a ReLU's input or the maximum of a pooling window. In bfloat16 this happens
# more often: the error is 0.2 in `ladder`, which has five batch norms in a row. A wrong layer gives about 1.
_TOLERANCES: dict[str, dict[str, float]] = {
    "float32": {"pool5": 1e-5, "logits": 1e-4, "statistics": 1e-4, "loss": 1e-4, "update": 5e-3},
    "bfloat16": {"pool5": 5e-2, "logits": 5e-2, "statistics": 5e-2, "loss": 1e-2, "update": 0.5},
}
_NETWORK_VARIANTS = {"cpu": ("contiguous", "channels_last"), "gpu": ("channels_last", "channels_last compiled")}
_OPERATOR_VARIANTS = {"cpu": _NETWORK_VARIANTS["cpu"], "gpu": ("contiguous", *_NETWORK_VARIANTS["gpu"])}
_QUANTITIES = {"encoder": ["pool5"], "inference": ["logits"], "train": ["loss", "update", "statistics"]}
_OPTIM = OptimConfig(lr=0.01, momentum=0.9, weight_decay=5e-4)
# Permutations from our axis order to torch's.
_IMAGE, _KERNEL, _UPSAMPLE_KERNEL, _MATRIX = (0, 3, 1, 2), (3, 2, 0, 1), (2, 3, 0, 1), (0, 1)
Function = Callable[..., tuple[Any, ...]]


def _operator(
    name: str,
    operator: str,
    settings: Settings,
    ours: Function,
    arguments: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    results: Sequence[str],
    flops: int | None,
) -> Row:
    """Make the row of an operator; ``operator`` is its name in ``torch_adapter.operator_runner``.

    Each of the ``arguments`` of ``ours`` is a shape in our axis order and its permutation to torch's. The ``results``
    "dx" and "dw" have the shapes of the first two arguments, any other that of the last.
    """
    shapes, orders = zip(*arguments, strict=True)

    def open_row(torch: Any) -> tuple[Callable[[], Runner], Callable[[str], Runner]]:
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(shape, np.float32).astype(settings.jax_dtype) for shape in shapes]

        def numbers(out: Any) -> Numbers:
            order = {"dx": orders[0], "dw": orders[1]}
            found = dict(zip(results, jax.device_get(out), strict=True))
            return {key: {"": y.transpose(order.get(key, orders[-1])).astype(np.float32)} for key, y in found.items()}

        def theirs(variant: str) -> Runner:
            turned = [x.transpose(order) for x, order in zip(arrays, orders, strict=True)]
            return torch.operator_runner(operator, turned, results, torch.make_way(settings, variant))

        return lambda: function_runner(ours, arrays, numbers), theirs

    matmul = operator == "matmul"
    variants = ("contiguous",) if matmul else _OPERATOR_VARIANTS[settings.kind]
    tolerances = dict.fromkeys(results, _OPERATOR_TOLERANCE[settings.dtype])
    about = {"shapes": [list(shape) for shape in shapes], "dtype": settings.dtype}
    return Row(name, "machine" if matmul else "operators", open_row, tolerances, variants, flops, about=about)


def _with_gradients(forward: Callable[..., Any]) -> Function:
    """Make (*arguments, cotangent) -> (out, the gradient of each argument)."""

    def run(*arguments: Any) -> tuple[Any, ...]:
        *inputs, cotangent = arguments
        out, vjp = jax.vjp(forward, *inputs)
        return out, *vjp(cotangent)

    return run


def matmul_row(settings: Settings) -> Row:
    """Make the row of one large square matrix product, whose FLOP rate is the reference for the other rows."""
    n = settings.matmul_size
    arguments = [((n, n), _MATRIX)] * 2
    return _operator(f"matmul-{n}", "matmul", settings, lambda a, b: (a @ b,), arguments, ["out"], 2 * n**3)


def operator_rows(settings: Settings) -> Iterator[Row]:
    """Yield the rows of transposed convolutions, max poolings, and 3x3 convolutions (forward, dx, dw)."""
    for stride in (32, 16, 8):
        yield _upsample_row(settings, stride)
    channels = [scaled(count, settings.width) for count in STAGE_CHANNELS]
    for stage, count in enumerate(channels):
        yield _pool_row(settings, settings.image_size >> stage, count)
    # The second layer of stage 1, the first of stage 2, and the most expensive of stages 3 and 4.
    for stage, c_in in enumerate((channels[0], channels[0], channels[2], channels[3])):
        for part in ("forward", "dx", "dw"):
            yield _conv_row(settings, settings.image_size >> stage, c_in, channels[stage], part)


def _upsample_row(settings: Settings, stride: int) -> Row:
    b, n, k, c = settings.batch_size, settings.upsampled_size, 2 * stride, NUM_CLASSES
    small = n // stride
    ours = _with_gradients(lambda x, kernel: transposed_conv(x, kernel, stride, stride // 2))
    arguments = [((b, small, small, c), _IMAGE), ((k, k, c, c), _UPSAMPLE_KERNEL), ((b, n, n, c), _IMAGE)]
    flops = 3 * 2 * b * small * small * k * k * c * c
    return _operator(f"upsample-k{k}-s{stride}", "upsample", settings, ours, arguments, ["out", "dx", "dw"], flops)


def _pool_row(settings: Settings, size: int, channels: int) -> Row:
    ours = _with_gradients(lambda x: max_pool(x, "ceil"))
    arguments = [((settings.batch_size, n, n, channels), _IMAGE) for n in (size, size // 2)]
    return _operator(f"pool-{size}x{size}x{channels}", "pool", settings, ours, arguments, ["out", "dx"], None)


def _conv_row(settings: Settings, size: int, c_in: int, c_out: int, part: str) -> Row:
    layer = conv(c_out, 3, Compute(settings.jax_dtype, settings.jax_dtype), padding=1, bias=False)

    def forward(x: Any, kernel: Any) -> Any:
        return layer.apply({"params": {"kernel": kernel}}, x)

    parts: dict[str, Function] = {
        "forward": lambda x, kernel, g: (forward(x, kernel),),
        "dx": lambda x, kernel, g: jax.vjp(lambda x: forward(x, kernel), x)[1](g),
        "dw": lambda x, kernel, g: jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](g),
    }
    b, name = settings.batch_size, f"conv-{size}x{size}-{c_in}-{c_out}-{part}"
    image, kernel, out = (b, size, size, c_in), (3, 3, c_in, c_out), (b, size, size, c_out)
    arguments = [(image, _IMAGE), (kernel, _KERNEL), (out, _IMAGE)]
    return _operator(name, part, settings, parts[part], arguments, [part], 2 * b * size * size * 9 * c_in * c_out)


def make_network(name: str, settings: Settings, **options: Any) -> FCN:
    """Make a network of the catalogue with the benchmark's encoder, width, dtype and classes."""
    options |= {"width": settings.width, "dtype": settings.jax_dtype}
    if MODELS[name].family is not DilatedFCN:  # its name implies the encoder
        options["encoder"] = settings.encoder
    return create_model(name, NUM_CLASSES, **options)


def network_rows(settings: Settings) -> Iterator[Row]:
    """Yield the rows of the encoder's forward pass, and of each network's inference and training step."""
    # The head is as small as possible; torch's twin always has one.
    yield _network("encoder", settings.encoder, make_network("fcn32s", settings, fc_features=1, fc6_kernel=1), settings)
    for name in NETWORKS:
        model = without_dropout(make_network(name, settings))
        yield _network("inference", name, model, settings)
        yield _network("train", name, model, settings)


def _network(kind: str, name: str, model: FCN, settings: Settings) -> Row:
    batch_size, size = settings.batch_size, (settings.image_size, settings.image_size)
    vgg = VGG(ENCODERS[settings.encoder], model.compute, width=settings.width)
    part = "vgg/" if kind == "encoder" else ""
    layers = [r for r in summarize(model, size, batch_size) if r.kind != "BatchNorm" and r.path.startswith(part)]
    # The gradients of kernels and of inputs cost as many products each.
    flops = sum(layer.flops for layer in layers) * (3 if kind == "train" else 1)

    def forward(variables: Any, images: jax.Array) -> Any:
        if kind == "encoder":
            return vgg.apply({"params": variables["params"]["vgg"]}, images.astype(model.dtype), False)[-1]
        return model.apply(variables, images, train=False)

    def open_row(torch: Any) -> tuple[Callable[[], Runner], Callable[[str], Runner]]:
        variables, batch = random_variables(model), random_batch(size, NUM_CLASSES, batch_size)

        def numbers(out: Any) -> Numbers:
            return {_QUANTITIES[kind][0]: {"": np.asarray(out).astype(np.float32)}}

        def ours() -> Runner:
            if kind == "train":
                return train_runner(model, variables, batch, _OPTIM)
            return function_runner(forward, (variables, batch[0]), numbers)

        def theirs(variant: str) -> Runner:
            way = torch.make_way(settings, variant)
            if kind == "train":
                return torch.train_runner(model, variables, batch, _OPTIM, way)
            return torch.forward_runner(model, variables, batch[0], way, kind == "encoder")

        return ours, theirs

    tolerances = {quantity: _TOLERANCES[settings.dtype][quantity] for quantity in _QUANTITIES[kind]}
    if kind == "train" and isinstance(model, DilatedFCN):
        # Fifty batch norms amplify rounding: even torch's two memory formats differ by 0.035.
        tolerances["update"] = 0.1
    about = {"encoder": model.encoder, "width": settings.width, "num_classes": NUM_CLASSES}
    about |= {"images_shape": [batch_size, *size, 3], "dtype": settings.dtype}
    variants = _NETWORK_VARIANTS[settings.kind]
    return Row(f"{kind}-{name}", "networks", open_row, tolerances, variants, flops, batch_size, about)
