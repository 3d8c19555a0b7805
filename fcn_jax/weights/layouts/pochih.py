"""pochih's FCN-pytorch."""

from __future__ import annotations

from fcn_jax.models.fcn import LadderFCN
from fcn_jax.weights.layouts.layout import Fit, Layout, Rows, Shapes, classes_of, encoder_options
from fcn_jax.weights.layouts.torchvision import feature_encoder, feature_rows

_FEATURES = "pretrained_net.features."
_DECODER = "deconv1 bn1 deconv2 bn2 deconv3 bn3 deconv4 bn4 deconv5 bn5 classifier".split()
DECODER: Rows = list(zip(_DECODER, _DECODER, strict=True))
"""The five transposed convolutions, their batch norms, and the classifier."""


def _rows(model: LadderFCN) -> Rows:
    """FCN32s, FCN16s, FCN8s and FCNs of ``python/fcn.py``."""
    return feature_rows(model.encoder, model.encoder_norm, _FEATURES) + DECODER


def _fit(shapes: Shapes) -> Fit:
    names = ("fcn32s_ladder", "fcn16s_ladder", "fcn8s_ladder", "fcns_ladder")
    return Fit(names, classes_of(shapes, "classifier.weight"), encoder_options(feature_encoder(shapes, _FEATURES)))


POCHIH = Layout(
    pattern=r"pretrained_net\.features\.\d+\.(weight|bias)",
    modules=_rows,
    fit=_fit,
    families=(LadderFCN,),
    unused=("pretrained_net.classifier.*",),  # of VGGNet(remove_fc=False), not used by its forward
)
