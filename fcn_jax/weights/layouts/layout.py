"""The description of a layout: the names of its modules, and how to infer the network that a file belongs to."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fcn_jax.errors import InputError
from fcn_jax.models.catalog import create_model
from fcn_jax.models.fcn import FCN
from fcn_jax.models.resnet import RESNETS
from fcn_jax.models.vgg import ENCODERS, VGGClassifier
from fcn_jax.weights.names import LEAVES, Parameter

# Options that affect only training: weights fit with any value.
_TRAINING = ("dropout", "dropout_rate")
CROPS = {32: (5, 9, 19), 16: (5, 9, 27), 8: (5, 9, 31)}
"""Crop offsets by stride: the reference's voc-fcn32s, 16s and 8s ``net.py``."""

Shapes = Mapping[str, tuple[int, ...]]
Network = FCN | VGGClassifier
Rows = list[tuple[str, str]]
"""(our module, the source's module), in the order of its state dict; a copy in the source is another row."""


@dataclass(frozen=True)
class Fit:
    """The networks of the catalogue that a source's weights belong to, inferred from names and shapes."""

    models: tuple[str, ...]
    """Keys of ``MODELS``; several if their names and shapes are the same, and the user has to choose."""
    num_classes: int | None
    options: dict[str, Any] = field(default_factory=dict)
    """Options of ``create_model`` that must equal the source's for the network to compute the same."""

    @property
    def encoder(self) -> str | None:
        """The encoder's name, see ``encoder_name``; None if it is not known."""
        options = self.options
        return encoder_name(options["encoder"], options.get("encoder_norm")) if "encoder" in options else None

    @property
    def call(self) -> str:
        """The calls of ``create_model`` that make such a network, without options at their defaults."""
        calls = []
        for name in self.models:
            default = _fields(create_model(name, 1))
            given = [f", {key}={value!r}" for key, value in self.options.items() if default[key] != value]
            calls.append(f"create_model({name!r}, {self.num_classes or 'NUM_CLASSES'}{''.join(given)})")
        return " or ".join(calls)


@dataclass(frozen=True)
class Layout:
    """How one source names the tensors of a network. Leaf names and axes are torch's everywhere, see ``names.py``."""

    pattern: str
    """A regular expression; a file has this layout if the name of one of its tensors matches."""
    modules: Callable[[Any], Rows] | None
    """Returns the names of a network's modules; None: they are ours."""
    preprocessing: str | None = None
    """The preprocessing these weights were trained with; None: see the file's metadata, or unknown."""
    encoder: Callable[[Shapes], str | None] | None = None
    """Infers the encoder from names and shapes, e.g. ``vgg16_bn``; None: ``fit`` infers it."""
    fit: Callable[[Shapes], Fit] | None = None
    """Infers the network from names and shapes; None for classifiers and for our own names."""
    families: tuple[type[Network], ...] = ()
    """The families that the layout has names for; empty: all."""
    linear: str | None = None
    """Prefix of the source's modules that are linear layers where ours are convolutions."""
    unused: tuple[str, ...] = ()
    """Glob patterns of tensors that a network may have no layer for."""
    constants: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)
    """Tensors of one number, and the model option that each has to equal."""

    @property
    def encoder_only(self) -> bool:
        """Whether it is a classifier's layout, without names for score layers and upsampling."""
        return self.fit is None and self.modules is not None


def encoder_name(encoder: str, norm: str | None) -> str:
    """Name an encoder as torchvision does: ``vgg16``, ``vgg16_bn`` or ``resnet50``, which always has batch norm."""
    return encoder + ("_bn" if norm == "batch" and encoder not in RESNETS else "")


def encoder_options(name: str | None) -> dict[str, Any]:
    """Return the options of ``create_model`` for an encoder's name, the inverse of ``encoder_name``; none for None."""
    if name in RESNETS:
        return {"encoder": name}
    encoder, _, norm = (name or "").partition("_")
    return {"encoder": encoder, "encoder_norm": "batch" if norm else None} if name else {}


