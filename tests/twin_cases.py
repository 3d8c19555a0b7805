"""Compare a network with its PyTorch twin: logits, running statistics and gradients.

The reference is always the twin in float64. In float32, torch's batch norm on the CPU is off by 1e-5 to 3e-4 in the
ladders and where padding makes large constant areas. That is ten to a hundred times more than ours.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F

import fcn_jax
from fcn_jax import weights
from fcn_jax.compare.experiments import cancelled_biases, random_batch, random_variables
from fcn_jax.compare.torch_adapter import load_twin
from fcn_jax.losses import IGNORE
from fcn_jax.models.kernels import cpu_kernels

NUM_CLASSES = 4


def _make_inputs(name: str, options: dict[str, Any], size: tuple[int, int], dtype: str) -> Any:
    """Return model, variables, images and labels."""
    given = {"width": 0.0625, **options, "dtype": dtype, "param_dtype": dtype}
    if "resize" in name or "resnet" in name:
        given |= {"head_features": 6, "dropout_rate": 0.0}
    elif "ladder" not in name:
        given |= {"fc_features": 16, "dropout_rate": 0.0}
    model = fcn_jax.create_model(name, NUM_CLASSES, **given)
    images, labels = random_batch(size, NUM_CLASSES)
    variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_variables(model))
    return model, variables, images.astype(dtype), labels


def _cross_entropy(logits, labels):
    valid = labels != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
    return jnp.mean(losses, where=valid)


def _run_jax(model, variables, images, labels):
    """Return eval logits, train logits (a tuple), gradients and new statistics, under torch's names and axes."""

    @jax.jit
    def both(variables, images):
        def loss(params):
            rest = {k: v for k, v in variables.items() if k != "params"}
            out, updated = model.apply({"params": params, **rest}, images, train=True, mutable=["batch_stats"])
            out = out if isinstance(out, tuple) else (out,)
            return sum(_cross_entropy(o, labels) * w for o, w in zip(out, (1.0, 0.4))), (out, updated)  # noqa: B905

        with cpu_kernels():  # as in the training step; derivative_cases.py tests plain JAX
            grads, (out, updated) = jax.grad(loss, has_aux=True)(variables["params"])
        return model.apply(variables, images), out, grads, updated

    evaluated, out, grads, updated = both(variables, images)
    grads = weights.to_torch(model, {"params": grads})
    statistics = weights.to_torch(model, updated)
    return np.asarray(evaluated), [np.asarray(o) for o in out], grads, statistics


def _run_torch(model, variables, images, labels):
    twin = load_twin(model, variables)
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    twin.eval()
    with torch.no_grad():
        evaluated = twin(x).permute(0, 2, 3, 1).numpy()
    twin.train()
    out = twin(x)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum(F.cross_entropy(o, y, ignore_index=IGNORE) * w for o, w in zip(out, (1.0, 0.4)))  # noqa: B905
    loss.backward()
    # Frozen parameters have no gradient in torch, and a zero gradient here.
    grads = {name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy() for name, p in twin.named_parameters()}
    statistics = {name: b.numpy() for name, b in twin.named_buffers()}
    return evaluated, [o.detach().permute(0, 2, 3, 1).numpy() for o in out], grads, statistics


def _error(ours, theirs):
    return np.linalg.norm((ours - theirs).ravel()) / (np.linalg.norm(theirs.ravel()) or 1.0)


def check_case(name: str, options: dict[str, Any], size: tuple[int, int], dtypes: tuple[str, ...]) -> None:
    """Assert that eval and train logits, statistics and gradients equal those of the twin.

    Encoders with batch norm need several pixels in pool5. Over one or two pixels, normalised values are +-1 whatever
    the weights, and gradients are rounding noise.
    """
    theirs = _run_torch(*_make_inputs(name, options, size, "float64"))
    global_norm = math.sqrt(sum(np.linalg.norm(g) ** 2 for g in theirs[2].values()))
    for dtype in dtypes:
        model, *inputs = _make_inputs(name, options, size, dtype)
        ours = _run_jax(model, *inputs)
        assert ours[0].shape == (2, *size, NUM_CLASSES)
        assert len(ours[1]) == len(theirs[1]) == (2 if options.get("aux_head") else 1)
        assert ours[2].keys() == theirs[2].keys()
        running = [name for name in ours[3] if "running" in name]
        assert set(running) == {name for name in theirs[3] if "running" in name}
        logits = [_error(ours[0], theirs[0]), *(_error(o, t) for o, t in zip(ours[1], theirs[1], strict=True))]
        statistics = [_error(ours[3][name], theirs[3][name]) for name in running]
        # Both sides sum a few thousand terms in another order, through up to 40 layers. Each term has an error of 2e-16
        # or 6e-8, which batch norms of narrow layers amplify.
        assert max(logits + statistics) <= {"float64": 1e-10, "float32": 1e-5}[dtype]
        difference = {name: np.linalg.norm((ours[2][name] - g).ravel()) / global_norm for name, g in theirs[2].items()}
        cancelled = cancelled_biases(model)  # their true gradient is zero
        relative = {name: _error(ours[2][name], g) for name, g in theirs[2].items() if name not in cancelled}
        if dtype == "float64":
            assert {name: e for name, e in relative.items() if not e <= 1e-10} == {}
            # Zero except for rounding, on both sides.
            assert {name: e for name, e in difference.items() if name in cancelled and not e <= 1e-12} == {}
        else:
            # Rounding that flips a ReLU or the maximum of a pooling window moves a whole gradient to another place. Two
            # float32 backends of torch itself differ by up to 2e-4.
            assert {name: e for name, e in difference.items() if not e <= 1e-3} == {}
