"""VGG classifiers of torchvision, and of timm and jcjohnson's pytorch-vgg, which use similar names."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

from fcn_jax.models.fcn import LadderFCN, Pad100FCN, ResizeFCN, SameFCN
from fcn_jax.models.vgg import VGGClassifier
from fcn_jax.weights.layouts.layout import Layout, Network, Rows, Shapes, encoder_of, encoder_stages


def feature_stages(encoder: str, norm: str | None) -> list[list[tuple[str, int]]]:
    """List (our module, index) by stage, as ``make_layers`` of torchvision's ``models/vgg.py`` numbers all layers."""
    stages: list[list[tuple[str, int]]] = []
    index = itertools.count()
    for modules in encoder_stages(encoder, norm):
        stages.append([])
        for ours in modules:
            stages[-1].append((ours, next(index)))
            if norm is None or ".bn" in ours:
                next(index)  # ReLU
        next(index)  # pooling
    return stages


def feature_rows(encoder: str, norm: str | None, prefix: str) -> Rows:
    """List the rows of the encoder; the prefix is ``features.`` in torchvision."""
    return [(ours, f"{prefix}{index}") for stage in feature_stages(encoder, norm) for ours, index in stage]


def feature_encoder(shapes: Shapes, prefix: str) -> str | None:
    """Infer the encoder from the weights under a prefix."""
    return encoder_of(shapes, prefix, partial(feature_rows, prefix=prefix))


def _rows(model: Network, fc6: str, fc7: str, fc8: str) -> Rows:
    rows = feature_rows(model.encoder, model.encoder_norm, "features.")
    if isinstance(model, VGGClassifier):
        return [*rows, ("head.fc6", fc6), ("head.fc7", fc7), ("fc8", fc8)]
    if not isinstance(model, SameFCN | Pad100FCN):
        return rows
    return [*rows, *([("head.fc6", fc6)] if model.fc6_kernel == 7 else []), ("head.fc7", fc7)]


TORCHVISION = Layout(
    # vgg11 ... vgg19_bn of models/vgg.py
    pattern=r"features\.\d+\.weight",
    modules=partial(_rows, fc6="classifier.0", fc7="classifier.3", fc8="classifier.6"),
    # The `transforms` of VGG16_Weights.IMAGENET1K_V1: RGB in [0, 1], ImageNet's mean and std.
    preprocessing="imagenet",
    encoder=partial(feature_encoder, prefix="features."),
    families=(SameFCN, Pad100FCN, LadderFCN, ResizeFCN, VGGClassifier),
    linear="classifier.",
    # The layer of ImageNet's 1000 classes, and the others in networks without fc6 and fc7.
    unused=("classifier.[036].weight", "classifier.[036].bias"),
)
JOHNSON = replace(
    TORCHVISION,
    # VGG-16 and 19 of jcjohnson's pytorch-vgg, in the names of early torchvision: dropout comes before its layer.
    pattern=r"classifier\.[14]\.(weight|bias)",
    modules=partial(_rows, fc6="classifier.1", fc7="classifier.4", fc8="classifier.6"),
    # README of pytorch-vgg: BGR in [0, 255] minus (103.939, 116.779, 123.68), within 1 of the FCN reference's mean.
    preprocessing="caffe",
    unused=("classifier.[146].weight", "classifier.[146].bias"),
)
TIMM = replace(
    TORCHVISION,
    # models/vgg.py: the first two fully connected layers are convolutions (ConvMlp), and `_cfg` has ImageNet's mean.
    pattern=r"pre_logits\.fc[12]\..*",
    modules=partial(_rows, fc6="pre_logits.fc1", fc7="pre_logits.fc2", fc8="head.fc"),
    linear="head.fc",
    unused=("pre_logits.fc[12].*", "head.fc.*"),
)
