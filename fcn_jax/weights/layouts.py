"""The layouts that weights are published in: an ordered name map for each, and how to recognise it.

A layout is added by writing one function, network -> list of ``Module`` in the order of its files, and one entry of
``LAYOUTS``. Leaf names (weight, bias, running_mean ...) and axes are the same in all of them and live in ``names.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from fcn_jax.models.fcn import FCN, ScoreFCN
from fcn_jax.models.vgg import ENCODERS
from fcn_jax.weights.names import LEAVES, Parameter

__all__ = ["LAYOUTS", "Layout", "Module", "Preprocessing", "Shapes", "encoder_name", "pair_up", "recognise"]

Preprocessing = Literal["imagenet", "caffe"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Module:
    """One row of a name map. A module of ours may occur twice where a layout stores it twice."""

    ours: str
    theirs: str
    linear: bool = False
    """Stored as the weight of a linear layer."""
    if_fits: bool = False
    """Left as it is, not refused, where the network has it in another shape."""


@dataclass(frozen=True)
class Layout:
    """How one source names the tensors of a network."""

    matches: Callable[[Shapes], bool]
    modules: Callable[[FCN], list[Module]] | None
    """The name map; None: the names are ours."""
    preprocessing: Preprocessing | None = None
    """What images these weights were trained on; None: the file's metadata says it."""
    variant: Callable[[Shapes], str | None] = lambda shapes: None
    """Tell the encoder from names and shapes, e.g. ``vgg16_bn``."""
    encoder_only: bool = False
    """Whether it has an encoder's weights alone, so that score layers and upsampling are left as they are."""
    unused: tuple[str, ...] = ()
    """Glob patterns of tensors that the network need not have a place for."""


def encoder_name(encoder: str, norm: str | None) -> str:
    """Name an encoder as torchvision does: ``vgg16`` or ``vgg16_bn``."""
    return encoder + ("_bn" if norm == "batch" else "")


def _torchvision_features(encoder: str, norm: str | None) -> list[tuple[str, str]]:
    """List (our module, theirs) of the encoder: ``make_layers`` numbers conv, BN, ReLU and pooling in one row."""
    rows, index = [], 0
    for stage, convs in enumerate(ENCODERS[encoder], start=1):
        for layer in range(1, convs + 1):
            rows.append((f"vgg.conv{stage}_{layer}", f"features.{index}"))
            if norm == "batch":
                rows.append((f"vgg.bn{stage}_{layer}", f"features.{index + 1}"))
            index += 3 if norm == "batch" else 2
        index += 1
    return rows


def _torchvision_vgg(model: FCN) -> list[Module]:
    """``vgg11`` ... ``vgg19_bn`` of torchvision (``models/vgg.py``)."""
    rows = [Module(ours, theirs) for ours, theirs in _torchvision_features(model.encoder, model.encoder_norm)]
    if isinstance(model, ScoreFCN):
        if model.fc6_kernel == 7:
            rows.append(Module("head.fc6", "classifier.0", linear=True, if_fits=True))
        rows.append(Module("head.fc7", "classifier.3", linear=True, if_fits=True))
    return rows


def _torchvision_variant(shapes: Shapes) -> str | None:
    ranks = {name: len(shape) for name, shape in shapes.items() if re.fullmatch(r"features\.\d+\.weight", name)}
    for encoder in ENCODERS:
        for norm in (None, "batch"):
            rows = _torchvision_features(encoder, norm)
            if ranks == {f"{theirs}.weight": 1 if ".bn" in ours else 4 for ours, theirs in rows}:
                return encoder_name(encoder, norm)
    return None


def _ours_variant(shapes: Shapes) -> str | None:
    names = [name for name in shapes if re.fullmatch(r"vgg\.conv\d_\d\.weight", name)]
    convs = tuple(sum(name.startswith(f"vgg.conv{stage}_") for name in names) for stage in range(1, 6))
    for encoder, known in ENCODERS.items():
        if convs == known:
            return encoder_name(encoder, "batch" if "vgg.bn1_1.weight" in shapes else None)
    return None


LAYOUTS: dict[str, Layout] = {
    "fcn_jax": Layout(
        matches=lambda shapes: any(re.match(r"vgg\.(conv|bn)\d_\d\.", name) for name in shapes),
        modules=None,
        variant=_ours_variant,
    ),
    "torchvision-vgg": Layout(
        matches=lambda shapes: any(re.fullmatch(r"features\.\d+\.weight", name) for name in shapes),
        modules=_torchvision_vgg,
        # The `transforms` of VGG16_Weights.IMAGENET1K_V1: RGB in [0, 1], ImageNet's mean and std.
        preprocessing="imagenet",
        variant=_torchvision_variant,
        encoder_only=True,
        # The layer of ImageNet's 1000 classes, and the others in networks without fc6 and fc7.
        unused=("classifier.[036].weight", "classifier.[036].bias"),
    ),
}


def recognise(shapes: Shapes) -> str | None:
    """Return the layout's name in ``LAYOUTS``, or None where no layout has such names."""
    return next((name for name, layout in LAYOUTS.items() if layout.matches(shapes)), None)


def pair_up(layout: Layout, model: FCN, parameters: list[Parameter]) -> list[tuple[Parameter, Module]]:
    """Pair parameters with rows of the name map, in the layout's order and, within a module, in torch's."""
    by_module: dict[str, list[Parameter]] = {}
    for parameter in sorted(parameters, key=lambda parameter: LEAVES.index(parameter.leaf)):
        by_module.setdefault(parameter.module, []).append(parameter)
    if layout.modules is None:
        rows = [Module(module, module) for module in dict.fromkeys(parameter.module for parameter in parameters)]
    else:
        rows = layout.modules(model)
    return [(parameter, row) for row in rows for parameter in by_module.get(row.ours, [])]
