"""torchvision's own classifiers at full width against ours: the same logits, and the same bits on the way back."""

import copy

import jax
import numpy as np
import pytest
import torch
from layout_cases import error, forward
from small_networks import shapes
from torch_sources import randomise
from torchvision_import import torchvision

from fcn_jax import weights
from fcn_jax.models.vgg import VGGClassifier

# Sums in another order, 19 layers deep: tens of roundings in float64; in float32 more, by torch's fast convolutions.
LIMITS = {"float32": 1e-5, "float64": 1e-11}


def on_meta(name):
    """Build torchvision's module without numbers: its own initialisation of 140 million takes seconds."""
    with torch.device("meta"):
        return torchvision.models.get_model(name)


@pytest.fixture(scope="module", params=[f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")])
def ported(request):
    """Port one of torchvision's modules; return it, our network of its kind and the network's variables."""
    module = randomise(on_meta(request.param).to_empty(device="cpu")).float()
    encoder, _, norm = request.param.partition("_")
    model = VGGClassifier(encoder=encoder, encoder_norm="batch" if norm else None)
    return module, model, weights.load(module.state_dict(), model, shapes(model))


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_ported_classifier_computes_torchvisions_logits(ported, dtype):
    module, model, variables = ported
    x = np.random.default_rng(1).standard_normal((1, 224, 224, 3), np.float32).astype(dtype)
    theirs = forward(copy.deepcopy(module).double() if dtype == "float64" else module, x)
    cast = jax.tree.map(lambda value: value.astype(dtype), variables)  # every dtype holds the numbers exactly
    ours = np.asarray(jax.jit(model.clone(dtype=dtype, param_dtype=dtype).apply)(cast, x))
    assert ours.dtype == theirs.dtype == dtype
    assert error(ours, theirs) <= LIMITS[dtype]


def test_a_ported_classifier_goes_back_bit_for_bit(ported):
    module, model, variables = ported
    back = weights.to_torch(model, variables, "torchvision-vgg")
    filled = on_meta(f"{model.encoder}{'_bn' if model.encoder_norm else ''}")
    tensors = {name: torch.from_numpy(value) for name, value in back.items()}
    filled.load_state_dict(tensors, strict=True, assign=True)
    assert list(back) == list(module.state_dict())
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert filled.state_dict()[name] == 0  # a count that no network of ours keeps
        else:
            assert torch.equal(filled.state_dict()[name].view(torch.int32), value.view(torch.int32)), name
