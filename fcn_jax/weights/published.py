"""The layouts that weights are published in, each from its source's module definitions.

A layout is added by writing one function, network -> list of ``Module`` in the order of its state dict, and one entry
of ``LAYOUTS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fcn_jax.models.fcn import LadderFCN, Pad100FCN, ResizeFCN, SameFCN
from fcn_jax.models.vgg import ENCODERS
from fcn_jax.weights.layouts import Fit, Layout, Module, Shapes, encoder_name
from fcn_jax.weights.vgg_names import (
    conv_names,
    feature_rows,
    feature_stages,
    feature_variant,
    johnson_vgg,
    timm_vgg,
    torchvision_vgg,
)

__all__ = ["LAYOUTS", "recognise"]


def _named(pattern: str) -> Callable[[Shapes], bool]:
    """Recognise a layout by any name of this form."""
    return lambda shapes: any(re.fullmatch(pattern, name) for name in shapes)


def _pytorch_fcn(model: Pad100FCN) -> list[Module]:
    """pytorch-fcn's ``torchfcn/models/fcn32s.py``, ``fcn16s.py``, ``fcn8s.py`` (FCN8s and FCN8sAtOnce)."""
    rows = [Module(f"vgg.conv{name}", f"conv{name}") for name in conv_names(model.encoder)]
    rows += [Module("head.fc6", "fc6"), Module("head.fc7", "fc7"), Module("score_fr", "score_fr")]
    if model.stride == 32:
        return [*rows, Module("upscore32", "upscore")]
    names = {
        16: ("score_pool4", "upscore2", "upscore16"),
        8: ("score_pool3", "score_pool4", "upscore2", "upscore8", "upscore_pool4"),
    }
    return rows + [Module(name, name) for name in names[model.stride]]


def _tramac(model: ResizeFCN) -> list[Module]:
    """``core/models/fcn.py`` of awesome-semantic-segmentation-pytorch.

    FCN16s and FCN8s keep slices of the encoder beside the whole: ``pretrained[:17]``, ``[17:24]``, ``[24:]``.
    """
    rows = feature_rows(model, "pretrained.")
    stages = feature_stages(model.encoder, model.encoder_norm)
    slices = {32: [], 16: [("pool4", 0, 4), ("pool5", 4, 5)], 8: [("pool3", 0, 3), ("pool4", 3, 4), ("pool5", 4, 5)]}
    for name, first, last in slices[model.stride]:
        start = stages[first][0][1]
        rows += [Module(ours, f"{name}.{index - start}") for stage in stages[first:last] for ours, index in stage]
    rows += _tramac_head("head", "head")
    rows += [
        Module(name, name) for name in {32: [], 16: ["score_pool4"], 8: ["score_pool3", "score_pool4"]}[model.stride]
    ]
    return rows + (_tramac_head("aux", "auxlayer") if model.aux_head else [])


def _tramac_head(ours: str, theirs: str) -> list[Module]:
    layers = {"conv": 0, "bn": 1, "score": 4}
    return [Module(f"{ours}.{layer}", f"{theirs}.block.{index}") for layer, index in layers.items()]


_RUNGS = tuple(name for rung in range(1, 6) for name in (f"deconv{rung}", f"bn{rung}"))


def _pochih(model: LadderFCN) -> list[Module]:
    """FCN32s, FCN16s, FCN8s and FCNs of pochih's ``python/fcn.py``."""
    rows = feature_rows(model, "pretrained_net.features.")
    return rows + [Module(name, name) for name in (*_RUNGS, "classifier")]


def _fcn1(model: LadderFCN) -> list[Module]:
    """FCN1 of the FCN1 notes: each stage a block of conv, ReLU, conv, ReLU, pooling."""
    names = (name.split("_") for name in conv_names(model.encoder))
    rows = [Module(f"vgg.conv{stage}_{layer}", f"block{stage}.{2 * (int(layer) - 1)}") for stage, layer in names]
    return rows + [Module(name, name) for name in (*_RUNGS, "classifier")]


def _fanrencli(model: Pad100FCN) -> list[Module]:
    """VGG16 of Fanrencli's FCN: convolutions counted through, fc6 and fc7 among them."""
    ours = [f"vgg.conv{name}" for name in conv_names(model.encoder)] + ["head.fc6", "head.fc7"]
    rows = [Module(name, f"conv{index}") for index, name in enumerate(ours, start=1)]
    names = {
        32: ("upscore32",),
        16: ("upscore16", "upscore2", "score_pool4"),
        8: ("score_pool3", "score_pool4", "upscore2", "upscore8", "upscore_pool4"),
    }
    theirs = {"upscore_pool4": "upscore2x2"}
    return rows + [Module(name, theirs.get(name, name)) for name in ("score_fr", *names[model.stride])]


