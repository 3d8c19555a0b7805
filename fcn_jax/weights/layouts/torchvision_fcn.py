"""torchvision's FCN on ResNet-50 and 101, and the ResNet classifiers of torchvision and timm."""

from __future__ import annotations

from functools import partial
from typing import Any

from fcn_jax.models.fcn import DilatedFCN
from fcn_jax.models.resnet import RESNETS
from fcn_jax.weights.layouts.layout import Fit, Layout, Rows, Shapes, classes_of


def encoder_rows(encoder: str, prefix: str) -> Rows:
    """List the rows of a ResNet of ``models/resnet.py``, in the order of its state dict."""
    rows = [("resnet.conv1", f"{prefix}conv1"), ("resnet.bn1", f"{prefix}bn1")]
    for layer, blocks in enumerate(RESNETS[encoder], start=1):
        for block in range(blocks):
            names = [f"{kind}{number}" for number in (1, 2, 3) for kind in ("conv", "bn")]
            pairs = list(zip(names, names, strict=True))
            if block == 0:
                pairs += [("downsample_conv", "downsample.0"), ("downsample_bn", "downsample.1")]
            rows += [(f"resnet.layer{layer}_{block}.{a}", f"{prefix}layer{layer}.{block}.{b}") for a, b in pairs]
    return rows


def resnet_of(shapes: Shapes, third_layer: str) -> str | None:
    """Infer the ResNet from the number of blocks in its third layer, whose names have this prefix."""
    count = sum(name.startswith(third_layer) and name.endswith(".conv2.weight") for name in shapes)
    return next((name for name, blocks in RESNETS.items() if blocks[2] == count), None)


def _rows(model: DilatedFCN) -> Rows:
    """``fcn_resnet50`` and ``fcn_resnet101`` of ``models/segmentation/fcn.py``."""
    rows = encoder_rows(model.encoder, "backbone.")
    for ours, theirs in (("head", "classifier"), ("aux", "aux_classifier")):
        rows += [(f"{ours}.{layer}", f"{theirs}.{index}") for layer, index in (("conv", 0), ("bn", 1), ("score", 4))]
    return rows


def _fit(shapes: Shapes) -> Fit:
    encoder = resnet_of(shapes, "backbone.layer3.")
    names = (f"fcn_{encoder}",) if encoder else tuple(f"fcn_{encoder}" for encoder in RESNETS)
    options: dict[str, Any] = {"aux_head": any(name.startswith("aux_classifier.") for name in shapes)}
    if encoder:
        options["encoder"] = encoder
    return Fit(names, classes_of(shapes, "classifier.4.weight"), options)


TORCHVISION_FCN = Layout(
    pattern=r"backbone\.(conv1|layer\d\.\d+\.conv\d)\.weight",
    modules=_rows,
    preprocessing="imagenet",  # references/segmentation/presets.py
    fit=_fit,
    families=(DilatedFCN,),
)
TORCHVISION_RESNET = Layout(
    # resnet50 and resnet101 of models/resnet.py, with the strides that dilation replaces; timm has the same names.
    pattern=r"layer1\.0\.conv3\.weight",
    modules=lambda model: encoder_rows(model.encoder, ""),
    preprocessing="imagenet",
    encoder=partial(resnet_of, third_layer="layer3."),
    families=(DilatedFCN,),
    unused=("fc.weight", "fc.bias"),
)
