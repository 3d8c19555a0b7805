"""wkentaro's pytorch-fcn, the Caffe reference in PyTorch."""

from __future__ import annotations

from fcn_jax.models.fcn import Pad100FCN
from fcn_jax.weights.layouts.layout import CROPS, Fit, Layout, Rows, Shapes, classes_of, encoder_stages, stride_of


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
    names = {8: ("fcn8s_pad100", "fcn8s_pad100_atonce")}.get(stride, (f"fcn{stride}s_pad100",))
    options = {"encoder": "vgg16", "encoder_norm": None, "pool": "ceil", "crop": CROPS[stride]}
    return Fit(names, classes_of(shapes, "score_fr.weight"), options | {"skip_bias": True, "upsample_bias": False})


PYTORCH_FCN = Layout(
    pattern=r"conv[1-5]_\d\.(weight|bias)",
    modules=_rows,
    preprocessing="caffe",  # torchfcn/datasets/voc.py: BGR minus (104.00698793, 116.66876762, 122.67891434)
    fit=_fit,
    families=(Pad100FCN,),
)