def _boostcamp(model: SameFCN) -> list[Module]:
    """FCN32s, FCN16s and FCN8s of the Boostcamp notes; fc6 and fc7 are blocks with ReLU in the first only."""
    last = {f"{stage}_{convs}": stage for stage, convs in enumerate(ENCODERS[model.encoder], start=1)}
    rows = []
    for name in conv_names(model.encoder):
        rows.append(Module(f"vgg.conv{name}", f"conv{name}.0"))
        stage = last.get(name, 0)
        if (stage, model.stride) in ((3, 8), (4, 8), (4, 16)):  # the score layer follows its pooling
            rows.append(Module(f"score_pool{stage}", f"score_pool{stage}_fr"))
    block = ".0" if model.stride == 32 else ""
    rows += [Module("head.fc6", f"fc6{block}"), Module("head.fc7", f"fc7{block}"), Module("score_fr", "score_fr")]
    rows += [Module("upscore2", "upscore2")] if model.stride <= 16 else []
    rows += [Module("upscore_pool4", "upscore2_pool4")] if model.stride == 8 else []
    return [*rows, Module(f"upscore{model.stride}", f"upscore{model.stride}")]


def _ours_variant(shapes: Shapes) -> str | None:
    names = [name for name in shapes if re.fullmatch(r"vgg\.conv\d_\d\.weight", name)]
    convs = tuple(sum(name.startswith(f"vgg.conv{stage}_") for name in names) for stage in range(1, 6))
    for encoder, known in ENCODERS.items():
        if convs == known:
            return encoder_name(encoder, "batch" if "vgg.bn1_1.weight" in shapes else None)
    return None


def _stride(shapes: Shapes) -> int:
    """Tell the stride by the layers of the finer skips; any one of them will do, should another be missing."""
    if any(name.startswith(("score_pool3", "upscore8", "pool3.")) for name in shapes):
        return 8
    return 16 if any(name.startswith(("score_pool4", "upscore16", "pool4.")) for name in shapes) else 32


def _classes(shapes: Shapes, *names: str) -> int | None:
    return next((shapes[name][0] for name in names if shapes.get(name)), None)


def _encoder(variant: str | None) -> dict[str, Any]:
    encoder, _, norm = (variant or "").partition("_")
    return {"encoder": encoder, "encoder_norm": "batch" if norm else None} if variant else {}


_PLAIN_VGG16 = {"encoder": "vgg16", "encoder_norm": None, "upsample_bias": False, "skip_scales": (1.0, 1.0)}
_CROPS = {32: (5, 9, 19), 16: (5, 9, 27), 8: (5, 9, 31)}


def _fit_pytorch_fcn(shapes: Shapes) -> Fit:
    stride = _stride(shapes)
    names = {8: ("fcn8s_pad100", "fcn8s_pad100_atonce")}.get(stride, (f"fcn{stride}s_pad100",))
    options = {"encoder": "vgg16", "encoder_norm": None, "pool": "ceil", "crop": _CROPS[stride]}
    return Fit(names, _classes(shapes, "score_fr.weight"), {**options, "skip_bias": True, "upsample_bias": False})


def _fit_tramac(shapes: Shapes) -> Fit:
    aux = any(name.startswith("auxlayer.") for name in shapes)
    options = _encoder(feature_variant("pretrained.")(shapes))
    return Fit((f"fcn{_stride(shapes)}s_resize",), _classes(shapes, "head.block.4.weight"), options | {"aux_head": aux})


def _fit_pochih(shapes: Shapes) -> Fit:
    options = _encoder(feature_variant("pretrained_net.features.")(shapes))
    names = ("fcn32s_ladder", "fcn16s_ladder", "fcn8s_ladder", "fcns_ladder")
    return Fit(names, _classes(shapes, "classifier.weight"), options)


def _fit_fcn1(shapes: Shapes) -> Fit:
    return Fit(("fcns_ladder",), _classes(shapes, "classifier.weight"), {"encoder": "vgg13", "encoder_norm": None})


