"""The naming layouts of published weights; each file defines a ``Layout`` and its functions."""

from __future__ import annotations

import re

from fcn_jax.weights.layouts.layout import Layout, Shapes, encoder_of, encoder_stages
from fcn_jax.weights.layouts.pochih import POCHIH
from fcn_jax.weights.layouts.pytorch_fcn import CAFFE_VGG, PYTORCH_FCN
from fcn_jax.weights.layouts.torchvision import JOHNSON, TIMM, TORCHVISION
from fcn_jax.weights.layouts.torchvision_fcn import TORCHVISION_FCN, TORCHVISION_RESNET, resnet_of
from fcn_jax.weights.layouts.tramac import TRAMAC
from fcn_jax.weights.layouts.tutorials import BOOSTCAMP, FANRENCLI, FCN1


def _encoder(shapes: Shapes) -> str | None:
    if resnet := resnet_of(shapes, "resnet.layer3_"):
        return resnet
    return encoder_of(shapes, "vgg.", lambda *encoder: [(name, name) for name in sum(encoder_stages(*encoder), [])])


# The order matters, as the first match counts: timm's and Johnson's files have torchvision's names too, and
# torchvision's FCN has Johnson's.
LAYOUTS: dict[str, Layout] = {
    "fcn_jax": Layout(
        pattern=r"vgg\.(conv|bn)\d_\d\..*|resnet\.(conv1|layer\d_\d+\..*)", modules=None, encoder=_encoder
    ),
    "torchvision-fcn": TORCHVISION_FCN,
    "timm-vgg": TIMM,
    "johnson-vgg": JOHNSON,
    "torchvision-vgg": TORCHVISION,
    "torchvision-resnet": TORCHVISION_RESNET,
    "caffe-vgg": CAFFE_VGG,
    "pytorch-fcn": PYTORCH_FCN,
    "tramac": TRAMAC,
    "pochih": POCHIH,
    "fcn1": FCN1,
    "fanrencli": FANRENCLI,
    "boostcamp": BOOSTCAMP,
}


def recognise(shapes: Shapes) -> str | None:
    """Return the layout's name in ``LAYOUTS``, or None where no layout has such names."""
    known = LAYOUTS.items()
    return next((name for name, layout in known if any(re.fullmatch(layout.pattern, key) for key in shapes)), None)
