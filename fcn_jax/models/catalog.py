"""The catalogue: build a network by name, and initialise its variables."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp

from fcn_jax.config import ModelConfig
from fcn_jax.errors import InputError, unknown
from fcn_jax.models.fcn import FCN, DilatedFCN, LadderFCN, Pad100FCN, ResizeFCN, SameFCN
from fcn_jax.models.layers import scaled
from fcn_jax.models.resnet import RESNETS
from fcn_jax.models.vgg import ENCODERS, STAGE_CHANNELS, VGGClassifier

_SCORE_OPTIONS = frozenset(
    {"fc_features", "fc6_kernel", "pool", "dropout", "dropout_rate", "skip_scales", "skip_bias", "upsample_bias"}
)
# How a network is computed; its parameters and, up to rounding, its predictions do not depend on these.
_COMPUTE_OPTIONS = frozenset(
    {"freeze_stages", "remat", "dtype", "param_dtype", "precision", "axis_name", "whole_gradients"}
)
_INTERPOLATED_OPTIONS = frozenset({"head_features", "dropout", "dropout_rate", "aux_head"})
_COMMON_OPTIONS = _COMPUTE_OPTIONS | {"encoder", "encoder_norm", "width"}
_OPTIONS: dict[type[FCN], frozenset[str]] = {
    SameFCN: _COMMON_OPTIONS | _SCORE_OPTIONS,
    Pad100FCN: _COMMON_OPTIONS | _SCORE_OPTIONS - {"fc6_kernel"} | {"crop"},
    LadderFCN: _COMMON_OPTIONS,
    ResizeFCN: _COMMON_OPTIONS | _INTERPOLATED_OPTIONS,
    DilatedFCN: _COMMON_OPTIONS - {"encoder_norm"} | _INTERPOLATED_OPTIONS,
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "encoder_norm": (None, "batch"),
    "pool": ("ceil", "floor"),
    "dropout": ("element", "channel"),
    "precision": (None, "default", "high", "highest", *jax.lax.Precision),
}
# Limits on sizes that a file or a flag asks for: beyond any memory, but shapes can still be computed.
_WIDEST, _LARGEST, _LARGEST_KERNEL = 64, 2**20, 64


@dataclass(frozen=True)
class ModelSpec:
    """A named network: its family, stride, and the options that the name fixes."""

    family: type[FCN]
    stride: int
    summary: str
    fixed: dict[str, Any] = field(default_factory=dict)


# The crops at the output are those of the reference: voc-fcn32s, 16s and 8s net.py. The scales of pool4 and pool3 are
# those of voc-fcn8s-atonce/net.py.
_AT_ONCE = {"crop": (5, 9, 31), "skip_scales": (0.01, 0.0001)}
MODELS = {
    "fcn32s": ModelSpec(SameFCN, 32, "SAME padding, any size"),
    "fcn16s": ModelSpec(SameFCN, 16, "SAME padding, any size"),
    "fcn8s": ModelSpec(SameFCN, 8, "SAME padding, any size"),
    "fcn32s_pad100": ModelSpec(Pad100FCN, 32, "the Caffe reference", {"crop": (5, 9, 19)}),
    "fcn16s_pad100": ModelSpec(Pad100FCN, 16, "the Caffe reference", {"crop": (5, 9, 27)}),
    "fcn8s_pad100": ModelSpec(Pad100FCN, 8, "the Caffe reference", {"crop": (5, 9, 31)}),
    "fcn8s_pad100_atonce": ModelSpec(Pad100FCN, 8, "the reference, all skips trained at once", _AT_ONCE),
    "fcn32s_ladder": ModelSpec(LadderFCN, 32, "five 3x3 transposed convolutions"),
    "fcn16s_ladder": ModelSpec(LadderFCN, 16, "five 3x3 transposed convolutions"),
    "fcn8s_ladder": ModelSpec(LadderFCN, 8, "five 3x3 transposed convolutions"),
    "fcns_ladder": ModelSpec(LadderFCN, 2, "the same, skips from pool4 to pool1", {"skip_after_norm": True}),
    "fcn32s_resize": ModelSpec(ResizeFCN, 32, "small head, bilinear interpolation"),
    "fcn16s_resize": ModelSpec(ResizeFCN, 16, "small head, bilinear interpolation"),
    "fcn8s_resize": ModelSpec(ResizeFCN, 8, "small head, bilinear interpolation"),
    "fcn_resnet50": ModelSpec(DilatedFCN, 8, "torchvision's, dilated to stride 8", {"encoder": "resnet50"}),
    "fcn_resnet101": ModelSpec(DilatedFCN, 8, "torchvision's, dilated to stride 8", {"encoder": "resnet101"}),
}


def create_model(name: str, num_classes: int, **options: Any) -> FCN:
    """Build a network by name.

    Args:
        name: a key of ``MODELS``: ``fcn8s``, ``fcn8s_pad100``, ``fcn8s_ladder``, ``fcn8s_resize`` ...
        num_classes: 1 to 255.
        options: options of the family, e.g. ``encoder="vgg19"``, ``encoder_norm="batch"``, ``width=0.25``,
            ``dtype=jnp.bfloat16``. By default ``fc_features`` is 4096 x width, and ``head_features`` a quarter of the
            encoder's output channels.

    Returns:
        A ``flax.linen`` module: images (b, h, w, 3) -> logits (b, h, w, num_classes).

    Raises:
        InputError: an unknown name, option or value, or an option that the family does not have.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    spec = MODELS[name]
    allowed = _OPTIONS[spec.family]
    choices = {**_CHOICES, "encoder": tuple(RESNETS if spec.family is DilatedFCN else ENCODERS)}
    for option, value in options.items():
        if option not in allowed:
            raise unknown(f"option of {name}", option, sorted(allowed))
        if option in choices and value not in choices[option]:
            raise unknown(option, value, map(str, choices[option]))
    if not _is_count(num_classes) or num_classes > 255:
        hint = "give the number of classes without the void label"
        raise InputError(f"expected num_classes in 1 ... 255, got {num_classes!r}; {hint}")
    settings: dict[str, Any] = {**spec.fixed, **options}
    _check_numbers(settings)
    width = settings.get("width", 1.0)
    if "fc_features" in allowed:
        settings.setdefault("fc_features", scaled(4096, width))
    if "head_features" in allowed:
        quarter = scaled(512, width) if spec.family is DilatedFCN else scaled(STAGE_CHANNELS[-1], width) // 4
        settings.setdefault("head_features", max(1, quarter))
    return spec.family(num_classes=num_classes, stride=spec.stride, **settings)


