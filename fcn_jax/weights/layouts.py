"""How a layout is described: an ordered name map, and which of our networks its files belong to.

The layouts themselves are in ``published.py``. Leaf names (weight, bias, running_mean ...) and axes are the same in all
of them and live in ``names.py``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fcn_jax.errors import InputError, unknown
from fcn_jax.models.catalog import MODELS, create_model, describe_model
from fcn_jax.models.classifier import VGGClassifier
from fcn_jax.models.fcn import FCN, ScoreFCN
from fcn_jax.weights.names import LEAVES, Parameter

__all__ = [
    "Fit",
    "Layout",
    "Module",
    "Network",
    "Preprocessing",
    "Shapes",
    "check_fit",
    "encoder_name",
    "pair_up",
    "saved_fit",
]

# Options that change training alone, so that weights fit whatever they are.
_TRAINING = ("dropout", "dropout_rate")

Preprocessing = Literal["imagenet", "caffe"]
Shapes = Mapping[str, tuple[int, ...]]
Network = FCN | VGGClassifier


@dataclass(frozen=True)
class Module:
    """One row of a name map. A module of ours may occur twice where a layout stores it twice."""

    ours: str
    theirs: str
    linear: bool = False
    """Stored as the weight of a linear layer."""
    if_fits: bool = False
    """Left as it is, not refused, where the network has it in another size."""


@dataclass(frozen=True)
class Fit:
    """The networks of the catalogue that a source's weights belong to, told by its names and shapes."""

    models: tuple[str, ...]
    """Names of ``MODELS`` that share the layout's names and differ in computation only: the user has to know which."""
    num_classes: int | None
    options: dict[str, Any] = field(default_factory=dict)
    """What must be as in the source for the network to compute the same."""

    @property
    def call(self) -> str:
        """The calls of ``create_model`` that make such a network, without the options that are defaults anyway."""
        classes = self.num_classes or "NUM_CLASSES"
        calls = []
        for name in self.models:
            default = _fields(create_model(name, 1))
            given = [f", {key}={value!r}" for key, value in self.options.items() if default[key] != value]
            calls.append(f"create_model({name!r}, {classes}{''.join(given)})")
        return " or ".join(calls)


@dataclass(frozen=True)
class Layout:
    """How one source names the tensors of a network."""

    matches: Callable[[Shapes], bool]
    modules: Callable[[Any], list[Module]] | None
    """The name map of a network; None: the names are ours."""
    preprocessing: Preprocessing | None = None
    """What images these weights were trained on; None: the file's metadata says it, or nothing does."""
    variant: Callable[[Shapes], str | None] = lambda shapes: None
    """Tell the encoder from names and shapes, e.g. ``vgg16_bn``."""
    fit: Callable[[Shapes], Fit] | None = None
    """Tell the network from names and shapes; None: an encoder or anything of ours."""
    families: tuple[type[Network], ...] = ()
    """The families that the layout has names for; empty: all."""
    encoder_only: bool = False
    """Whether it has an encoder's weights alone, so that score layers and upsampling are left as they are."""
    unused: tuple[str, ...] = ()
    """Glob patterns of tensors that the network need not have a place for."""


def encoder_name(encoder: str, norm: str | None) -> str:
    """Name an encoder as torchvision does: ``vgg16`` or ``vgg16_bn``."""
    return encoder + ("_bn" if norm == "batch" else "")


def saved_fit(origin: str, metadata: Mapping[str, str]) -> Fit | None:
    """Return the network that ``save`` wrote into a file's metadata; None: another layout's, or another writer's."""
    if metadata.get("layout") != "fcn_jax" or "model" not in metadata:
        return None
    try:
        saved = json.loads(metadata["model"])
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in saved["options"].items()}
        known = describe_model(create_model(saved["name"], saved["num_classes"], **options))[1]
        for option in options.keys() - known.keys():  # such as dtype: how to compute is no matter of the weights
            raise unknown(f"option of {saved['name']}", option, known)
        return Fit((saved["name"],), saved["num_classes"], options)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{origin}: its metadata describes no network that this version knows ({error}); write the file again"
        ) from error


def check_fit(origin: str, fit: Fit, model: Network, partial: bool) -> None:
    """Check that a source's network and the model compute the same.

    Args:
        origin: the source's name.
        fit: what the source holds.
        model: the network to fill.
        partial: a network of the family with another stride will do, as in training by stages.

    Raises:
        InputError: they do not; the message has the call that makes a network that does.
    """
    has = _fields(model)
    specs = [MODELS[name] for name in fit.models]
    strides = [spec.stride for spec in specs]
    differs = []
    if type(model) is not specs[0].family:
        differs = [f"family {type(model).__name__}"]
    elif has["stride"] in strides:
        differs = [
            f"{key}={has[key]!r}" for key, value in fit.options.items() if has[key] != value and key not in _TRAINING
        ]
    elif partial:
        encoder = ("encoder", "encoder_norm")
        differs = [f"{key}={has[key]!r}" for key in encoder if has[key] != fit.options.get(key, has[key])]
    else:
        differs = [f"stride={has['stride']}"]
    # A name stands for its scales, unless the source gives others: pytorch-fcn's files may be plain or at once.
    scales = [create_model(name, 1, **_scales(fit)).skip_scales for name in fit.models if _is_score(name)]
    if scales and not partial and not differs and has["skip_scales"] not in scales:
        differs = [f"skip_scales={has['skip_scales']}"]
    if not differs:
        return
    way_out = f"use {fit.call}"
    if type(model) is specs[0].family and has["stride"] not in strides:
        way_out += ", or name what is new in allow_missing and what falls away in allow_unexpected"
    raise InputError(f"{origin}: weights of another network than the model, which has {', '.join(differs)}; {way_out}")


def _scales(fit: Fit) -> dict[str, Any]:
    return {key: value for key, value in fit.options.items() if key == "skip_scales"}


def _is_score(name: str) -> bool:
    return issubclass(MODELS[name].family, ScoreFCN)


def pair_up(layout: Layout, model: Network, parameters: list[Parameter]) -> list[tuple[Parameter, Module]]:
    """Pair parameters with rows of the name map, in the layout's order and, within a module, in torch's."""
    by_module: dict[str, list[Parameter]] = {}
    for parameter in sorted(parameters, key=lambda parameter: LEAVES.index(parameter.leaf)):
        by_module.setdefault(parameter.module, []).append(parameter)
    if layout.modules is None:
        rows = [Module(module, module) for module in dict.fromkeys(parameter.module for parameter in parameters)]
    else:
        rows = layout.modules(model)
    return [(parameter, row) for row in rows for parameter in by_module.get(row.ours, [])]


def _fields(model: Network) -> dict[str, Any]:
    return {item.name: getattr(model, item.name) for item in dataclasses.fields(model)}
