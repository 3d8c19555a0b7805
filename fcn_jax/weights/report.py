"""What a source holds, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fcn_jax.weights.layouts import Fit, saved_fit
from fcn_jax.weights.published import LAYOUTS, recognise
from fcn_jax.weights.source import Source, TensorInfo, Tensors, open_source

__all__ = ["Info", "Report", "describe", "inspect", "source_options"]


@dataclass(frozen=True)
class Info:
    """What a source holds."""

    layout: str | None
    """A key of ``LAYOUTS``, or None where no layout has such names."""
    variant: str | None
    """The encoder, as far as names and shapes tell: ``vgg16``, ``vgg16_bn`` ..."""
    preprocessing: str | None
    """What images the weights were trained on, "imagenet" or "caffe"; None: the source does not say."""
    tensors: dict[str, TensorInfo]
    fit: Fit | None = None
    """The network that the weights are of; None: an encoder, or the source does not say."""
    unwrapped: tuple[str, ...] = ()
    """What was taken off around the tensors: ``model_state_dict``, ``module.`` ..."""


@dataclass(frozen=True)
class Report:
    """What became of every parameter of the network and of every tensor of the source."""

    layout: str
    preprocessing: str | None
    filled: dict[str, str]
    """Parameter -> the tensor it was filled from, in the layout's order."""
    left: dict[str, str]
    """Parameter that keeps its value -> why."""
    ignored: dict[str, str]
    """Tensor that is not used -> why."""
    converted: dict[str, str] = field(default_factory=dict)
    """Parameter that was filled -> how its array was turned."""
    unwrapped: tuple[str, ...] = ()
    """What was taken off around the tensors: ``model_state_dict``, ``module.`` ..."""


def inspect(source: Source) -> Info:
    """Tell what a source holds, without a network.

    Raises:
        InputError: the source cannot be opened.
    """
    return describe(open_source(source))


def describe(tensors: Tensors) -> Info:
    """Tell what an opened source holds."""
    name = recognise(tensors.shapes)
    preprocessing = tensors.preprocessing
    if name is None:
        return Info(None, None, preprocessing, tensors.infos, unwrapped=tensors.unwrapped)
    layout, shapes = LAYOUTS[name], tensors.shapes
    # What the file says of itself goes before what its layout's files usually are.
    preprocessing = preprocessing or layout.preprocessing
    fit = layout.fit(shapes) if layout.fit else saved_fit(tensors.origin, tensors.metadata)
    return Info(name, layout.variant(shapes), preprocessing, tensors.infos, fit, tensors.unwrapped)


def source_options(info: Info, name: str) -> tuple[dict[str, Any], int | None]:
    """Return the options of ``create_model`` for a source's own network, as far as it says them, and its classes.

    Args:
        info: of the source.
        name: the network that is wanted; one that the source's weights are not of gets no options.
    """
    if info.fit is not None:
        return (dict(info.fit.options) if name in info.fit.models else {}), info.fit.num_classes
    encoder, _, norm = (info.variant or "vgg16").partition("_")
    return {"encoder": encoder, "encoder_norm": "batch" if norm else None}, None
