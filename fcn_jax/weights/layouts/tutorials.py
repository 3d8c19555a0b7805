"""Networks from tutorials: the FCN1 notes, Fanrencli's "FCN (2015)", the Boostcamp notes."""

from __future__ import annotations

from typing import Any

from fcn_jax.models.fcn import LadderFCN, Pad100FCN, SameFCN
from fcn_jax.weights.layouts.layout import CROPS, Fit, Layout, Rows, Shapes, classes_of, encoder_stages, stride_of
from fcn_jax.weights.layouts.pochih import DECODER

_VGG16: dict[str, Any] = {"encoder": "vgg16", "encoder_norm": None}


def _fcn1(model: LadderFCN) -> Rows:
    stages = enumerate(encoder_stages(model.encoder, None), start=1)
    return [(ours, f"block{stage}.{2 * i}") for stage, modules in stages for i, ours in enumerate(modules)] + DECODER


def _fit_fcn1(shapes: Shapes) -> Fit:
    return Fit(("fcns_ladder",), classes_of(shapes, "classifier.weight"), {"encoder": "vgg13", "encoder_norm": None})


def _fanrencli(model: Pad100FCN) -> Rows:
    # Convolutions are numbered consecutively, including fc6 and fc7.
    ours = [name for stage in encoder_stages(model.encoder, None) for name in stage] + ["head.fc6", "head.fc7"]
    scores = {
        32: ("upscore32",),
        16: ("upscore16", "upscore2", "score_pool4"),
        8: ("score_pool3", "score_pool4", "upscore2", "upscore8", "upscore_pool4"),
    }
    rows = [(name, f"conv{index}") for index, name in enumerate(ours, start=1)]
    return rows + [(name, name.replace("upscore_pool4", "upscore2x2")) for name in ("score_fr", *scores[model.stride])]


def _fit_fanrencli(shapes: Shapes) -> Fit:
    stride = stride_of(shapes)
    # Its 32s crops at offset 6; the score layer of its 16s has no bias, that of its 8s has one.
    crop = {**CROPS, 32: (5, 9, 6)}[stride]
    options = _VGG16 | {"upsample_bias": False, "pool": "floor", "crop": crop, "skip_bias": stride != 16}
    return Fit((f"fcn{stride}s_pad100",), classes_of(shapes, "score_fr.weight"), options)


def _boostcamp(model: SameFCN) -> Rows:
    rows = []
    for stage, modules in enumerate(encoder_stages(model.encoder, None), start=1):
        rows += [(ours, f"{ours.removeprefix('vgg.')}.0") for ours in modules]
        if (stage, model.stride) in ((3, 8), (4, 8), (4, 16)):  # the score layer follows its stage
            rows.append((f"score_pool{stage}", f"score_pool{stage}_fr"))
    block = ".0" if model.stride == 32 else ""  # fc6 and fc7 are blocks with ReLU in its FCN32s only
    rows += [("head.fc6", f"fc6{block}"), ("head.fc7", f"fc7{block}"), ("score_fr", "score_fr")]
    rows += [("upscore2", "upscore2"), ("upscore_pool4", "upscore2_pool4")][: {32: 0, 16: 1, 8: 2}[model.stride]]
    return [*rows, (f"upscore{model.stride}", f"upscore{model.stride}")]


def _fit_boostcamp(shapes: Shapes) -> Fit:
    options = _VGG16 | {"pool": "ceil", "fc6_kernel": 1, "skip_bias": True, "upsample_bias": True}
    return Fit((f"fcn{stride_of(shapes)}s",), classes_of(shapes, "score_fr.weight"), options)


FCN1 = Layout(pattern=r"block[1-5]\.[02]\.(weight|bias)", modules=_fcn1, fit=_fit_fcn1, families=(LadderFCN,))
FANRENCLI = Layout(pattern=r"conv1[0-5]\.(weight|bias)", modules=_fanrencli, fit=_fit_fanrencli, families=(Pad100FCN,))
BOOSTCAMP = Layout(
    pattern=r"conv[1-5]_\d\.0\.(weight|bias)", modules=_boostcamp, fit=_fit_boostcamp, families=(SameFCN,)
)
