"""torchvision's own classifiers at full width against ours: the same logits, and the same bits on the way back."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchvision_import import torchvision

from fcn_jax import weights
from fcn_jax.models.classifier import VGGClassifier

# Sums in another order, 19 layers deep: tens of roundings in float64; in float32 more, by torch's fast convolutions.
LIMITS = {"float32": 1e-5, "float64": 1e-11}


def on_meta(name):
    """Build torchvision's module without numbers: its own initialisation of 140 million takes seconds."""
    with torch.device("meta"):
        return torchvision.models.get_model(name)


def torchvision_classifier(name):
    """Build torchvision's module in eval mode, all of it drawn so that no layer is idle or like another.

    Weights repeat one row of random numbers, whose length is a prime so that it does not fall in step with the rows of
    a matrix; each tensor starts elsewhere in it.
    """
    module = on_meta(name).to_empty(device="cpu").eval()
    row = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
    for index, (key, value) in enumerate(module.state_dict().items()):
        drawn = torch.from_numpy(np.resize(np.roll(row, 7919 * index), tuple(value.shape)))
        if key.endswith("num_batches_tracked"):
            value.fill_(index)
        elif value.ndim > 1:
            torch.mul(drawn, (2 / value[0].numel()) ** 0.5, out=value)  # activations neither vanish nor explode
        elif key.endswith("running_var"):
            torch.exp(0.3 * drawn, out=value)
        elif key.endswith("weight"):
            value.copy_(1 + 0.2 * drawn)
        else:
            value.copy_(0.2 * drawn)
    return module


@pytest.fixture(scope="module", params=[f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")])
def ported(request):
    """Port one of torchvision's modules; return it, our network of its kind and the network's variables."""
    module = torchvision_classifier(request.param)
    encoder, _, norm = request.param.partition("_")
    model = VGGClassifier(encoder=encoder, encoder_norm="batch" if norm else None)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return module, model, weights.load(module.state_dict(), model, shapes)


def error(ported, dtype, size):
    """Return |x - y| / |y| of our logits and torchvision's for one image; every dtype holds the numbers exactly."""
    module, model, variables = ported
    images = np.random.default_rng(1).standard_normal((1, *size, 3), np.float32).astype(dtype)
    if dtype == "float64":
        module = copy.deepcopy(module).double()
    with torch.no_grad():
        theirs = module(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    del module
    cast = jax.tree.map(lambda value: value.astype(dtype), variables)
    ours = jax.jit(model.clone(dtype=dtype, param_dtype=dtype).apply)(cast, images)
    assert ours.dtype == theirs.dtype == dtype
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_ported_classifier_computes_torchvisions_logits(ported, dtype):
    assert error(ported, dtype, (224, 224)) <= LIMITS[dtype]


def test_a_ported_classifier_goes_back_bit_for_bit(ported):
    module, model, variables = ported
    back = weights.to_torch(model, variables, "torchvision-vgg")
    filled = on_meta(f"{model.encoder}{'_bn' if model.encoder_norm else ''}")
    tensors = {name: torch.from_numpy(value.copy()) for name, value in back.items()}
    filled.load_state_dict(tensors, strict=True, assign=True)
    theirs, ours = module.state_dict(), filled.state_dict()
    assert list(back) == list(theirs)
    for name, value in theirs.items():
        if name.endswith("num_batches_tracked"):
            assert ours[name] == 0  # a count that no network of ours keeps
        else:
            assert torch.equal(ours[name].view(torch.int32), value.view(torch.int32)), name
