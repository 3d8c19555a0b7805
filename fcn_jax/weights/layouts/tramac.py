"""Tramac's awesome-semantic-segmentation-pytorch."""

from __future__ import annotations

from fcn_jax.models.fcn import ResizeFCN
from fcn_jax.weights.layouts.layout import Fit, Layout, Rows, Shapes, classes_of, encoder_options, stride_of
from fcn_jax.weights.layouts.torchvision import feature_encoder, feature_rows, feature_stages


def _rows(model: ResizeFCN) -> Rows:
    """FCN32s, FCN16s and FCN8s of ``core/models/fcn.py``.

    FCN16s and FCN8s also hold slices of the encoder: ``pretrained[:17]``, ``[17:24]``, ``[24:]``.
    """
    rows = feature_rows(model.encoder, model.encoder_norm, "pretrained.")
    stages = feature_stages(model.encoder, model.encoder_norm)
    slices = {32: [], 16: [("pool4", 0, 4), ("pool5", 4, 5)], 8: [("pool3", 0, 3), ("pool4", 3, 4), ("pool5", 4, 5)]}
    for name, first, last in slices[model.stride]:
        start = stages[first][0][1]
        rows += [(ours, f"{name}.{index - start}") for stage in stages[first:last] for ours, index in stage]
    scores = {32: [], 16: ["score_pool4"], 8: ["score_pool3", "score_pool4"]}[model.stride]
    return [*rows, *_head("head", "head"), *zip(scores, scores, strict=True), *_head("aux", "auxlayer")]


def _head(ours: str, theirs: str) -> Rows:
    layers = {"conv": 0, "bn": 1, "score": 4}
    return [(f"{ours}.{layer}", f"{theirs}.block.{index}") for layer, index in layers.items()]


def _fit(shapes: Shapes) -> Fit:
    aux = any(name.startswith("auxlayer.") for name in shapes)
    options = encoder_options(feature_encoder(shapes, "pretrained.")) | {"aux_head": aux}
    return Fit((f"fcn{stride_of(shapes)}s_resize",), classes_of(shapes, "head.block.4.weight"), options)


TRAMAC = Layout(
    pattern=r"pretrained\.\d+\.(weight|bias)|(head|auxlayer)\.block\.\d\..*",
    modules=_rows,
    preprocessing="imagenet",  # scripts/train.py: ToTensor, Normalize([.485, .456, .406], [.229, .224, .225])
    fit=_fit,
    families=(ResizeFCN,),
)
