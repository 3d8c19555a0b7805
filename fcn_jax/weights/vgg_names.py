"""Names of the VGG encoder and its fully connected layers in torchvision and timm, which other projects build on."""

from __future__ import annotations

import re
from collections.abc import Callable

from fcn_jax.models.classifier import VGGClassifier
from fcn_jax.models.fcn import ScoreFCN
from fcn_jax.models.vgg import ENCODERS
from fcn_jax.weights.layouts import Module, Network, Shapes, encoder_name

__all__ = [
    "conv_names",
    "feature_rows",
    "feature_stages",
    "feature_variant",
    "johnson_vgg",
    "timm_vgg",
    "torchvision_vgg",
]


def conv_names(encoder: str) -> list[str]:
    """List the encoder's convolutions as ``1_1`` ... ``5_3``."""
    return [f"{stage}_{layer}" for stage, n in enumerate(ENCODERS[encoder], start=1) for layer in range(1, n + 1)]


def feature_stages(encoder: str, norm: str | None) -> list[list[tuple[str, int]]]:
    """List (our module, index) of the encoder, stage by stage; conv, BN, ReLU and pooling are numbered in one row.

    Source: ``make_layers`` of torchvision's ``models/vgg.py``, which timm, pochih and Tramac share.
    """
    stages, index = [], 0
    for stage, convs in enumerate(ENCODERS[encoder], start=1):
        rows = []
        for layer in range(1, convs + 1):
            rows.append((f"vgg.conv{stage}_{layer}", index))
            if norm == "batch":
                rows.append((f"vgg.bn{stage}_{layer}", index + 1))
            index += 3 if norm == "batch" else 2
        index += 1
        stages.append(rows)
    return stages


def feature_rows(model: Network, prefix: str) -> list[Module]:
    """List the rows of the encoder under ``features.`` or another prefix."""
    stages = feature_stages(model.encoder, model.encoder_norm)
    return [Module(ours, f"{prefix}{index}") for rows in stages for ours, index in rows]


def feature_variant(prefix: str) -> Callable[[Shapes], str | None]:
    """Return a function that tells the encoder from the indices and ranks of the weights under a prefix."""

    def variant(shapes: Shapes) -> str | None:
        pattern = re.escape(prefix) + r"\d+\.weight"
        ranks = {name: len(shape) for name, shape in shapes.items() if re.fullmatch(pattern, name)}
        for encoder in ENCODERS:
            for norm in (None, "batch"):
                rows = [row for stage in feature_stages(encoder, norm) for row in stage]
                if ranks == {f"{prefix}{index}.weight": 1 if ".bn" in ours else 4 for ours, index in rows}:
                    return encoder_name(encoder, norm)
        return None

    return variant


def _fc_rows(model: Network, fc6: str, fc7: str, fc8: str, linear: bool) -> list[Module]:
    """List VGG's fully connected layers where the network has them."""
    rows = []
    if isinstance(model, VGGClassifier):
        rows = [Module("head.fc6", fc6, linear), Module("head.fc7", fc7, linear), Module("fc8", fc8, linear=True)]
    elif isinstance(model, ScoreFCN):
        rows = [Module("head.fc6", fc6, linear, if_fits=True)] if model.fc6_kernel == 7 else []
        rows += [Module("head.fc7", fc7, linear, if_fits=True)]
    return rows


def torchvision_vgg(model: Network) -> list[Module]:
    """``vgg11`` ... ``vgg19_bn`` of torchvision (``models/vgg.py``)."""
    rows = feature_rows(model, "features.")
    return rows + _fc_rows(model, "classifier.0", "classifier.3", "classifier.6", linear=True)


def johnson_vgg(model: Network) -> list[Module]:
    """VGG-16 and 19 of jcjohnson's pytorch-vgg, in the names of early torchvision: dropout comes before its layer."""
    rows = feature_rows(model, "features.")
    return rows + _fc_rows(model, "classifier.1", "classifier.4", "classifier.6", linear=True)


def timm_vgg(model: Network) -> list[Module]:
    """VGGs of timm (``models/vgg.py``): the first two fully connected layers are convolutions (``ConvMlp``)."""
    rows = feature_rows(model, "features.")
    return rows + _fc_rows(model, "pre_logits.fc1", "pre_logits.fc2", "head.fc", linear=False)
