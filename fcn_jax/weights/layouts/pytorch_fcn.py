"""The FCN authors' Caffe networks, wkentaro's pytorch-fcn, which uses the same names, and VGG's Caffe files."""

from __future__ import annotations

from functools import partial

from fcn_jax.models.fcn import Pad100FCN, SameFCN
from fcn_jax.models.vgg import VGGClassifier
from fcn_jax.weights.layouts.layout import (
    CROPS,
    Fit,
    Layout,
    Rows,
    Shapes,
    classes_of,
    encoder_of,
    encoder_stages,
    stride_of,
)


def _rows(model: Pad100FCN) -> Rows:
    """``torchfcn/models/fcn32s.py``, ``fcn16s.py``, ``fcn8s.py`` (FCN8s and FCN8sAtOnce)."""
    rows = [(ours, ours.removeprefix("vgg.")) for stage in encoder_stages(model.encoder, None) for ours in stage]
    rows += [("head.fc6", "fc6"), ("head.fc7", "fc7"), ("score_fr", "score_fr")]
    if model.stride == 32:
        return [*rows, ("upscore32", "upscore")]
    finer = {
        16: ("score_pool4", "upscore2", "upscore16"),
        8: ("score_pool3", "score_pool4", "upscore2", "upscore8", "upscore_pool4"),
    }
    return rows + [(name, name) for name in finer[model.stride]]


def _fit(shapes: Shapes) -> Fit:
    stride = stride_of(shapes)
    names: tuple[str, ...] = {8: ("fcn8s_pad100", "fcn8s_pad100_atonce")}.get(stride, (f"fcn{stride}s_pad100",))
    if "scale_pool3.weight" in shapes:  # in net.py of voc-fcn8s-atonce the scales are layers
        names = names[1:]
    options = {"encoder": "vgg16", "encoder_norm": None, "pool": "ceil", "crop": CROPS[stride]}
    return Fit(names, classes_of(shapes, "score_fr.weight"), options | {"skip_bias": True, "upsample_bias": False})


PYTORCH_FCN = Layout(
    pattern=r"conv[1-5]_\d\.(weight|bias)",
    modules=_rows,
    preprocessing="caffe",  # torchfcn/datasets/voc.py: BGR minus (104.00698793, 116.66876762, 122.67891434)
    fit=_fit,
    families=(Pad100FCN,),
    constants={
        "scale_pool4.weight": lambda model: model.skip_scales[0],
        "scale_pool3.weight": lambda model: model.skip_scales[1],
    },
)


def _encoder_rows(encoder: str, norm: str | None) -> Rows:
    return [(ours, ours.removeprefix("vgg.")) for stage in encoder_stages(encoder, norm) for ours in stage]


CAFFE_VGG = Layout(
    # VGG_ILSVRC_16_layers and 19: the classifiers of Simonyan & Zisserman.
    pattern=r"fc8\.(weight|bias)",
    modules=lambda model: [
        *_encoder_rows(model.encoder, model.encoder_norm), ("head.fc6", "fc6"), ("head.fc7", "fc7"), ("fc8", "fc8"),
    ],
    preprocessing="caffe",
    encoder=partial(encoder_of, prefix="conv", rows=_encoder_rows),
    families=(SameFCN, Pad100FCN, VGGClassifier),
    linear="fc",
    unused=("fc[678].weight", "fc[678].bias"),
)  # fmt: skip
