"""Derivatives of a network's loss in every mode, compared with each other, PyTorch's and finite differences."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.flatten_util import ravel_pytree
from small_networks import make_network

from fcn_jax import losses, weights
from fcn_jax.compare.experiments import random_batch
from fcn_jax.compare.torch_adapter import Way, load_twin

FAMILIES = ("fcn8s", "fcn8s_pad100", "fcn8s_ladder", "fcn8s_resize")
CASES = list(itertools.product(FAMILIES, (None, "batch"), (False, True)))
CASES += [("fcn_resnet50", "batch", False), ("fcn_resnet50", "batch", True)]  # always with batch norm
# Rounding, in float64, of sums of a few thousand terms over 20 layers, forward and back.
ROUNDING = 1e-10


def make_case(family, norm, train, dropout=0.0):
    """Return model, variables, images, labels, and the loss as a function of the parameters as one vector."""
    options = {"dropout_rate": dropout} if family != "fcn8s_ladder" else {}
    options |= {"encoder_norm": norm} if family != "fcn_resnet50" else {}
    model, variables = make_network(family, **options)
    images, labels = random_batch((64, 96), model.num_classes)
    images = jnp.asarray(images, jnp.float64)
    vector, unravel = ravel_pytree(variables["params"])
    loss = losses.make_loss("softmax")

    def value(vector):
        arrays = {**variables, "params": unravel(vector)}
        options = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}} if train else {}
        out = model.apply(arrays, images, train=train, **options)
        total, weight = loss(out[0] if train else out, labels)
        return total / weight

    return model, variables, images, labels, value, vector, unravel


def error(ours, theirs):
    return float(np.linalg.norm(np.asarray(ours - theirs)) / np.linalg.norm(np.asarray(theirs)))


def directions(vector, count):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=vector.shape) * np.abs(vector)) for _ in range(count)]


def check_modes(family, norm, train):
    """Assert that jvp, linearize, vjp, both orders of a Hessian-vector product and finite differences agree."""
    *_, value, vector, _ = make_case(family, norm, train, dropout=0.5)
    gradient = jax.grad(value)

    @jax.jit
    def derivatives(x, v):
        along, forward_over_reverse = jax.jvp(gradient, (x,), (v,))
        return {
            "gradient": along,
            "checkpoint": jax.grad(jax.checkpoint(value))(x),
            "jvp": jax.jvp(value, (x,), (v,))[1],
            "linearize": jax.linearize(value, x)[1](v),
            "hvp": forward_over_reverse,
            "reverse over reverse": jax.grad(lambda x: jnp.vdot(gradient(x), v))(x),
        }

    differences, gradient, step = [], jax.jit(gradient), 1e-8
    for v in directions(vector, 5):
        found = derivatives(vector, v)
        slope = jnp.vdot(found["gradient"], v)
        assert error(found["checkpoint"], found["gradient"]) < ROUNDING
        assert abs(found["jvp"] / slope - 1) < ROUNDING and abs(found["linearize"] / slope - 1) < ROUNDING
        assert error(found["reverse over reverse"], found["hvp"]) < ROUNDING
        difference = (gradient(vector + step * v) - gradient(vector - step * v)) / (2 * step)
        differences.append(error(difference, found["hvp"]))
    # A finite difference across a kink of a ReLU or a pooling is wrong, so one direction may be far off.
    assert np.median(differences) < 1e-4


def check_hessian_against_torch(family, norm, train):
    """Assert that a Hessian-vector product equals PyTorch's double backward through the twin."""
    model, variables, images, labels, value, vector, unravel = make_case(family, norm, train)
    (v,) = directions(vector, 1)
    ours = jax.jit(lambda x: jax.jvp(jax.grad(value), (x,), (v,))[1])(vector)
    twin = load_twin(model, variables).train(train)
    along = {name: torch.from_numpy(np.array(x)) for name, x in weights.to_torch(model, {"params": unravel(v)}).items()}
    parameters = dict(twin.named_parameters())
    loss = Way("float64").loss(twin, Way("float64").images(np.asarray(images)), torch.from_numpy(labels).long())
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    dot = sum((g * along[name]).sum() for name, g in zip(parameters, gradients, strict=True))
    theirs = torch.autograd.grad(dot, list(parameters.values()), allow_unused=True)
    ours = weights.to_torch(model, {"params": unravel(ours)})
    flat = [
        (ours[name].ravel(), np.zeros(p.numel()) if h is None else h.numpy().ravel())
        for (name, p), h in zip(parameters.items(), theirs, strict=True)
    ]
    # Rounding as above, through two derivatives.
    assert error(*(np.concatenate(side) for side in zip(*flat, strict=True))) < 1e-9


def check_vmap(family, norm, train):
    """Assert that vmap over images and over parameters equals a loop."""
    model, variables, images, *_ = make_case(family, norm, train)

    def apply(variables, image):
        out = model.apply(variables, image[None], train=train, mutable=["batch_stats"] if train else False)
        return out[0] if train else out

    two = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), variables)
    over_images = jax.jit(jax.vmap(apply, (None, 0)))(variables, images)
    over_parameters = jax.jit(jax.vmap(apply, (0, None)))(two, images[0])
    one = jax.jit(apply)
    for index in range(2):
        assert error(over_images[index], one(variables, images[index])) < ROUNDING
        mine = jax.tree.map(lambda x: x[index], two)  # noqa: B023
        assert error(over_parameters[index], one(mine, images[0])) < ROUNDING