def describe_model(model: FCN) -> tuple[str, dict[str, Any]]:
    """Return the name and the options with which ``create_model`` builds this network.

    Options of how it is computed (dtypes, precision, rematerialisation, frozen stages) are left out.
    """
    specs = {name: spec for name, spec in MODELS.items() if type(model) is spec.family and model.stride == spec.stride}
    as_named = [name for name, spec in specs.items() if all(getattr(model, k) == v for k, v in spec.fixed.items())]
    # The most specific name or, if the options match none, any name of this family and stride.
    name = max(as_named or specs, key=lambda name: len(specs[name].fixed))
    options = sorted(_OPTIONS[type(model)] - _COMPUTE_OPTIONS)
    return name, {option: getattr(model, option) for option in options}


def model_from_config(config: ModelConfig, num_classes: int, remat: bool = False) -> FCN:
    """Build the network of a run's config, see ``create_model``; fields left at None take the family's default."""
    options = {item.name: getattr(config, item.name) for item in fields(config)}
    name, dtype = options.pop("name"), options.pop("dtype")
    given = {option: value for option, value in options.items() if value is not None}
    return create_model(name, num_classes, dtype=getattr(jnp, dtype), remat=remat, **given)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _check_numbers(settings: dict[str, Any]) -> None:
    width, rate = settings.get("width", 1.0), settings.get("dropout_rate", 0.0)
    if not _is_number(width) or not 0 < width <= _WIDEST:
        raise InputError(f"expected 0 < width <= {_WIDEST}, got {width!r}; 1.0 is the published network")
    if not _is_number(rate) or not 0 <= rate < 1:
        raise InputError(f"expected 0 <= dropout_rate < 1, got {rate!r}; 0 turns dropout off")
    for option, most in (("fc_features", _LARGEST), ("fc6_kernel", _LARGEST_KERNEL), ("head_features", _LARGEST)):
        value = settings.get(option, 1)
        if not _is_count(value) or value > most:
            raise InputError(f"expected {option} in 1 ... {most}, got {value!r}; leave it out for the default")
    stages = settings.get("freeze_stages", 0)
    if not _is_count(stages, 0) or stages > 5:
        raise InputError(f"expected freeze_stages in 0 ... 5, got {stages!r}; 5 is the whole encoder")
    crop, scales = settings.get("crop", (0, 0, 0)), settings.get("skip_scales", (1.0, 1.0))
    if not isinstance(crop, tuple | list) or len(crop) != 3 or not all(_is_count(offset, 0) for offset in crop):
        raise InputError(f"expected crop to be three offsets in 0 ... {_LARGEST} (pool4, pool3, output), got {crop!r}")
    if not isinstance(scales, tuple | list) or len(scales) != 2 or not all(map(_is_number, scales)):
        raise InputError(f"expected skip_scales to be two factors (pool4, pool3), got {scales!r}")


def init_variables(
    model: FCN | VGGClassifier, key: jax.Array, image_size: tuple[int, int] = (64, 64), channels: int = 3
) -> dict[str, Any]:
    """Make a network's variables: {"params": ...} and, where it has batch norm, {"batch_stats": ...}.

    Convolutions are initialised from He's normal distribution, score layers at zero, and transposed convolutions of
    kernel 2s at stride s bilinearly. ``image_size`` (height, width) may be any that the model supports; no parameter's
    shape depends on it. ``channels`` is the number of the images' channels.
    """
    return dict(jax.jit(model.init)(key, jnp.zeros((1, *image_size, channels), model.dtype)))