def encoder_stages(encoder: str, norm: str | None) -> list[list[str]]:
    """List our modules of the encoder by stage: ``vgg.conv1_1``, ``vgg.bn1_1`` ..."""
    kinds = ("conv", "bn") if norm == "batch" else ("conv",)
    return [
        [f"vgg.{kind}{stage}_{layer}" for layer in range(1, convs + 1) for kind in kinds]
        for stage, convs in enumerate(ENCODERS[encoder], start=1)
    ]


def encoder_of(shapes: Shapes, prefix: str, rows: Callable[[str, str | None], Rows]) -> str | None:
    """Infer the encoder from names and ranks of the weights under a prefix; ``rows`` lists the modules of one."""
    ranks = {name: len(shape) for name, shape in shapes.items() if name.startswith(prefix) and name.endswith(".weight")}
    for encoder, norm in itertools.product(ENCODERS, (None, "batch")):
        if ranks == {f"{theirs}.weight": 1 if ".bn" in ours else 4 for ours, theirs in rows(encoder, norm)}:
            return encoder_name(encoder, norm)
    return None


def stride_of(shapes: Shapes) -> int:
    """Infer the stride from the layers of the finer skips; any one of them is enough."""
    if any(name.startswith(("score_pool3", "upscore8", "pool3.")) for name in shapes):
        return 8
    return 16 if any(name.startswith(("score_pool4", "upscore16", "pool4.")) for name in shapes) else 32


def classes_of(shapes: Shapes, name: str) -> int | None:
    """Return the number of classes of a score layer; None if its weight is missing."""
    return shapes[name][0] if shapes.get(name) else None


def check_fit(origin: str, fit: Fit, model: Network, partial: bool) -> None:
    """Raise InputError if model and source compute differently; the message has the call that makes a matching model.

    With ``partial``, another stride of the same family is accepted, as in training by stages.
    """
    has, way_out = _fields(model), f"use {fit.call}"
    candidates = [create_model(name, 1, **fit.options) for name in fit.models]
    same_stride = [_fields(candidate) for candidate in candidates if candidate.stride == has.get("stride")]
    keys = [key for key in fit.options if key not in _TRAINING]
    if "skip_scales" in {*has} - {*keys} and not partial:
        keys.append("skip_scales")  # the name implies the scales: pytorch-fcn's files may be plain or at once
    if type(model) is not type(candidates[0]):
        differs = [f"family {type(model).__name__}"]
    elif same_stride:
        wrong = [[f"{key}={has[key]!r}" for key in keys if has[key] != other[key]] for other in same_stride]
        differs = min(wrong, key=len)
    else:
        way_out += ", or name new parameters in allow_missing and unused tensors in allow_unexpected"
        keys = [key for key in ("encoder", "encoder_norm") if has[key] != fit.options.get(key, has[key])]
        differs = [f"{key}={has[key]!r}" for key in keys] if partial else [f"stride={has['stride']}"]
    if differs:
        raise InputError(f"{origin}: does not match the model, which has {', '.join(differs)}; {way_out}")


def pair_up(layout: Layout, model: Network, parameters: list[Parameter]) -> list[tuple[Parameter, str]]:
    """Pair parameters with the source's modules, in the order of the source's state dict."""
    by_module: dict[str, list[Parameter]] = {}
    for parameter in sorted(parameters, key=lambda parameter: LEAVES.index(parameter.leaf)):
        by_module.setdefault(parameter.module, []).append(parameter)
    ours = dict.fromkeys(parameter.module for parameter in parameters)
    rows = layout.modules(model) if layout.modules else zip(ours, ours, strict=True)
    return [(parameter, theirs) for module, theirs in rows for parameter in by_module.get(module, [])]


def _fields(model: Network) -> dict[str, Any]:
    return {item.name: getattr(model, item.name) for item in dataclasses.fields(model)}
