"""Every published network, and every encoder of every classifier layout. The quick tests have one of each."""

import pytest
from layout_cases import CASES, check_classifier, check_encoder, check_port

from fcn_jax.models.vgg import ENCODERS


@pytest.mark.parametrize("case", CASES)
def test_a_published_network_is_ported_exactly(case):
    check_port(case)


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("encoder", ["vgg11", "vgg16"])
@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_a_ported_classifier_gives_the_original_logits(source, encoder, norm):
    check_classifier(source, encoder, norm, (224, 224), ("float64", "float32"))


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("layout", ["torchvision-vgg", "timm-vgg"])
def test_every_encoder_fills_an_fcn_and_round_trips(layout, encoder, norm):
    check_encoder(layout, encoder, norm)
