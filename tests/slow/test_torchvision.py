"""torchvision's classifiers and FCNs at full width: equal logits and bit-identical round trips."""

import copy

import jax
import numpy as np
import pytest
import torch
from layout_cases import error, forward
from small_networks import shapes
from torch_sources import randomise
from torchvision_import import torchvision

import fcn_jax
from fcn_jax import weights
from fcn_jax.models.vgg import VGGClassifier

# Sums in another order through 19 layers: tens of roundings. In float32, torch's fast convolutions add more.
LIMITS = {"float32": 1e-5, "float64": 1e-11}


def on_meta(name):
    """Build torchvision's module without values: initialising 140 million parameters takes seconds."""
    with torch.device("meta"):
        return torchvision.models.get_model(name)


@pytest.fixture(scope="module", params=[f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")])
def ported(request):
    """Return a torchvision module, the network it is ported to, and the network's variables."""
    module = randomise(on_meta(request.param).to_empty(device="cpu")).float()
    encoder, _, norm = request.param.partition("_")
    model = VGGClassifier(encoder=encoder, encoder_norm="batch" if norm else None)
    return module, model, weights.load(module.state_dict(), model, shapes(model))


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_ported_classifier_computes_torchvisions_logits(ported, dtype):
    module, model, variables = ported
    x = np.random.default_rng(1).standard_normal((1, 224, 224, 3), np.float32).astype(dtype)
    theirs = forward(copy.deepcopy(module).double() if dtype == "float64" else module, x)
    cast = jax.tree.map(lambda value: value.astype(dtype), variables)  # float32 values are exact in both dtypes
    ours = np.asarray(jax.jit(model.clone(dtype=dtype, param_dtype=dtype).apply)(cast, x))
    assert ours.dtype == theirs.dtype == dtype
    assert error(ours, theirs) <= LIMITS[dtype]


def test_a_ported_classifier_round_trips_bit_for_bit(ported):
    module, model, variables = ported
    back = weights.to_torch(model, variables, "torchvision-vgg")
    filled = on_meta(f"{model.encoder}{'_bn' if model.encoder_norm else ''}")
    tensors = {name: torch.from_numpy(value) for name, value in back.items()}
    filled.load_state_dict(tensors, strict=True, assign=True)
    assert list(back) == list(module.state_dict())
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert filled.state_dict()[name] == 0  # our networks have no such counter
        else:
            assert torch.equal(filled.state_dict()[name].view(torch.int32), value.view(torch.int32)), name


@pytest.mark.parametrize(("name", "aux"), [("fcn_resnet50", True), ("fcn_resnet101", False)])
def test_a_ported_fcn_equals_torchvision_and_round_trips_bit_for_bit(name, aux):
    module = randomise(
        getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, aux_loss=aux)
    )
    state = {key: value.numpy().copy() for key, value in module.state_dict().items()}
    info = weights.inspect(state)
    assert (info.layout, info.variant, info.fit.models) == ("torchvision-fcn", name.removeprefix("fcn_"), (name,))
    # Sums in another order, as for LIMITS, through up to 101 layers.
    for dtype, limit in {"float64": 1e-11, "float32": 2e-5}.items():
        model = fcn_jax.create_model(name, 21, aux_head=aux, dtype=dtype, param_dtype=dtype)
        variables, report = weights.load_with_report(state, model, shapes(model))
        assert not report.left
        torch_dtype, apply = getattr(torch, dtype), jax.jit(model.apply)
        for size in ((65, 97), (33, 130), (121, 75)):
            x = np.random.default_rng(1).standard_normal((1, *size, 3), np.float32).astype(dtype)
            with torch.no_grad():
                theirs = module.to(torch_dtype).eval()(torch.from_numpy(x).permute(0, 3, 1, 2))["out"]
            assert error(np.asarray(apply(variables, x)), theirs.permute(0, 2, 3, 1).numpy()) <= limit
        if dtype == "float64":
            back = weights.to_torch(model, variables, "torchvision-fcn")
            assert list(back) == list(state) and all(np.array_equal(back[key], state[key]) for key in state)
            module.load_state_dict({key: torch.from_numpy(value) for key, value in back.items()}, strict=True)