def _fit_fanrencli(shapes: Shapes) -> Fit:
    stride = _stride(shapes)
    # Its 32s cuts from 6 on; the score layer of its 16s has no bias, that of its 8s has one.
    crop = {**_CROPS, 32: (5, 9, 6)}[stride]
    options = {**_PLAIN_VGG16, "pool": "floor", "crop": crop, "skip_bias": stride != 16}
    return Fit((f"fcn{stride}s_pad100",), _classes(shapes, "score_fr.weight"), options)


def _fit_boostcamp(shapes: Shapes) -> Fit:
    options = {**_PLAIN_VGG16, "pool": "ceil", "fc6_kernel": 1, "skip_bias": True, "upsample_bias": True}
    return Fit((f"fcn{_stride(shapes)}s",), _classes(shapes, "score_fr.weight"), options)


# The order matters where names overlap: torchvision's are part of timm's and Johnson's.
LAYOUTS: dict[str, Layout] = {
    "fcn_jax": Layout(matches=_named(r"vgg\.(conv|bn)\d_\d\..*"), modules=None, variant=_ours_variant),
    "timm-vgg": Layout(
        matches=_named(r"pre_logits\.fc[12]\..*"),
        modules=timm_vgg,
        # `_cfg` of models/vgg.py: IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD.
        preprocessing="imagenet",
        variant=feature_variant("features."),
        encoder_only=True,
        unused=("pre_logits.fc[12].*", "head.fc.*"),
    ),
    "johnson-vgg": Layout(
        matches=_named(r"classifier\.[14]\.(weight|bias)"),
        modules=johnson_vgg,
        # README of pytorch-vgg: BGR in [0, 255] minus (103.939, 116.779, 123.68); the FCN reference takes off, within
        # one, the same.
        preprocessing="caffe",
        variant=feature_variant("features."),
        encoder_only=True,
        unused=("classifier.[146].weight", "classifier.[146].bias"),
    ),
    "torchvision-vgg": Layout(
        matches=_named(r"features\.\d+\.weight"),
        modules=torchvision_vgg,
        # The `transforms` of VGG16_Weights.IMAGENET1K_V1: RGB in [0, 1], ImageNet's mean and std.
        preprocessing="imagenet",
        variant=feature_variant("features."),
        encoder_only=True,
        # The layer of ImageNet's 1000 classes, and the others in networks without fc6 and fc7.
        unused=("classifier.[036].weight", "classifier.[036].bias"),
    ),
    "pytorch-fcn": Layout(
        matches=_named(r"conv[1-5]_\d\.(weight|bias)"),
        modules=_pytorch_fcn,
        preprocessing="caffe",  # torchfcn/datasets/voc.py: BGR minus (104.00698793, 116.66876762, 122.67891434)
        variant=lambda shapes: "vgg16",
        fit=_fit_pytorch_fcn,
        families=(Pad100FCN,),
    ),
    "tramac": Layout(
        matches=_named(r"pretrained\.\d+\.(weight|bias)|(head|auxlayer)\.block\.\d\..*"),
        modules=_tramac,
        preprocessing="imagenet",  # scripts/train.py: ToTensor, Normalize([.485, .456, .406], [.229, .224, .225])
        variant=feature_variant("pretrained."),
        fit=_fit_tramac,
        families=(ResizeFCN,),
    ),
    "pochih": Layout(
        matches=_named(r"pretrained_net\.features\.\d+\.(weight|bias)"),
        modules=_pochih,
        variant=feature_variant("pretrained_net.features."),
        fit=_fit_pochih,
        families=(LadderFCN,),
        # There with VGGNet(remove_fc=False); not used by its forward.
        unused=("pretrained_net.classifier.*",),
    ),
    "fcn1": Layout(
        matches=_named(r"block[1-5]\.[02]\.(weight|bias)"),
        modules=_fcn1,
        variant=lambda shapes: "vgg13",
        fit=_fit_fcn1,
        families=(LadderFCN,),
    ),
    "fanrencli": Layout(
        matches=_named(r"conv1[0-5]\.(weight|bias)"),
        modules=_fanrencli,
        variant=lambda shapes: "vgg16",
        fit=_fit_fanrencli,
        families=(Pad100FCN,),
    ),
    "boostcamp": Layout(
        matches=_named(r"conv[1-5]_\d\.0\.(weight|bias)"),
        modules=_boostcamp,
        variant=lambda shapes: "vgg16",
        fit=_fit_boostcamp,
        families=(SameFCN,),
    ),
}


def recognise(shapes: Shapes) -> str | None:
    """Return the layout's name in ``LAYOUTS``, or None where no layout has such names."""
    return next((name for name, layout in LAYOUTS.items() if layout.matches(shapes)), None)
