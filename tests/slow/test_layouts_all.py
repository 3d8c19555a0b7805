"""Every published network and every encoder of every classifier layout, where the quick tests have one of each."""

import jax
import numpy as np
import pytest
import torch_sources as sources
from layout_cases import CASES, check_classifier, check_port, state_of
from small_networks import WIDTH, build

from fcn_jax import weights
from fcn_jax.models.vgg import ENCODERS


@pytest.mark.parametrize("case", CASES)
def test_a_published_network_is_ported_exactly(case):
    check_port(case)


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("encoder", ["vgg11", "vgg16"])
@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_a_ported_classifier_gives_the_sources_logits(source, encoder, norm):
    check_classifier(source, encoder, norm, (224, 224), ("float64", "float32"))


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("kind", [sources.TorchvisionVGG, sources.TimmVGG])
def test_every_encoder_goes_into_an_fcn_and_back(kind, encoder, norm):
    state = state_of(kind(encoder, norm is not None, WIDTH, 10))
    layout = "torchvision-vgg" if kind is sources.TorchvisionVGG else "timm-vgg"
    model, variables = build("fcn8s", encoder=encoder, encoder_norm=norm)
    loaded, report = weights.load_with_report(state, model, variables)
    back = weights.to_torch(model, loaded, layout)
    assert set(state) - set(back) == {name for name in state if name.startswith(("classifier.6", "head.fc"))}
    jax.tree.map(np.testing.assert_array_equal, back, {name: state[name] for name in back})
    assert set(report.filled.values()) | set(report.ignored) == set(state)
